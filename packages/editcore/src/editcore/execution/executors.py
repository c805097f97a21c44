"""Runs independent work: the executor ``local``, and making any executor. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Annotated, Any, TypeVar

from pydantic import Field

from editcore.interfaces.errors import EditcoreError, HParamsError, PluginError
from editcore.interfaces.protocols import Executor, Outcome
from editcore.plugins.calls import boundary, resolve
from editcore.plugins.registry import Plugins
from editcore.settings.hparams import HParams, build

__all__ = ["LOST", "LocalExecutor", "LocalHParams", "attempt", "lost", "make_executor"]

T = TypeVar("T")
R = TypeVar("R")

LOST = "WorkerLost"
"""``Outcome.kind`` of an item whose workers died."""
_MOST_WORKERS = 4
_PATIENCE = 5.0
"""Seconds that a worker gets to end by itself before it is killed."""


def make_executor(plugins: Plugins, name: str, settings: Mapping[str, object]) -> Executor:
    """An executor with its hyperparameters.

    Raises:
        UnknownNameError: there is no executor of that name.
        HParamsError: a setting is unknown or wrong.
    """
    spec = plugins.executor(name)
    if spec.hparams is None and settings:
        raise HParamsError(f"{name}: unknown setting '{next(iter(settings))}'. It has no hyperparameters.")
    arguments = [] if spec.hparams is None else [build(resolve(spec.hparams), [settings], owner=name)]
    target = resolve(spec.target)
    with boundary(f"The executor '{name}' cannot be set up: "):
        made: Executor = target(*arguments)
    return made


def attempt(function: Callable[[T], R], index: int, item: T) -> Outcome[R]:
    """Call a function on an item. If it raises, the exception is the outcome. Workers of any executor use this."""
    try:
        with boundary("Unexpected "):
            return Outcome(index=index, value=function(item))
    except EditcoreError as error:
        foreign = error.__cause__ if isinstance(error, PluginError) else None
        return Outcome(
            index=index,
            kind=type(foreign or error).__name__,
            error=str(error),
            traceback="".join(traceback.format_exception(foreign)) if foreign else "",
        )


def lost(index: int, attempts: int, how: str) -> Outcome[Any]:
    """The outcome of an item whose workers all died."""
    times = "its worker was" if attempts == 1 else f"{attempts} workers one after the other were"
    return Outcome(index=index, kind=LOST, error=f"The item was given up: {times} lost ({how}).", attempts=attempts)


class LocalHParams(HParams):
    """How many workers run on this machine, and how many threads each uses."""

    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes, each with a model of its own. ``none``: one per GPU if the work needs GPUs, otherwise one per core,
    four at most. The GPUs are divided among them; a single worker has all, for a model spread over them (``auto``)."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of each worker. ``none``: ``OMP_NUM_THREADS`` if it is set, otherwise an equal share of the cores. The
    last bits of a result may depend on it."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often an item is tried again if its worker died."""


class LocalExecutor:
    """New processes with a pipe each. The death of a process is noticed at once, and does not affect the others.

    (The pools of :mod:`concurrent.futures` give up all items when one process dies.)
    """

    shares_files = True

    def __init__(self, hparams: LocalHParams) -> None:
        self.hparams = hparams
        self._workers: list[_Worker] = []

    def map(
        self,
        make: Callable[[], Callable[[T], R]],
        items: Sequence[T],
        *,
        started: Callable[[int], None] = lambda _index: None,
        accelerator: bool = False,
    ) -> Iterator[Outcome[R]]:
        """See :class:`editcore.Executor`."""
        environments = self._environments(len(items), accelerator)
        waiting = deque(range(len(items)))
        attempts = [0] * len(items)

        def hand_out(worker: _Worker) -> None:
            if waiting:
                index = waiting.popleft()
                attempts[index] += 1
                started(index)
                worker.take(index, items[index])

        try:
            for environment in environments:
                self._workers.append(_Worker(environment, make))
                hand_out(self._workers[-1])
            while busy := [worker for worker in self._workers if worker.index is not None]:
                ready = wait([worker.pipe for worker in busy])
                for worker in [worker for worker in busy if worker.pipe in ready]:
                    index = worker.index
                    assert index is not None
                    outcome: Outcome[R] | None = worker.answer()
                    if outcome is None:
                        how = worker.end()
                        worker = self._replace(worker, make)
                        if attempts[index] <= self.hparams.retries:
                            waiting.appendleft(index)
                        else:
                            outcome = lost(index, attempts[index], how)
                    if outcome is not None:
                        yield replace(outcome, attempts=attempts[index])
                    hand_out(worker)
        finally:
            self.close()

    def close(self) -> None:
        """End the workers. Work that is not finished is lost."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _replace(self, worker: _Worker, make: Callable[[], Callable[[T], R]]) -> _Worker:
        fresh = _Worker(worker.environment, make)
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def _environments(self, items: int, accelerator: bool) -> list[dict[str, str]]:
        """Environment variables to set for each worker."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = _visible_devices() if accelerator else []
        usual = len(devices) or min(cores, _MOST_WORKERS)
        workers = min(self.hparams.workers or usual, items)
        given = os.environ.get("OMP_NUM_THREADS", "")
        threads = self.hparams.threads or (int(given) if given.isdigit() else max(1, cores // max(1, workers)))
        shared = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        return [
            {**shared, **({"CUDA_VISIBLE_DEVICES": ",".join(_dealt(devices, slot, workers))} if devices else {})}
            for slot in range(workers)
        ]


def _dealt(devices: Sequence[str], slot: int, workers: int) -> Sequence[str]:
    """The devices of a worker. All devices are in use. If there are more workers than devices, workers share."""
    return devices[slot::workers] or [devices[slot % len(devices)]]


def _visible_devices() -> list[str]:
    """The GPUs of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True, slots=True)
class _Job:
    index: int
    item: Any


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, environment: Mapping[str, str], make: Callable[[], Callable[[Any], Any]]) -> None:
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would copy locks of threads that do not exist in the child
        self.environment = dict(environment)
        self.index: int | None = None
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, self.environment), daemon=True)
        with _ignoring_interrupts():
            self.process.start()
        theirs.close()  # otherwise the pipe would stay open after the process ended
        self._send(make)

    def take(self, index: int, item: Any) -> None:
        self.index = index
        self._send(_Job(index, item))

    def answer(self) -> Outcome[Any] | None:
        """The outcome of its item; ``None`` if the process died."""
        try:
            outcome: Outcome[Any] = self.pipe.recv()
        except (EOFError, OSError):
            return None
        self.index = None
        return outcome

    def end(self) -> str:
        """Wait until the process ends, and kill it if that takes too long.

        Returns:
            How it ended, in words.
        """
        self.index = None
        self.pipe.close()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _send(self, value: object) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the process died; reading its answer will notice
            self.pipe.send(value)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Inside the block, processes are started that ignore Ctrl-C. Ctrl-C goes to every process of a terminal, and the
    main process ends the workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what is started now
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _serve(pipe: Connection, environment: Mapping[str, str]) -> None:
    """Serve a worker's pipe until it ends. The environment is set before torch is imported, which reads it once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function: Callable[[Any], Any] | None = None
    with suppress(EOFError, BrokenPipeError):
        make = pipe.recv()
        while True:
            job = pipe.recv()

            def work(item: Any) -> Any:
                nonlocal function
                function = function or make()
                return function(item)

            pipe.send(attempt(work, job.index, job.item))


def _end_with_parent() -> None:
    """End this process when its parent ends. A killed parent cannot end its workers, and they would go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
