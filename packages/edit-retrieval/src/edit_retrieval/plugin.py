"""Announces the editor and the attachment ``retrieval``; imports no torch."""

from editcore import AttachmentSpec, Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters."""
    return [
        EditorSpec(
            "retrieval",
            "edit_retrieval.editor:RetrievalEditor",
            hparams="edit_retrieval.hparams:RetrievalHParams",
            summary="Put the edited statements most similar to a prompt before it.",
            capabilities=Capabilities(gives=frozenset({"attachment"}), needs_subject=False),
            baseline=True,
        )
    ]


@hookimpl
def editcore_attachments() -> list[AttachmentSpec]:
    """The statements, and how they are found."""
    summary = "Statements, of which those most similar to a prompt are put before it."
    return [AttachmentSpec("retrieval", "edit_retrieval.attachment:RetrievedStatements", summary=summary)]
