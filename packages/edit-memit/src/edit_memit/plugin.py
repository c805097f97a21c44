"""Announces the editor ``memit``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "memit",
            "edit_memit.editor:MemitEditor",
            hparams="edit_memit.hparams:MemitHParams",
            presets="edit_memit.presets",
            summary="Spread a batch of facts over several layers, one ridge solve in each.",
            capabilities=Capabilities(rewrites_subject=True, uses_held=True, multi_layer=True),
        )
    ]
