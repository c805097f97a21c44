"""Announces the editor and the attachment ``gated-memory``; imports no torch."""

from editcore import AttachmentSpec, Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters."""
    return [
        EditorSpec(
            "gated-memory",
            "third_memory.editor:GatedMemoryEditor",
            hparams="third_memory.hparams:GatedMemoryHParams",
            summary="Learn what to add to a block's output where a prompt comes again.",
            capabilities=Capabilities(gives=frozenset({"attachment"}), needs_subject=False),
        )
    ]


@hookimpl
def editcore_attachments() -> list[AttachmentSpec]:
    """The memory itself."""
    summary = "Keys and values beside a block, read where a hidden state is near a key."
    return [AttachmentSpec("gated-memory", "third_memory.attachment:GatedMemory", summary=summary)]
