"""Announces the editor ``statements`` and the attachment ``retrieved-context``; imports no torch."""

from editcore import AttachmentSpec, Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters."""
    return [
        EditorSpec(
            "statements",
            "third_retrieval.editor:RetrievalEditor",
            hparams="third_retrieval.hparams:RetrievalHParams",
            summary="Put a remembered statement in front of a prompt that is like it.",
            capabilities=Capabilities(gives=frozenset({"attachment"}), needs_subject=False),
        )
    ]


@hookimpl
def editcore_attachments() -> list[AttachmentSpec]:
    """The statements and how they are found."""
    summary = "Statements of which the most similar one is put in front of a prompt."
    return [AttachmentSpec("retrieved-context", "third_retrieval.attachment:RetrievedContext", summary=summary)]
