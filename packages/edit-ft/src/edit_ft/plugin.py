"""Announces the editor ``ft``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "ft",
            "edit_ft.editor:FineTuneEditor",
            hparams="edit_ft.hparams:FineTuneHParams",
            presets="edit_ft.presets",
            summary="Train one matrix on the facts of a batch together.",
            capabilities=Capabilities(gives=frozenset({"dense", "factored"}), needs_subject=False),
        )
    ]
