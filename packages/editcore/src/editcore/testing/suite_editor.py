"""An editor for tests of extensions: least squares at one layer. It is quick, and needs no corpus.

It is announced only in the contract suite of extensions.
"""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint
from typing import Annotated

from pydantic import Field

from editcore.interfaces.hookspecs import hookimpl
from editcore.interfaces.specs import Capabilities, EditorSpec
from editcore.locate_then_edit.editor import LocateThenEdit
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.plugins.registry import ENTRY_POINT_GROUP, Plugins

__all__ = ["NAME", "SuiteEditor", "SuiteHParams", "with_suite_editor"]

NAME = "suite-editor"


class SuiteHParams(LocateThenEditHParams):
    """The hyperparameters of every locate-then-edit method, with small defaults."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    """The second of the three blocks of a tiny model."""
    context_templates: tuple[str, ...] | None = ("{}",)
    """The bare prompt alone."""
    v_num_grad_steps: Annotated[int, Field(ge=1)] = 3
    """Enough to move."""
    mom2_adjustment: bool = False
    """C = I, for which no text is needed."""


class SuiteEditor(LocateThenEdit):
    """The shared solve, with a ridge, so that the weights of requests matter."""

    name = NAME
    hparams: SuiteHParams

    @property
    def ridge(self) -> float:
        """λ of the solve."""
        return 1.0


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor."""
    return [
        EditorSpec(
            NAME,
            f"{__name__}:SuiteEditor",
            hparams=f"{__name__}:SuiteHParams",
            summary="Least squares at one layer, for tests of extensions.",
            capabilities=Capabilities(uses_held=True, multi_layer=True),
        )
    ]


def with_suite_editor() -> Plugins:
    """The installed plugins and the suite's editor."""
    installed = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return Plugins.load(entry_points=[*installed, EntryPoint(NAME, __name__, ENTRY_POINT_GROUP)])
