"""Announces the extension ``replay`` and its strategies; imports no torch."""

from editcore import ComponentSpec, ExtensionSpec, hookimpl


@hookimpl
def editcore_extensions() -> list[ExtensionSpec]:
    """The extension, with its hyperparameters."""
    return [
        ExtensionSpec(
            "replay",
            "edit_replay.extension:ReplayExtension",
            hparams="edit_replay.hparams:ReplayHParams",
            summary="Keep updates away from the keys of earlier facts, or solve for earlier facts again.",
        )
    ]


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """The study of replay, and the choices of ``replay_strategy``; another package adds one in the same way."""
    kind, module = "replay.strategy", "edit_replay.strategies"
    study = "Rate, buffer size, strategy and weight of replay."
    return [
        ComponentSpec("replay", "edit_replay.studies:replay.toml", kind="study", summary=study),
        ComponentSpec("random", f"{module}:random", kind=kind, summary="Any earlier fact, all alike."),
        ComponentSpec("priority", f"{module}:priority", kind=kind, summary="Facts that failed their last check first."),
        ComponentSpec("recent", f"{module}:recent", kind=kind, summary="The facts that were edited last."),
    ]
