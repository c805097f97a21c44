"""The tracker jsonl: a line per event, whole and once, whatever ends the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from editcore import EditSession, HParamsError, SessionConfig, StorageError
from editcore.testing import tiny_requests

Call = Callable[..., SimpleNamespace]

pytestmark = pytest.mark.usefixtures("toys", "plain_pictures")


@pytest.fixture
def open_session(small: Path, corpus_file: Path) -> Callable[..., EditSession]:
    """A session of the toy editor with the tracker; settings of the tracker may be given."""

    def call(directory: Path | None, **settings: str) -> EditSession:
        return EditSession.open(
            str(small),
            SessionConfig(
                editor="toy",
                plugins=["jsonl"],
                settings={"jsonl": settings},
                corpus=str(corpus_file),
                corpus_tokens=2000,
            ),
            directory=directory,
        )

    return call


def read(path: Path) -> list[dict[str, Any]]:
    """The lines, each of them JSON without the numbers that JSON has not."""

    def refuse(name: str) -> Any:
        pytest.fail(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_leaves_a_line_per_event(
    editctl: Call, small: Path, facts: Path, corpus_file: Path, tmp_path: Path
) -> None:
    options = ["--model", small, "--dataset", facts, "--corpus", corpus_file, "--corpus-tokens", 2000]
    options += ["--batch-size", 2, "--edits", 4, "--out", tmp_path / "out"]
    done = editctl("run", "--editor", "toy", "--plugin", "jsonl", "--plugin", "gate", *options, "--set", "gate.batch=1")
    assert done.code == 0, done.err
    found = read(tmp_path / "out" / "events.jsonl")
    assert [(line["event"], line.get("batch", line.get("phase"))) for line in found] == [
        ("before_run", None),
        ("after_evaluation", "before"),
        ("before_batch", 0),
        ("before_apply", 0),
        ("after_batch", 0),
        ("before_batch", 1),
        ("before_apply", 1),  # the gate rejects it
        ("after_evaluation", "after"),
        ("after_run", None),
    ]
    assert found[0]["resumed"] is False
    assert found[2]["new"] == found[4]["new"] == ["0", "1"]
    assert found[4]["seconds"] > 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert found[-2]["scores"] == {key: value for key, value in summary["after"].items() if value is not None}
    assert found[1]["scores"] == {key: value for key, value in summary["before"].items() if value is not None}
    assert {"ES", "score", "facts_said"} <= found[-2]["scores"].keys()
    assert found[-1]["num_edits"] == summary["edits"] == 2


def test_a_resumed_run_goes_on_behind_a_marker(open_session: Callable[..., EditSession], tmp_path: Path) -> None:
    """Killed when batch 1 was in the ledger and its line half written: the line is made up, nothing is there twice."""
    requests = tiny_requests(6)
    open_session(tmp_path / "run").edit(requests[:4], batch_size=2)
    path = tmp_path / "run" / "events.jsonl"
    *kept, last = path.read_bytes().splitlines(keepends=True)
    assert json.loads(last)["event"] == "after_batch"
    path.write_bytes(b"".join(kept) + last[:20])
    open_session(tmp_path / "run").edit(requests[4:], batch_size=2)
    found = read(path)
    batches = [(line["event"], line["batch"]) for line in found if "batch" in line]
    assert batches == [(event, n) for n in range(3) for event in ("before_batch", "before_apply", "after_batch")]
    places = {(line["event"], line.get("batch")): line for line in found}
    marker = [number for number, line in enumerate(found) if line["event"] == "before_run"]
    assert [found[number]["resumed"] for number in marker] == [False, True]
    assert found[marker[1]]["num_edits"] == 4
    assert found[marker[1] + 1] == places["after_batch", 1]
    assert places["after_batch", 1]["new"] == [request.id for request in requests[2:4]]
    assert places["after_batch", 1]["seconds"] is None
    assert places["after_batch", 2]["seconds"] > 0


def test_a_session_in_which_nothing_happens_leaves_no_line(
    open_session: Callable[..., EditSession], tmp_path: Path
) -> None:
    requests = tiny_requests(2)
    open_session(tmp_path / "run").edit(requests)
    content = (tmp_path / "run" / "events.jsonl").read_bytes()
    session = open_session(tmp_path / "run")
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == content
    session.undo(requests[0].id)
    marker, undone = read(tmp_path / "run" / "events.jsonl")[-2:]
    assert (marker["event"], marker["resumed"]) == ("before_run", True)
    assert (undone["event"], undone["undone"], undone["num_edits"]) == ("after_undo", [requests[0].id], 1)


def test_two_runs_may_share_a_file(open_session: Callable[..., EditSession], tmp_path: Path) -> None:
    for name in ("a", "b"):
        open_session(tmp_path / name, path=str(tmp_path / "all.jsonl")).edit(tiny_requests(2))
    found = [line["event"] for line in read(tmp_path / "all.jsonl")]
    assert found == ["before_run", "before_batch", "before_apply", "after_batch"] * 2
    assert not (tmp_path / "a" / "events.jsonl").exists()


def test_a_session_in_memory_needs_a_path(open_session: Callable[..., EditSession], tmp_path: Path) -> None:
    with pytest.raises(HParamsError, match=r"no run directory to write to; name a file with the setting path"):
        open_session(None)
    open_session(None, path=str(tmp_path / "memory.jsonl")).edit(tiny_requests(2))
    assert len(read(tmp_path / "memory.jsonl")) == 4


def test_a_file_that_cannot_be_written_is_named(open_session: Callable[..., EditSession], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"jsonl: cannot write .*: Is a directory\."):
        open_session(tmp_path / "run", path=str(tmp_path))
