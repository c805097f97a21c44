"""Announces the editor ``ft``; imports no torch."""

from editcore import Capabilities, ComponentSpec, EditorSpec, hookimpl


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


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """What ``editctl onboard`` tries."""
    return [ComponentSpec("ft", "edit_ft.search:search", kind="onboarding.search", summary="Layer and learning rate.")]
