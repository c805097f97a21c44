"""The page about a model in use, command by command, on the default model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from editcore.ledger.ledger import Ledger
from editcore.models.catalogue import DEFAULT_MODEL, local_path

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "keep-a-model-current.md"
QUICKER = {"check": ["--neighbours", "20", "--text-tokens", "256"]}
"""Options that a command gets beside those on the page, so that it takes less time."""


@pytest.mark.skipif(local_path(DEFAULT_MODEL) is None, reason=f"{DEFAULT_MODEL} is not here: editctl models pull")
def test_every_command_of_the_page_works(
    editctl_with_model: Callable[..., SimpleNamespace],
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    [table] = re.findall(r"```csv\n(.*?)```", page, re.DOTALL)
    Path("facts.csv").write_text(table, encoding="utf-8")
    commands = [line for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    said: dict[str, str] = {}
    for line in commands:
        command, *arguments = shlex.split(line.removeprefix("$ editctl "))
        if line == "$ editctl check RUN":  # the same with limits follows
            continue
        done = editctl_with_model(command, *arguments, *QUICKER.get(command, []))
        assert done.code == 0, (line, done.out, done.err)
        said[line] = done.out
    ledger = Ledger.read("RUN")
    now = {request.text: request.target_new for request in ledger.facts()}
    assert len(now) == 5
    assert now["Mount Etna is a volcano in"] == "Italy"
    [check] = [json.loads(out) for line, out in said.items() if line.startswith("$ editctl check")]
    assert (check["facts"], check["lost"], check["neighbours"]) == (5, [], 20)
    assert 0.9 < check["perplexity_ratio"] < 1.05
    [corrected] = [out for line, out in said.items() if "Italy" in line and "--dry-run" in line]
    assert "Corrections of active facts" in corrected
    [log] = [out for line, out in said.items() if line == "$ editctl log RUN"]
    assert log.count("wrote batch") == 5
    assert "asked by support" in log
    assert [type(event).__name__ for event in ledger.events[-4:]] == ["UndoLine"] * 4
    assert ledger.events[-4].signature.note == "was about somebody else"
    assert [event.as_if_never for event in ledger.events[-4:]] == [False, False, True, False]
