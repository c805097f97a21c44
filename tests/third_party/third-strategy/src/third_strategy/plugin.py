"""Announces the strategy ``in-turn`` to the extension ``replay``; imports no torch."""

from editcore import ComponentSpec, hookimpl


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """A choice of ``replay.replay_strategy``."""
    return [
        ComponentSpec(
            "in-turn",
            "third_strategy.strategy:in_turn",
            kind="replay.strategy",
            summary="Each fact has its turn: those replayed least, and of these the oldest.",
        )
    ]
