"""A lock, so that only one process at a time writes to a run directory.

The package ``filelock`` is not used, for two reasons. Its lock does not say who holds it, while the message here names
process, host and time. And on network file systems the lock of one host may be invisible to others, while this file is
visible to all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from editcore._util.files import write_text
from editcore.interfaces.errors import RunError, StorageError

__all__ = ["LOCK_NAME", "locked", "refuse_held"]

_log = logging.getLogger(__name__)

LOCK_NAME = "run.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """The process that holds a lock."""

    pid: Annotated[int, Field(gt=0)]
    host: str
    started: int | None
    """When the process began, in the kernel's ticks, which distinguishes it from a later process with the same number;
    ``None`` if the system does not tell."""
    since: str
    token: str
    """Distinguishes two locks of one process."""

    @classmethod
    def this_process(cls) -> _Holder:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            started=_started(os.getpid()),
            since=now,
            token=secrets.token_hex(8),
        )

    @classmethod
    def read(cls, path: Path) -> _Holder | None:
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is not a lock that editcore wrote. Remove it if nothing writes there.") from error

    def is_alive(self) -> bool:
        """Whether it runs, or may run, because a process of another host cannot be checked."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # somebody else's process
            pass
        started = _started(self.pid)
        return self.started is None or started is None or started == self.started


def _started(pid: int) -> int | None:
    """Field 22 of ``/proc/PID/stat``; 0 for a process that has ended but has not been waited for (a zombie)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if state == "Z" else int(fields[18])


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a run directory inside the block. The directory is made if it is not there, and removed if it is empty
    afterwards.

    The lock of a process that has ended is taken over, with a note in the log.

    Raises:
        RunError: another process holds the lock, or may hold it.
        StorageError: the directory cannot be written to.
    """
    path = directory / LOCK_NAME
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot make {directory}: {error.strerror}.") from error
    me = _Holder.this_process()
    try:
        try:
            with _system_lock(directory):
                _take(path, me)
            yield
        finally:
            if _Holder.read(path) == me:
                path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # not empty: there is a run
            for folder in made:
                folder.rmdir()


def refuse_held(directory: Path) -> None:
    """Refuse a directory that another process has locked.

    Raises:
        RunError: another process holds the lock, or may hold it.
    """
    _ended_holder(directory / LOCK_NAME)


def _ended_holder(path: Path) -> _Holder | None:
    """The process that has ended and left a lock; ``None`` if there is no lock.

    Raises:
        RunError: the process still runs, or may run.
    """
    holder = _Holder.read(path)
    if holder is not None and holder.is_alive():
        here = holder.host == socket.gethostname()
        where, else_ = ("", "") if here else (f" on {holder.host}", f" If it has ended there, remove {path}.")
        raise RunError(
            f"{path.parent} is in use by process {holder.pid}{where} since {holder.since}, which writes it. Wait for "
            f"it, end it, or give another directory.{else_}"
        )
    return holder


def _take(path: Path, me: _Holder) -> None:
    holder = _ended_holder(path)
    if holder is not None:
        _log.warning("%s: process %d has ended without releasing the lock; it is taken over.", path, holder.pid)
    write_text(path, json.dumps(asdict(me)) + "\n")


@contextmanager
def _system_lock(directory: Path) -> Iterator[None]:
    """Keep other processes from taking the lock inside the block.

    Two processes must not both take over the lock of a third one that has ended. This uses the system's own lock on the
    folder, which ends with its process. If the system has none, nothing is locked; the block is short.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without it
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
