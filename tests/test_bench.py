"""The benchmark's plain loop, which editcore's speed and answers are held against, and the figures it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from editcore import EditSession, LanguageModel, SessionConfig
from editcore.testing import tiny_model, tiny_requests

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_the_plain_loop_writes_what_emmet_writes(layers: tuple[int, ...], tiny_corpus: Path) -> None:
    from bench_oracle import PlainLoop

    settings = {
        "layers": layers, "v_num_grad_steps": 6, "v_stop_loss": 0.0, "v_lr": 0.1,
        "context_templates": ("{}", "I said so. {}", "The old story. {}"),
    }  # fmt: skip
    model = tiny_model("llama")
    names = [model.layout.weight_name(layer) for layer in layers]
    base = {name: model.weight(name).detach().clone() for name in names}
    requests = tiny_requests(4)
    session = EditSession.open(
        model, SessionConfig(editor="emmet", settings={"emmet": settings}, corpus=str(tiny_corpus), corpus_tokens=1024)
    )
    moments = session.context.statistics.moments(layers)
    session.edit(requests)
    ours = {name: model.weight(name).detach() - base[name] for name in names}
    session.close()
    for name in names:
        model.weight(name).data.copy_(base[name])
    loop = PlainLoop(
        model, session.settings["emmet"], templates=settings["context_templates"], moments=moments, ridge=0.0
    )
    batch = loop.edit(requests)
    assert set(batch.seconds) == {"targets", "keys", "solve"}
    for name in names:
        plain = model.weight(name).detach() - base[name]
        assert plain.norm() > 0.01
        assert (plain - ours[name]).norm() <= 2e-3 * plain.norm()


def test_its_figures(tiny_folder: Path, tiny_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench

    file = tmp_path / "bench.json"
    options = ["--model", tiny_folder, "--dataset", tiny_facts, "--edits", 3, "--plain-edits", 2, "--json", file]
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, options), "--ladder", "--curve", "1", "3", "--solve"])
    monkeypatch.setattr(bench, "SOLVES", (1, 10))
    load, loaded = LanguageModel.load, []
    monkeypatch.setattr(LanguageModel, "load", lambda *given, **more: loaded.append(load(*given, **more)) or loaded[0])
    bench.main()
    [model] = loaded
    assert model.fingerprint() == load(str(tiny_folder)).fingerprint(), "each way starts from the unedited model"
    found = json.loads(file.read_text())
    assert [mode["name"] for mode in found["modes"]] == ["plain", "exact", "default"]
    assert [mode["edits"] for mode in found["modes"]] == [2, 3, 3]
    for mode in found["modes"]:
        assert {"ES", "PS", "NS", "score"} <= mode["scores"].keys()
        assert "facts_said" not in mode["scores"], "free generation would take time that is not compared with before"
    assert found["min_cosine"] >= 0.9999
    plain, exact, default = (mode["seconds_per_fact"] for mode in found["modes"])
    assert found["ratio_exact"] == pytest.approx(plain / exact)
    assert found["ratio_default"] == pytest.approx(plain / default)
    steps = {mode["name"]: mode["mean_steps"] for mode in found["modes"]}
    assert steps["plain"] == steps["exact"] == bench.EXACT["v_num_grad_steps"] - 1
    assert [rung["name"] for rung in found["ladder"]] == [
        "needed logits only", "facts side by side", "cached prefixes", *(name for name, _ in bench.LADDER)
    ]  # fmt: skip
    assert [row["edits"] for row in found["curve"]] == [1, 3]
    assert [row["keys"] for row in found["solve"]] == [1, 10]
    pictures = list(tmp_path.glob("*.png"))
    assert {picture.name for picture in pictures} == {"bench.png", "bench-curve.png", "bench-solve.png"}
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_what_evaluation_costs(tiny_folder: Path, tiny_facts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import evaluation_cost

    options = ["--model", tiny_folder, "--dataset", tiny_facts, "--records", 2, "--prompts", 3, "--tokens", 2]
    evaluation_cost.main(list(map(str, options)))
    scored, written = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[-2:]]
    names = ("texts", "passes", "tokens", "logits")
    figures = [dict(zip(names, map(int, row[1:5]), strict=True)) for row in (scored, written)]
    assert figures[0]["texts"] < figures[0]["tokens"]
    assert figures[1] == {"texts": 3, "passes": 2, "tokens": figures[1]["tokens"], "logits": 6}
    assert figures[1]["tokens"] > 3 + 3 * 2, "prompts, and the first of two new tokens"
