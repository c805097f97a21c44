"""One sweep on two workers of this machine and on two of a Ray cluster, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the package ray is not installed")

from editcore import Plugins
from editcore.testing import tiny_model, tiny_requests

if "emmet" not in Plugins.load().editors():
    pytest.skip("needs an editor to run: edit-emmet is not installed", allow_module_level=True)

SWEEP = """
seeds = [0, 1]

[base]
editor = "emmet"
model = "{folder}/tiny"
dataset = "{folder}/facts.jsonl"
corpus = "{folder}/corpus.txt"
corpus_tokens = 2000
emmet.layers = [1]
emmet.context_templates = ["{{}}"]
emmet.v_num_grad_steps = 5

[grid]
batch_size = [1, 2, 6]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny_model().save(tmp_path / "tiny")
    others = tiny_requests(20)[-2:]
    facts = [
        {
            "case_id": number,
            "requested_rewrite": {
                "subject": request.subject,
                "prompt": request.prompt,
                "target_new": {"str": request.target_new},
                "target_true": {"str": request.target_true},
            },
            "paraphrase_prompts": [f"It is known that {request.text}"],
            "neighborhood_prompts": [request.prompt.replace("{}", other.subject) for other in others],
        }
        for number, request in enumerate(tiny_requests(12))
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    words = " ".join(request.text for request in tiny_requests(80))
    (tmp_path / "corpus.txt").write_text(words * 8, encoding="utf-8")
    path = tmp_path / "six.toml"
    path.write_text(SWEEP.format(folder=tmp_path), encoding="utf-8")
    return path


def test_the_table_is_the_same_and_a_killed_worker_costs_its_trial_another_attempt(
    cluster: str, file: Path, tmp_path: Path
) -> None:
    def sweep(name: str, *options: str) -> subprocess.Popen[str]:
        code = "from editcore.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, "sweep", str(file), "--out", str(tmp_path / name), *options],
            env={**os.environ, "EDITCORE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    local = sweep("local", "--workers", "2")
    _, said = local.communicate(timeout=600)
    assert local.returncode == 0, said
    on_ray = sweep("ray", "--executor", "ray", "--address", cluster, "--workers", "2")
    _kill_one(Path(os.environ["TMPDIR"]) / "editcore-trials" / "trials", on_ray)
    _, said = on_ray.communicate(timeout=600)
    assert on_ray.returncode == 0, said
    tables = [(tmp_path / name / "six" / "six.csv").read_bytes() for name in ("local", "ray")]
    assert tables[0] == tables[1]
    assert tables[0].count(b"finished") == 6
    assert said.count("again, its worker was lost") == 1, said
    assert said.count(": running") == 6
    # Sent home whole: what every command reads, and nothing left behind.
    for run in (tmp_path / "ray" / "trials").iterdir():
        assert {"run.json", "ledger.jsonl", "results.parquet", "summary.json", "deltas"} <= {
            path.name for path in run.iterdir()
        }


def _kill_one(trials: Path, process: subprocess.Popen[str]) -> None:
    """Kill the worker of a trial that has a batch behind it."""
    while True:
        assert process.poll() is None
        for log in trials.glob("*/batches.jsonl"):
            try:
                worker = json.loads((log.parent / "run.lock").read_text())["pid"]
            except (OSError, ValueError):
                continue  # it has ended
            os.kill(worker, signal.SIGKILL)
            return
        time.sleep(0.005)
