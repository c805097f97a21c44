"""Announces the editor and the attachment ``memory``; imports no torch."""

from editcore import AttachmentSpec, Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "memory",
            "edit_memory.editor:MemoryEditor",
            hparams="edit_memory.hparams:MemoryHParams",
            presets="edit_memory.presets",
            summary="Keep keys and values beside a projection, and use them where its input is near a key.",
            capabilities=Capabilities(gives=frozenset({"attachment"}), rewrites_subject=True),
        )
    ]


@hookimpl
def editcore_attachments() -> list[AttachmentSpec]:
    """The memory itself."""
    summary = "Keys and values beside a projection, read where its input is near a key."
    return [AttachmentSpec("memory", "edit_memory.attachment:Memory", summary=summary)]
