"""The tool that measures what many edits in sequence leave of each other."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_row_at_each_checkpoint_and_all_facts_at_the_end(
    tiny_folder: Path,
    tiny_facts: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("replay_table", ROOT / "tools" / "replay_table.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    settings = ["layers=[1]", "v_num_grad_steps=3", 'context_templates=["{}"]', "replay.replay_rate=1"]
    tool.main(
        [
            "--model", str(tiny_folder), "--dataset", str(tiny_facts), "--edits", "6", "--batch-size", "2",
            "--checkpoint", "4", "--each", "2", "--plugin", "replay", "--text", str(tiny_corpus),
            "--corpus", str(tiny_corpus), "--corpus-tokens", "1024", "--text-tokens", "200",
            *(part for one in settings for part in ("--set", one)),
        ]
    )  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:6] == ["edits", "ES", "PS", "NS", "NS before", "perplexity"]
    assert [row[0] for row in rows[2:]] == ["4", "6"]
    for row in rows[2:]:
        assert all(0 <= float(cell) <= 100 for cell in row[1:5])
        assert float(row[5]) > 0
    assert "'size': 6" in rows[-1][-1]
    assert "'hits': 4" in rows[-1][-1], "two of the first batch in the second, two of four in the third"
