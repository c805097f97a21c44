"""The extensions of one run, and the lifecycle hooks that tell them what happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import pluggy

from editcore._util.words import with_article
from editcore.interfaces.errors import PluginError
from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
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

    def before_run(self, event: BeforeRun) -> None:
        """``editcore_before_run``"""
        self._call("editcore_before_run", event)

    def before_batch(self, event: BeforeBatch) -> list[tuple[str, BatchAddition]]:
        """``editcore_before_batch``: what each extension adds, by its name, in call order."""
        return self._answers("editcore_before_batch", event, BatchAddition)

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

    def _call(self, hook: str, event: object) -> list[tuple[str, object]]:
        answers: list[tuple[str, object]] = []
        for name in reversed(list(self._hooks)):
            with boundary(f"The plugin '{name}' failed in {hook}: "):
                answers += [(name, answer) for answer in getattr(self._hooks[name], hook)(event=event)]
        return answers

    def _answers(self, hook: str, event: object, expected: type[T]) -> list[tuple[str, T]]:
        answers: list[tuple[str, T]] = []
        for name, answer in self._call(hook, event):
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
