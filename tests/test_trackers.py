"""The tracker of the documentation is run, and what it wrote is read back."""

from __future__ import annotations

import importlib.metadata
import re
import struct
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from editcore import EditSession, FactRecord, Plugins, SessionConfig
from editcore.testing import tiny_model, tiny_requests

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "plugins" / "trackers.md").read_text(encoding="utf-8")


def code() -> tuple[str, str]:
    """Name and text of the page's one file."""
    [(name, text)] = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return name, text


def events(folder: Path) -> list[Any]:
    """The records of an event file: a length, its checksum, the message and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    [path] = folder.iterdir()
    raw, found = path.read_bytes(), []
    while raw:
        (size,) = struct.unpack("<Q", raw[:8])
        found.append(Event.FromString(raw[12 : 12 + size]))
        raw = raw[12 + size + 4 :]
    return found


def test_the_tracker_is_short() -> None:
    _, text = code()
    body = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("@hookimpl")]
    assert len(body) <= 20


def test_the_tracker_writes_what_tensorboard_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    name, text = code()
    (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    announced = EntryPoint("tensorboard", name.removesuffix(".py"), "editcore")
    session = EditSession.open(
        tiny_model(),
        SessionConfig(
            editor="emmet",
            plugins=["tensorboard"],
            settings={"emmet": {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 2}},
            corpus_tokens=200,
        ),
        directory=tmp_path / "run",
        registry=Plugins.load(entry_points=[*importlib.metadata.entry_points(group="editcore"), announced]),
    )
    records = [FactRecord(request=request) for request in tiny_requests(4)]
    session.edit([record.request for record in records], batch_size=2)
    measured = session.evaluate(records).summary.values()
    session.finish()
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in events(tmp_path / "run" / "tensorboard")
        for value in event.summary.value
    }
    for entry in session.ledger.batches:
        assert scalars["batch/seconds", entry.batch] > 0
        for diagnostic, number in entry.diagnostics.items():
            assert scalars[f"batch/{diagnostic}", entry.batch] == pytest.approx(number)
    assert {"ES", "rewrite_acc", "rewrite_nll_new", "facts_said"} <= measured.keys()
    for metric, value in measured.items():
        assert scalars[f"scores/{metric}", 4] == pytest.approx(value)
