"""Announces the editors ``memit`` and ``memit-seq``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editors, with their hyperparameters and presets."""
    abilities = Capabilities(rewrites_subject=True, uses_held=True, multi_layer=True)
    return [
        EditorSpec(
            "memit",
            "edit_memit.editor:MemitEditor",
            hparams="edit_memit.hparams:MemitHParams",
            presets="edit_memit.presets",
            summary="Spread a batch of facts over several layers, one ridge solve in each.",
            capabilities=abilities,
        ),
        EditorSpec(
            "memit-seq",
            "edit_memit.editor:MemitSeqEditor",
            hparams="edit_memit.hparams:MemitSeqHParams",
            presets="edit_memit.presets",
            summary="MEMIT in sequence: batches that together solve what one batch of all their facts would.",
            capabilities=abilities,
        ),
    ]
