"""``tools/same_bits.py`` finds a changed bit wherever a run keeps one, and takes a new field for no difference."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_bits", ROOT / "tools" / "same_bits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["same_bits"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def a_run(folder: Path, *, weight: float = 1.0, scale: float = 1.0, score: float = 2.0, **fields: object) -> Path:
    folder.mkdir()
    save_file({"w": torch.tensor([weight, float("nan")])}, folder / "model.safetensors")
    line = {"kind": "batch", "scale": scale, "seconds": torch.rand(1).item(), **fields}
    (folder / "ledger.jsonl").write_text(f"0123456789abcdef {json.dumps(line)}\n", encoding="utf-8")
    pd.DataFrame({"metric": ["EM", "ES"], "value": [score, None]}).to_parquet(folder / "results.parquet")
    return folder


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({}, None),
        ({"weight": 1.0 + 2**-23}, "model.safetensors: w"),
        ({"scale": 0.5}, "ledger.jsonl [0]: scale: 1.0 became 0.5"),
        ({"score": 2.0000001}, "results.parquet: value [0]"),
        ({"more": 1}, None),
    ],
)
def test_a_changed_bit_is_found(tool: ModuleType, tmp_path: Path, change: dict[str, float], where: str | None) -> None:
    findings = tool.Findings()
    tool._compare(a_run(tmp_path / "old"), a_run(tmp_path / "new", **change), findings)  # type: ignore[arg-type]
    assert findings.compared > 3
    assert len(findings.differences) == (where is not None)
    assert where is None or where in findings.differences[0]
    assert findings.one_sided == (["ledger.jsonl: more is a field of NEW"] if "more" in change else [])


def test_a_missing_file_is_told(tool: ModuleType, tmp_path: Path) -> None:
    findings = tool.Findings()
    old, new = a_run(tmp_path / "old"), a_run(tmp_path / "new")
    (new / "results.parquet").unlink()
    tool._compare(old, new, findings)
    assert findings.one_sided == ["new/results.parquet is a file of OLD"]


def test_results_in_two_formats_are_told(tool: ModuleType, tmp_path: Path) -> None:
    """Before there was a row per observation, a table had a row per fact and kind of prompt."""
    findings = tool.Findings()
    old, new = a_run(tmp_path / "old"), a_run(tmp_path / "new")
    pd.DataFrame({"kind": ["rewrite"], "nll_new": [2.0]}).to_parquet(old / "results.parquet")
    tool._compare(old, new, findings)
    assert findings.differences == []
    assert findings.one_sided == [
        "new/results.parquet has a row per observation in NEW alone: its values are not compared"
    ]


def test_a_case_that_is_not_there_is_refused(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(["old", "new", "--tiny-only", "--case", "trust"])
    assert end.value.code == 2
    assert "There is no case 'trust'. There are: gpt2: rome; " in capsys.readouterr().err
