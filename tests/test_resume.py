"""Whatever ends a run, resuming it leaves what an uninterrupted run leaves, but for times."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from edit_emmet.editor import EmmetEditor
from editcore import Plugins, RunError
from editcore.cli import main
from editcore.ledger.ledger import Ledger
from editcore.runs.job import RunOptions, run
from editcore.runs.record import RunRecord
from editcore.runs.reopening import open_run

ROOT = Path(__file__).resolve().parent.parent
Call = Callable[..., SimpleNamespace]
Contents = Callable[[Path], dict[str, object]]


@pytest.fixture(scope="module")
def options(tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path) -> list[object]:
    """A run of four facts in two batches, with replay by priority and a checkpoint between them."""
    return [
        "run", "--editor", "emmet", "--plugin", "replay", "--model", tiny_folder, "--dataset", tiny_facts,
        "--corpus", tiny_corpus, "--corpus-tokens", 2000, "--edits", 4, "--batch-size", 2,
        "--eval-every", 2, "--eval-sample", 1, "--eval-text", tiny_corpus,
        "--set", "layers=[1]", "--set", "v_num_grad_steps=2", "--set", "context_count=1", "--set", "context_length=2",
        "--set", "replay.replay_strategy=priority", "--set", "replay.replay_eviction=lru",
        "--set", "replay.replay_buffer_size=3", "--set", "generation.answer_tokens=3",
        "--set", "generation.continuation_tokens=6",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """Runs ``editctl`` for all tests of this module; gives its exit code."""
    cache = tmp_path_factory.mktemp("cache")

    def call(*arguments: object) -> int:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            patch.setenv("EDITCORE_CACHE", str(cache))
            patch.setattr(sys, "argv", ["editctl", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0)

    return call


@pytest.fixture(scope="module")
def whole(
    once: Callable[..., int], options: list[object], tmp_path_factory: pytest.TempPathFactory, everything: Contents
) -> dict[str, object]:
    """What a run leaves that nothing ended."""
    directory = tmp_path_factory.mktemp("whole") / "out"
    assert once(*options, "--out", directory) == 0
    return everything(directory)


@pytest.fixture(scope="module")
def everything(contents: Contents) -> Contents:
    """Every file of a run without the times in it, and the weights."""

    def read(directory: Path) -> dict[str, object]:
        edited, _ = open_run(directory)
        return {"weights": edited.model.fingerprint(), **contents(directory)}

    return read


def interrupt_the_second_batch(patch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does while it is solved."""
    propose = EmmetEditor.propose

    def interrupted(self: EmmetEditor, model: Any, batch: Any, context: Any) -> Any:
        if batch.index == 1:
            raise KeyboardInterrupt
        return propose(self, model, batch, context)

    patch.setattr(EmmetEditor, "propose", interrupted)


