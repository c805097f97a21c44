"""The extensions of one run, and the lifecycle hooks that tell them what happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import pluggy

from editcore._util.words import with_article
from editcore.interfaces.errors import PluginError
from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterSolve,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    Rework,
)
from editcore.interfaces.hookspecs import LifecycleHooks
from editcore.interfaces.values import Verdict
from editcore.plugins.calls import boundary, hooks_of

__all__ = ["Lifecycle", "lifecycle"]

T = TypeVar("T")


class Lifecycle:
    """The extensions of one run. Each method calls one hook of all extensions, the last extension first.

    An exception of an extension becomes a :class:`PluginError` with its name, unless it is an :class:`EditcoreError`
    already. Built by :func:`lifecycle`.
    """

    def __init__(self, hooks: Mapping[str, pluggy.HookRelay]) -> None:
        self._hooks = hooks
        self.reworks = any(relay.editcore_after_solve.get_hookimpls() for relay in hooks.values())
        """Whether an extension has the hook ``editcore_after_solve``."""

    def before_run(self, event: BeforeRun) -> None:
        """``editcore_before_run``"""
        self._call("editcore_before_run", event)

    def before_batch(self, event: BeforeBatch) -> list[tuple[str, BatchAddition]]:
        """``editcore_before_batch``: what each extension adds, by its name, in call order."""
        return self._answers("editcore_before_batch", event, BatchAddition)

    def after_solve(self, event: AfterSolve) -> Rework:
        """``editcore_after_solve``: what the extensions, one after the other, make of the changes.

        Raises:
            PluginError: an extension leaves out a weight, or adds one.
        """
        rework = Rework(changes=event.changes)
        for name in reversed(list(self._hooks)):
            given = replace(event, changes=rework.changes)
            for _, answer in self._answers("editcore_after_solve", given, Rework, only=name):
                if answer.changes.keys() != event.changes.keys():
                    raise PluginError(
                        f"The plugin '{name}' returned changes of {', '.join(sorted(answer.changes)) or 'nothing'} "
                        f"from editcore_after_solve; the editor proposes changes of {', '.join(sorted(event.changes))}."
                    )
                rework = Rework(
                    changes=answer.changes,
                    diagnostics={**rework.diagnostics, **answer.diagnostics},
                    notes=(*rework.notes, *answer.notes),
                )
        return rework

    def before_apply(self, event: BeforeApply) -> list[tuple[str, Verdict]]:
        """``editcore_before_apply``: how each extension judges, by its name, in call order."""
        return self._answers("editcore_before_apply", event, Verdict)

    def after_batch(self, event: AfterBatch) -> None:
        """``editcore_after_batch``"""
        self._call("editcore_after_batch", event)

    def after_undo(self, event: AfterUndo) -> None:
        """``editcore_after_undo``"""
        self._call("editcore_after_undo", event)

    def after_evaluation(self, event: AfterEvaluation) -> None:
        """``editcore_after_evaluation``"""
        self._call("editcore_after_evaluation", event)

    def after_run(self, event: AfterRun) -> None:
        """``editcore_after_run``"""
        self._call("editcore_after_run", event)

    def _call(self, hook: str, event: object, *, only: str | None = None) -> list[tuple[str, object]]:
        answers: list[tuple[str, object]] = []
        for name in reversed(list(self._hooks)) if only is None else [only]:
            with boundary(f"The plugin '{name}' failed in {hook}: "):
                answers += [(name, answer) for answer in getattr(self._hooks[name], hook)(event=event)]
        return answers

    def _answers(self, hook: str, event: object, expected: type[T], *, only: str | None = None) -> list[tuple[str, T]]:
        answers: list[tuple[str, T]] = []
        for name, answer in self._call(hook, event, only=only):
            if not isinstance(answer, expected):
                raise PluginError(
                    f"The plugin '{name}' returned {with_article(type(answer).__name__)} from {hook}, which "
                    f"must return {expected.__name__} or None."
                )
            answers.append((name, answer))
        return answers


def lifecycle(instances: Mapping[str, object]) -> Lifecycle:
    """Gather the extensions of a run, in the order in which they were given.

    Raises:
        PluginError: an extension has a hook that does not exist, or one with arguments that its specification lacks.
    """
    hooks: dict[str, pluggy.HookRelay] = {}
    for name, instance in instances.items():
        with boundary(f"The plugin '{name}' does not fit the hooks: "):
            hooks[name] = hooks_of(instance, name, specifications=LifecycleHooks)
    return Lifecycle(hooks)
