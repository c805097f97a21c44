"""The executor ``ray``: each worker is an actor, which keeps its model from one trial to the next."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from editcore import Outcome, RunError
from editcore.execution import attempt, lost
from ray.exceptions import RayActorError, RayError

from edit_ray.hparams import RayHParams

__all__ = ["RayExecutor"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_START_FAILURES = 5
"""The sweep ends after this many workers in a row have failed to start."""


class RayExecutor:
    """Runs items on actors of a Ray cluster. An item is tried again if its actor was lost, with its machine or alone.

    An actor gets its first item when it has started, so no item waits for an actor that has no room yet.
    """

    def __init__(self, hparams: RayHParams) -> None:
        self.hparams = hparams
        self.shares_files = hparams.shared_files
        self._actors: list[Any] = []
        self._connected = False

    shares_files = False

    def map(
        self,
        make: Callable[[], Callable[[T], R]],
        items: Sequence[T],
        *,
        started: Callable[[int], None] = lambda _index: None,
        accelerator: bool = False,
    ) -> Iterator[Outcome[R]]:
        """See :class:`editcore.Executor`.

        Raises:
            RunError: the cluster cannot be reached, has no room for one worker, or its workers cannot start.
        """
        if not items:
            return
        gpus = self.hparams.gpus or (1.0 if accelerator else 0.0)
        self._connect()
        waiting = deque(range(len(items)))
        attempts = [0] * len(items)
        calls: dict[Any, _Call] = {}
        failed_starts = 0

        def start() -> None:
            actor = self._start(make, gpus)
            calls[actor.ready.remote()] = _Call(actor)

        def hand_out(actor: Any) -> None:
            if waiting:
                index = waiting.popleft()
                attempts[index] += 1
                started(index)
                calls[actor.attempt.remote(index, items[index])] = _Call(actor, index)

        try:
            for _ in range(min(self._room(gpus), len(items))):
                start()
            while waiting or any(call.index is not None for call in calls.values()):
                [reference], _ = ray.wait(list(calls), num_returns=1)
                call = calls.pop(reference)
                outcome: Outcome[R] | None = None
                alive = True
                try:
                    outcome = ray.get(reference)
                    failed_starts = 0
                except RayActorError as error:
                    alive = False
                    self._actors.remove(call.actor)
                    if call.index is None:
                        failed_starts += 1
                        if failed_starts >= _START_FAILURES:
                            raise RunError(f"Workers cannot start on the cluster: {_reason(error)}") from error
                    elif attempts[call.index] <= self.hparams.retries:
                        _log.warning("A worker was lost; item %d is tried again.", call.index)
                        waiting.appendleft(call.index)
                    else:
                        outcome = lost(call.index, attempts[call.index], _reason(error))
                    if waiting:
                        start()
                if outcome is not None and call.index is not None:
                    yield replace(outcome, attempts=attempts[call.index])
                if alive:
                    hand_out(call.actor)
        finally:
            self.close()

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        if not ray.is_initialized():
            self._actors = []
            return
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._connected:
            ray.shutdown()
            self._connected = False

    def _connect(self) -> None:
        if ray.is_initialized():  # by the program that uses the executor from Python
            return
        try:
            ray.init(address=self.hparams.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            asked = self.hparams.address or "a new cluster on this machine"
            raise RunError(f"The Ray cluster '{asked}' cannot be reached: {_reason(error)}") from error
        self._connected = True

    def _room(self, gpus: float) -> int:
        """How many workers to start: ``workers`` of the settings, or as many as the cluster has room for.

        Raises:
            RunError: there is no room for even one.
        """
        has = ray.cluster_resources()
        needs = {"CPU": float(self.hparams.cpus), "GPU": gpus, "memory": 1e9 * (self.hparams.memory_gb or 0.0)}
        fits = min(int(has.get(name, 0.0) / amount) for name, amount in needs.items() if amount)
        if not fits:
            wants = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            found = ", ".join(f"{has.get(name, 0.0):g} {name}" for name, amount in needs.items() if amount)
            raise RunError(f"A worker needs {wants}, and the whole cluster has {found}. Set cpus, gpus and memory_gb.")
        return self.hparams.workers or fits

    def _start(self, make: Callable[[], Callable[[T], R]], gpus: float) -> Any:
        memory = None if self.hparams.memory_gb is None else int(1e9 * self.hparams.memory_gb)
        # Ray sets OMP_NUM_THREADS of the worker to num_cpus, unless the variable is already set there.
        actor = ray.remote(num_cpus=self.hparams.cpus, num_gpus=gpus, memory=memory, max_restarts=0)(_Actor)
        self._actors.append(actor.remote(make))
        return self._actors[-1]


@dataclass(frozen=True, slots=True)
class _Call:
    """A pending call to an actor."""

    actor: Any
    index: int | None = None
    """Index of the item; ``None`` for the call that waits for the actor's start."""


class _Actor:
    """A worker."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make = make
        self._function: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Return once the worker has started."""

    def attempt(self, index: int, item: Any) -> Outcome[Any]:
        return attempt(self._work, index, item)

    def _work(self, item: Any) -> Any:
        self._function = self._function or self._make()
        return self._function(item)


def _reason(error: BaseException) -> str:
    """The first line of Ray's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