@pytest.fixture(scope="module")
def stopped_once(once: Callable[..., int], options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended after its first batch."""
    directory = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_the_second_batch(patch)
        assert once(*options, "--out", directory) == 130
    return directory


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to be resumed."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


class Syncs:
    """Stands for ``os.fsync``, which a run calls for whatever must last, and does something else at one call."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.calls, self._act, self._real = 0, act, os.fsync
        self._at: int | None = at
        patch.setattr(os, "fsync", self)

    def at_every_call(self, act: Callable[[], None]) -> None:
        """Do this at every one."""
        self._at, self._act = None, act

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self._at in (None, self.calls):
            self._act()
        self._real(handle)


@pytest.fixture
def plainly_whole(
    editctl: Call,
    options: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    everything: Contents,
    plain_pictures: None,
) -> tuple[dict[str, object], int]:
    """What an uninterrupted run leaves whose pictures are not drawn, and how many durable writes it makes."""
    assert editctl(*options, "--out", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:  # the second moments are in the cache by now
        syncs = Syncs(patch, 0, lambda: None)
        assert editctl(*options, "--out", tmp_path / "counted").code == 0
    assert syncs.calls > 20
    return everything(tmp_path / "whole"), syncs.calls


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_dies_between_any_two_durable_writes(
    editctl: Call,
    options: list[object],
    plainly_whole: tuple[dict[str, object], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    everything: Contents,
) -> None:
    """A process that dies leaves what is on the disk at that moment, without any clean-up, and a lock with the number
    of a process that is no more. A child keeps a copy of that at each call in turn; then each copy is resumed."""
    whole, calls = plainly_whole
    child = os.fork()
    if not child:
        out, met = tmp_path / "child", Syncs(monkeypatch, 0, lambda: None)

        def keep() -> None:
            if out.exists():
                shutil.copytree(out, tmp_path / f"at-{met.calls}")

        met.at_every_call(keep)
        editctl(*options, "--out", out)
        os._exit(77)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
    lines: list[bytes] = []
    for at in range(1, calls + 1):
        out = tmp_path / f"at-{at}"
        assert out.exists(), f"call {at} was not reached"
        before = (out / "ledger.jsonl").read_bytes() if (out / "ledger.jsonl").exists() else b""
        done = editctl(*options, "--out", out, "--resume")
        assert done.code == 0, f"call {at}: {done.err}"
        assert_same(everything(out), whole)
        complete = before[: before.rfind(b"\n") + 1]
        assert (out / "ledger.jsonl").read_bytes().startswith(complete)
        lines.append(complete)
    assert len({len(line) for line in lines}) == 3, "no batch, one batch and two batches were met"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_at_any_durable_write(
    editctl: Call,
    options: list[object],
    plainly_whole: tuple[dict[str, object], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    everything: Contents,
) -> None:
    whole, calls = plainly_whole

    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    for at in range(1, calls, 6) if number == errno.ENOSPC else (2, 11):
        out = tmp_path / f"at-{at}"
        with monkeypatch.context() as patch:
            Syncs(patch, at, refuse)
            done = editctl(*options, "--out", out)
        assert done.code == 2
        [sentence] = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        assert os.strerror(number) in sentence
        assert "Traceback" not in done.err
        assert not [path for path in out.rglob(".*") if path.is_file()]
        if (out / "run.json").exists():
            assert f"go on with: editctl run --resume --out {out}" in done.err
        again = editctl(*options, "--out", out, "--resume")
        assert again.code == 0, f"call {at}: {again.err}"
        assert_same(everything(out), whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room; ``mount -o remount`` changes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", disk):
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def mount(*arguments: object) -> bool:
    try:
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0
    except OSError:
        return False


def test_a_disk_that_is_really_full_and_then_read_only(
    editctl: Call, options: list[object], whole: dict[str, object], small_disk: Path, everything: Contents
) -> None:
    out, sentences = small_disk / "out", []
    for size in range(64, 1024, 32):
        assert mount("-o", f"remount,size={size}k", small_disk)
        done = editctl(*options, "--out", out, "--resume")
        if done.code == 0:
            break
        sentences += [line for line in done.err.splitlines() if line.startswith("Error: ")]
        assert (done.code, "Traceback" in done.err) == (2, False)
    assert_same(everything(out), whole)
    assert len(sentences) > 1
    assert all(sentence.startswith("Error: Cannot write ") for sentence in sentences)
    assert all("No space left on device" in sentence for sentence in sentences)
    assert mount("-o", "remount,ro", small_disk)
    done = editctl("ledger", out, "undo", "0")
    assert (done.code, done.err) == (2, f"Error: Cannot write {out / 'run.lock'}: Read-only file system.\n")
    assert editctl("ledger", out, "verify").code == 0


def test_ctrl_c_says_how_to_go_on(
    editctl: Call,
    options: list[object],
    whole: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    everything: Contents,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_the_second_batch(patch)
        done = editctl(*options, "--out", out)
    assert done.code == 130
    assert done.err.endswith(f"Interrupted. What is written stays; go on with: editctl run --resume --out {out}\n")
    assert len(Ledger.read(out).entries) == 1
    assert not (out / "run.lock").exists()
    assert editctl("run", "--resume", "--out", out).code == 0
    assert_same(everything(out), whole)


def test_ctrl_c_waits_for_a_batch_that_is_being_written(
    editctl: Call,
    options: list[object],
    whole: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    everything: Contents,
) -> None:
    out = tmp_path / "out"
    append = Ledger.append

    def pressed(self: Ledger, entry: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return append(self, entry)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "append", pressed)
            assert editctl(*options, "--out", out).code == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert [entry.batch for entry in Ledger.read(out).entries] == [0]
    assert editctl("run", "--resume", "--out", out).code == 0
    assert_same(everything(out), whole)


def test_ctrl_c_before_anything_is_written_leaves_nothing(
    editctl: Call, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EmmetEditor, "prepare", interrupted)
    done = editctl(*options, "--out", tmp_path / "deep" / "out")
    assert (done.code, done.err.splitlines()[-1]) == (130, "Interrupted before anything was written.")
    assert not (tmp_path / "deep").exists()


def test_checkpoints_that_were_measured_are_not_measured_again(editctl: Call, stopped: Path) -> None:
    """What a checkpoint said before the run was ended stays to the letter."""
    out = stopped
    [seen] = json.loads((out / "forgetting.json").read_text())["checkpoints"]
    assert (seen["batch"], seen["num_edits"], seen["facts"]) == (0, 2, 1)
    rows = pd.read_parquet(out / "checkpoints" / "00000.parquet")
    assert editctl("run", "--resume", "--out", out).code == 0
    first, last = json.loads((out / "summary.json").read_text())["checkpoints"]
    assert first == seen  # its seconds, too
    assert (last["batch"], last["num_edits"], last["facts"]) == (1, 4, 4)
    table = pd.read_parquet(out / "checkpoints.parquet")
    pd.testing.assert_frame_equal(table[: len(rows)], rows, check_exact=True)


def test_a_damaged_table_of_checkpoints_is_said(editctl: Call, stopped: Path) -> None:
    (stopped / "checkpoints" / "00000.parquet").write_bytes(b"PAR1")
    done = editctl("run", "--resume", "--out", stopped)
    assert done.code == 2
    assert "A table of checkpoints in " in done.err
    assert "Remove forgetting.json to go on without the checkpoints so far." in done.err
    (stopped / "forgetting.json").unlink()
    assert editctl("run", "--resume", "--out", stopped).code == 0


# What resuming takes, and what it refuses


def test_everything_comes_from_the_run(
    editctl: Call, stopped: Path, whole: dict[str, object], tiny_facts: Path, tmp_path: Path, everything: Contents
) -> None:
    """The data file may have changed; what is given again and agrees is no error."""
    done = editctl(
        "run", "--resume", "--out", stopped, "--seed", 0, "--set", "v_num_grad_steps=2", "--plugin", "replay"
    )
    assert done.code == 0, done.err
    assert_same(everything(stopped), whole)
    again = editctl("run", "--resume", "--out", stopped)
    assert (again.code, again.out) == (0, f"The run in {stopped} is finished; there is nothing to resume.\n")
    same = editctl("run", "--resume", "--out", stopped, "--seed", 0, "--plugin", "replay")
    assert (same.code, same.out) == (again.code, again.out)
    # What a finished run does not have is not passed over in silence.
    other_facts = editctl("run", "--resume", "--out", stopped, "--dataset", tmp_path / "other.jsonl")
    assert (other_facts.code, other_facts.out) == (2, "")
    assert other_facts.err == (
        f"Error: --dataset: {tmp_path / 'other.jsonl'} was asked for, but the run in {stopped} has "
        f"{tiny_facts}. It is finished. 'editctl edit {stopped} --facts FILE' writes more facts into its model; for "
        "other settings, start a new run with another --out.\n"
    )
    with pytest.raises(RunError, match="is finished; there is nothing to resume"):
        run(RunRecord.read(stopped).config, stopped, RunOptions(plugins=Plugins.load(), resume=True))
    saved = editctl("run", "--resume", "--out", stopped, "--save", tmp_path / "model")
    assert saved.code == 2
    assert saved.err.startswith(f"Error: The run in {stopped} is finished; --save ")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--seed", 4), "--seed: 4 was asked for, but the run in "),
        (("--editor", "memit"), "--editor: memit was asked for, but the run in "),
        (("--edits", 3), "--edits: 3 was asked for, but the run in "),
        (("--eval-every", 3), "--eval-every: 3 was asked for, but the run in "),
        (("--set", "v_num_grad_steps=3"), "--set: {"),
        (("--backend", "lora"), "--backend: lora was asked for, but the run in "),
    ],
)
def test_what_contradicts_the_run_is_refused(
    editctl: Call, stopped: Path, option: tuple[object, ...], sentence: str
) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    done = editctl("run", "--resume", "--out", stopped, *option)
    assert done.code == 2
    assert done.err.startswith(f"Error: {sentence}"), "and no advice before it"
    assert "leave the option out, or start a new run with another --out" in done.err
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_what_resume_needs(editctl: Call, tmp_path: Path) -> None:
    done = editctl("run", "--resume")
    assert (done.code, done.err) == (2, "Error: --resume needs --out DIR, the directory of the run.\n")
    done = editctl("run", "--resume", "--out", tmp_path / "nothing")
    assert done.err == "Error: There is no run in --out that could be resumed, and no --editor to begin one with.\n"
    assert not (tmp_path / "nothing").exists()


def test_damage_is_said_before_anything_is_written(editctl: Call, stopped: Path) -> None:
    for name, sentence in (
        ("requests.jsonl", "is damaged"),
        ("before.json", "is damaged"),
        ("ledger.jsonl", "line 1: the checksum does not fit"),
        ("run.json", "is damaged"),
    ):
        content = (stopped / name).read_bytes()
        (stopped / name).write_bytes(b"x" + content[1:])
        done = editctl("run", "--resume", "--out", stopped)
        assert done.code == 2, name
        assert sentence in done.err
        (stopped / name).write_bytes(content)
    table = (stopped / "before.parquet").read_bytes()
    (stopped / "before.parquet").write_bytes(table[:-8])
    done = editctl("run", "--resume", "--out", stopped)
    assert (done.code, "before.json or before.parquet is damaged (" in done.err) == (2, True)
    assert "). Remove them to measure anew." in done.err
    assert len(Ledger.read(stopped).entries) == 1


def test_an_undo_in_between_is_kept(editctl: Call, stopped: Path) -> None:
    gone = Ledger.read(stopped).entries[0].new_ids[0]
    done = editctl("ledger", stopped, "undo", gone)
    assert done.code == 0, done.err
    assert editctl("run", "--resume", "--out", stopped).code == 0
    summary = json.loads((stopped / "summary.json").read_text())
    assert (summary["edits"], summary["rejected"], summary["averages"]["after"]["ES"]["facts"]) == (3, 0, 3)


# At random moments


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--kills", "4", "--batches", "3"]
    environment = {**os.environ, "EDITCORE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(tool, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 processes killed in ")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--single", "--kills", "5"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 processes killed while "), done.stdout
