"""One process at a time writes to a run directory."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from editcore import RunError, StorageError
from editcore._util.lock import LOCK_NAME, locked
from editcore.runs.resume import refuse_used

HOLD = "import sys; from pathlib import Path; from editcore._util.lock import locked\nwith locked(Path(sys.argv[1])): "
HOLD += "print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds ``tmp_path / "run"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_was_first(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = rf"run is in use by process {holder.pid} since 20.*, which writes it\. Wait for it"
    with pytest.raises(RunError, match=said), locked(run):
        pass
    for name in ("other", "run.json", "summary.json"):
        (run / name).write_text("{}")
        with pytest.raises(RunError, match=said) as refused:
            refuse_used(run)
        assert "remove" not in str(refused.value), "it would be removed under the hands of its process"
    for name in ("other", "run.json", "summary.json"):
        (run / name).unlink()
    assert (run / LOCK_NAME).exists(), "the first one's lock was removed"
    holder.communicate("")
    assert not run.exists(), "it had to be made, and nothing is in it"
    with locked(run):
        assert (run / LOCK_NAME).exists()


def test_the_lock_of_a_killed_process_is_taken_over(
    holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    os.kill(holder.pid, signal.SIGKILL)
    # Not asked for its exit code yet, so that its number is still there.
    with caplog.at_level(logging.WARNING):
        while True:
            try:
                with locked(run):
                    break
            except RunError:
                continue
    assert f"process {holder.pid} has ended without releasing the lock; it is taken over." in caplog.text
    holder.communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process began")
def test_a_later_process_with_the_same_number_is_another_one(tmp_path: Path) -> None:
    lock = {"pid": os.getpid(), "host": socket.gethostname(), "started": 1, "since": "2026-01-01", "token": ""}
    (tmp_path / LOCK_NAME).write_text(json.dumps(lock))
    with locked(tmp_path):
        held = json.loads((tmp_path / LOCK_NAME).read_text())
        assert (held["pid"], held["started"] > 1) == (os.getpid(), True)


def test_another_hosts_process_may_be_alive(tmp_path: Path) -> None:
    lock = {"pid": 1, "host": "elsewhere", "started": 1, "since": "2026-01-01", "token": ""}
    (tmp_path / LOCK_NAME).write_text(json.dumps(lock))
    said = r"in use by process 1 on elsewhere since 2026.*has ended there, remove .*run\.lock"
    with pytest.raises(RunError, match=said), locked(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK_NAME).read_text()) == lock


def test_a_process_does_not_hold_twice(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
            pass
        assert (tmp_path / LOCK_NAME).exists()
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": -1, "host": "a", "started": null, "since": "", "token": ""}']
)
def test_a_file_that_is_no_lock_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with pytest.raises(RunError, match=r"run\.lock is not a lock that editcore wrote\. Remove it"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_NAME).read_text() == content


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"Cannot make .*file/run: Not a directory\."),
        locked(tmp_path / "file" / "run"),
    ):
        pass
