"""Announces the extension ``replay`` and its strategies; imports no torch."""

from editcore import ComponentSpec, ExtensionSpec, hookimpl

_STRATEGIES = {
    "random": "Any earlier fact, all alike.",
    "priority": "The facts that the model holds least first.",
    "recent": "The facts that were edited last.",
}


@hookimpl
def editcore_extensions() -> list[ExtensionSpec]:
    """The extension, with its hyperparameters."""
    return [
        ExtensionSpec(
            "replay",
            "edit_replay.extension:ReplayExtension",
            hparams="edit_replay.hparams:ReplayHParams",
            summary="Add earlier facts to every batch, with the values they were solved for.",
        )
    ]


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """The choices of ``replay_strategy``; another package adds one in the same way."""
    return [
        ComponentSpec(name, f"edit_replay.strategies:{name}", kind="replay.strategy", summary=summary)
        for name, summary in _STRATEGIES.items()
    ]
