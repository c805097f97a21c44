"""Announces the editor ``ultra``; imports no torch."""

from editcore import Capabilities, ComponentSpec, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "ultra",
            "edit_ultra.editor:UltraEditor",
            hparams="edit_ultra.hparams:UltraHParams",
            presets="edit_ultra.presets",
            summary="Write facts from one gradient, without optimisation.",
            capabilities=Capabilities(needs_subject=False, multi_layer=True),
        )
    ]


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """What ``editctl onboard`` tries."""
    summary = "Step, blocks and modules."
    return [ComponentSpec("ultra", "edit_ultra.search:search", kind="onboarding.search", summary=summary)]
