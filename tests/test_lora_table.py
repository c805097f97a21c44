"""The tool that measures adapters: every row once, also when it is started again."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("lora_table", ROOT / "tools" / "lora_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lora_table"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_rows_are_measured_once_and_the_exact_adapter_is_raw(
    tool: ModuleType,
    tiny_folder: Path,
    tiny_facts: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    settings = ["layers=[1]", "v_num_grad_steps=4", 'context_templates=["{}"]']
    arguments = [
        "--model", str(tiny_folder), "--dataset", str(tiny_facts), "--edits", "6", "--batch-size", "2",
        "--checkpoints", "3,6", "--ranks", "2,4", "--prompts", "10", "--corpus", str(tiny_corpus),
        "--corpus-tokens", "1024", "--sample", "4", "--out", str(out),
        *(part for setting in settings for part in ("--set", setting)),
    ]  # fmt: skip
    assert tool.main([*arguments, "--checkpoints", "3"]) == 0
    assert tool.main(arguments) == 0
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(int(row["edits"]), row["form"], int(row["rank"])) for row in rows]
    assert found == [
        (3, "none", 0), (3, "raw", 0), (3, "lora", 3), (3, "frobenius", 2), (3, "weighted", 2),
        (6, "none", 0), (6, "raw", 0), (6, "lora", 6), (6, "frobenius", 2), (6, "weighted", 2),
        (6, "frobenius", 4), (6, "weighted", 4),
    ]  # fmt: skip
    assert [int(row["facts"]) for row in rows] == [3] * 5 + [6, 6, 6, 4, 4, 4, 4]
    by_form = dict(zip(found, rows, strict=True))
    for edits in (3, 6):
        raw, exact = by_form[edits, "raw", 0], by_form[edits, "lora", edits]
        assert [raw[name] for name in ("ES", "PS", "NS")] == [exact[name] for name in ("ES", "PS", "NS")]
        assert float(exact["logits_off"]) <= 1e-3
        assert float(by_form[edits, "none", 0]["logits_off"]) > 0.1
        cut = by_form[edits, "weighted", 2]
        assert float(cut["kept_text"]) >= float(by_form[edits, "frobenius", 2]["kept_text"])
        assert float(cut["logits_off"]) > 1e-3
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert len(markdown.splitlines()) == 2 + len(rows)
    capsys.readouterr()
    assert tool.main(arguments) == 0
    assert "edits," not in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_sentence(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--editor", "emmett", "--out", "nowhere"]) == 2
    assert "Did you mean 'emmet'?" in capsys.readouterr().err
