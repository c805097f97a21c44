"""Run two commits on this machine and compare what they make: python tools/same_bits.py OLD NEW

OLD and NEW are commits, or folders with a checkout (``.`` for what is not committed yet). The packages of each are
installed into a folder of their own, and the same ``editctl`` commands are run with both: tiny models with every
editor, replay, trust, lora, undo and redo, then the default model with 8 facts. Weights, ledgers and scores are
compared bit by bit. What only one side has (a new field of a file) is listed and is no difference. So are tables of
results in two formats: a checkout from before there was a row per observation is compared by its summaries instead.

Nothing is compared with hashes from elsewhere: bits differ between processors. Exit code 0: no difference, 1: some.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from editcore.testing import tiny_model, tiny_requests
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
_MODEL = "smollm2-135m"
_LEDGER_NAME, _DELTAS = "ledger.jsonl", "deltas"
# Fields of a JSON file that differ from run to run.
_VARYING = {"seconds", "stages", "seconds_per_edit", "peak_memory_bytes", "time", "sha256", "size", "format"}


@dataclass(frozen=True)
class Case:
    """Commands that make a run, and what is taken out of it and put back afterwards."""

    name: str
    options: tuple[str, ...]
    undo: tuple[int, ...] = ()
    """Positions, in the data set, of the facts that are undone one by one; the first of them is redone at the end."""


_WORKER = """
import json, os, sys
answers, asked = os.fdopen(os.dup(1), "w"), sys.stdin
sys.stdin = open(os.devnull)
log = open(sys.argv[1], "w")
os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
from editcore.cli import main
for line in asked:
    sys.argv = ["editctl", *json.loads(line)]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print(code, file=answers, flush=True)
"""
"""Runs one ``editctl`` command after the other in one process, which spares each of them the imports."""


class Checkout:
    """One side of the comparison.

    Args:
        site: where its packages are installed.
        cache: its own, so that second moments are computed by both.
    """

    def __init__(self, name: str, site: Path, cache: Path) -> None:
        self.name, self.log = name, cache / "log"
        environment = {
            **os.environ,
            "PYTHONPATH": str(site),
            "EDITCORE_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-c", _WORKER, str(self.log)]
        self._worker = subprocess.Popen(
            command, env=environment, cwd=cache, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def editctl(self, *arguments: str | Path) -> None:
        """Run ``editctl`` of this side, or end with its output."""
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._worker.stdin.flush()
        answer = self._worker.stdout.readline().strip()
        if answer != "0":
            said = " ".join(map(str, arguments))
            raise SystemExit(
                f"{self.name}: editctl {said} ended with {answer or 'a crash'}\n{self.log.read_text()[-4000:]}"
            )

    def close(self) -> None:
        """End the process."""
        self._worker.kill()
        self._worker.communicate()


@dataclass
class Findings:
    """What differs, and what only one side has."""

    differences: list[str] = field(default_factory=list)
    one_sided: list[str] = field(default_factory=list)
    compared: int = 0

    def equal(self, where: str, old: object, new: object) -> None:
        """Note a difference of two plain values; two NaNs are equal."""
        self.compared += 1
        both_nan = isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new)
        if old != new and not both_nan:
            self.differences.append(f"{where}: {_short(old)} became {_short(new)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and return the exit code."""
    parser = argparse.ArgumentParser(prog="same_bits.py", description="Compare what two commits make, bit by bit.")
    parser.add_argument("old", metavar="OLD", help="a commit, or a folder with a checkout")
    parser.add_argument("new", metavar="NEW", help="another one")
    parser.add_argument("--tiny-only", action="store_true", help="leave the default model out")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case (may be repeated)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        folder = Path(name)
        materials = _materials(folder / "materials")
        every = {case.name: case for case in _cases(materials, tiny_only=given.tiny_only)}
        if unknown := sorted(set(given.case or ()) - set(every)):
            parser.error(f"There is no case '{unknown[0]}'. There are: {'; '.join(every)}.")
        cases = [every[name] for name in given.case or every]
        sides = [_install(given.old, folder / "old"), _install(given.new, folder / "new")]
        findings = Findings()
        try:
            for case in cases:
                before = len(findings.differences)
                with ThreadPoolExecutor() as pool:
                    runs = list(pool.map(lambda side, case=case: _run(side, case, folder / side.name), sides))
                for old, new in zip(*runs, strict=True):
                    _compare(old, new, findings)
                found = len(findings.differences) - before
                print(f"{case.name:32s} {'same' if not found else f'{found} differences'}", flush=True)
        finally:
            for side in sides:
                side.close()
    for line in findings.one_sided:
        print(f"only one side: {line}")
    for line in findings.differences:
        print(line)
    print(f"{findings.compared} values compared, {len(findings.differences)} differ.")
    return 1 if findings.differences else 0


# What is run


def _materials(folder: Path) -> Path:
    """Tiny models, facts for them and a text, made once for both sides."""
    folder.mkdir()
    for family in ("gpt2", "llama"):
        tiny_model(family).save(folder / family)
    requests = tiny_requests(12)
    with (folder / "facts.jsonl").open("w", encoding="utf-8") as file:
        for number, request in enumerate(requests):
            line = {
                **request.model_dump(mode="json", include={"subject", "prompt", "target_new", "target_true"}),
                "paraphrase_prompts": [f"It is said that {request.text}"],
                "neighborhood_prompts": [requests[number - 1].text],
            }
            file.write(json.dumps(line) + "\n")
    words = " ".join(request.text for request in requests).split()
    (folder / "corpus.txt").write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return folder


def _cases(materials: Path, *, tiny_only: bool) -> Iterator[Case]:
    one_layer, two_layers = ("--set", "layers=[1]"), ("--set", "layers=[0, 1]")
    trust = ("--plugin", "trust", "--set", "trust.trust_threshold=0.1", "--set", "trust.trust_min_efficacy=0")
    variants = {
        "rome": ("--editor", "rome", *one_layer),
        "memit": ("--editor", "memit", *two_layers),
        "emmet": ("--editor", "emmet", *one_layer),
        "emmet over two layers": ("--editor", "emmet", *two_layers),
        "emmet + replay": ("--editor", "emmet", "--plugin", "replay", *one_layer),
        "emmet + statistics": (
            "--editor", "emmet", "--plugin", "replay", "--set", "replay.replay_mode=statistics", *one_layer,
        ),
        "memit + replay": ("--editor", "memit", "--plugin", "replay", *two_layers),
        "emmet + trust": ("--editor", "emmet", *trust, *one_layer),
        "emmet + replay + lora": ("--editor", "emmet", "--plugin", "replay", "--plugin", "lora", *one_layer),
        "emmet, checkpoints": ("--editor", "emmet", *one_layer, "--eval-every", "4",
                               "--eval-text", materials / "corpus.txt", "--eval-text-tokens", "256"),
    }  # fmt: skip
    for family in ("gpt2", "llama"):
        for name, options in variants.items():
            fixed = [
                "--model", materials / family, "--dataset", materials / "facts.jsonl", "--batch-size", "4",
                "--corpus", materials / "corpus.txt", "--corpus-tokens", "2000", "--set", "v_num_grad_steps=4",
                "--set", "context_count=2", "--set", "context_length=3",
            ]  # fmt: skip
            yield Case(f"{family}: {name}", tuple(map(str, [*fixed, *options])), undo=(5, 0, 2))
    if not tiny_only:
        command = f"--model {_MODEL} --editor emmet --plugin replay --edits 8 --batch-size 4 --corpus-tokens 4096"
        yield Case(_MODEL, tuple(command.split()), undo=(1,))


def _install(revision: str, folder: Path) -> Checkout:
    """The packages of a commit, or of a folder, as a user has them."""
    folder.mkdir()
    source = Path(revision).resolve()
    tree = None
    if not source.is_dir():
        tree = source = folder / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, revision], check=True)
    try:
        packages = [path.parent for path in sorted(source.glob("packages/*/pyproject.toml"))]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", folder / "site", *packages], check=True)
    finally:
        if tree is not None:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    cache = folder / "cache"
    cache.mkdir()
    models = Path(os.environ.get("EDITCORE_CACHE", Path.home() / ".cache" / "editcore")) / "models"
    if models.is_dir():  # second moments are computed anew, models are not
        (cache / "models").symlink_to(models)
    return Checkout(folder.name, folder / "site", cache)


def _run(side: Checkout, case: Case, folder: Path) -> list[Path]:
    """What a case leaves on one side: the run, and models saved from it after the run, after the undos and the redo."""
    run = folder / case.name.replace(":", "").replace(" ", "-")
    models = [run.with_name(f"{run.name}-{state}") for state in ("edited", "undone", "redone")]
    side.editctl("run", *case.options, "--out", run, "--save", models[0])
    ids = _ids(run)
    undone = [ids[position] for position in case.undo if ids[position] in _active(run)]  # trust may have rejected one
    for name in undone:
        side.editctl("ledger", run, "undo", name)
    side.editctl("export", run, models[1], "--format", "merged")
    for name in undone[:1]:
        side.editctl("ledger", run, "redo", name)
    side.editctl("export", run, models[2], "--format", "merged")
    return [run, *models]


def _ids(run: Path) -> list[str]:
    lines = (run / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["request"]["id"]) for line in lines]


def _active(run: Path) -> set[str]:
    """The ids that the run's batches wrote."""
    found = set()
    for line in _lines(run / _LEDGER_NAME):
        if "num_new" in line and line.get("scale", 1) > 0:
            found |= {request["id"] for request in line["requests"][: line["num_new"]]}
    return found


# What is compared


def _compare(old: Path, new: Path, findings: Findings) -> None:
    names = {path.relative_to(folder).as_posix() for folder in (old, new) for path in folder.rglob("*")}
    for name in sorted(name for name in names if (old / name).is_file() or (new / name).is_file()):
        where = f"{new.name}/{name}"
        if not (old / name).exists() or not (new / name).exists():
            findings.one_sided.append(f"{where} is a file of {'NEW' if (new / name).exists() else 'OLD'}")
        elif name.endswith(".safetensors"):
            _compare_tensors(old / name, new / name, where, findings)
        elif name in (_LEDGER_NAME, "batches.jsonl", "requests.jsonl"):
            _compare_json(_lines(old / name), _lines(new / name), where, findings)
        elif name in ("summary.json", "forgetting.json"):
            _compare_json(json.loads((old / name).read_text()), json.loads((new / name).read_text()), where, findings)
        elif name.endswith(".parquet"):
            _compare_frames(pd.read_parquet(old / name), pd.read_parquet(new / name), where, findings)


def _compare_tensors(old: Path, new: Path, where: str, findings: Findings) -> None:
    before, after = _hashes(old), _hashes(new)
    if before.keys() != after.keys():  # other names: the same tensors?
        findings.one_sided.append(f"{where} names its tensors otherwise")
        findings.equal(where, sorted(before.values()), sorted(after.values()))
        return
    for name in before:
        findings.equal(f"{where}: {name}", before[name], after[name])


def _hashes(path: Path) -> dict[str, str]:
    """A digest of the type, shape and bytes of each tensor."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            tensor = file.get_tensor(name)
            head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(head + content).hexdigest()
    return found


def _compare_json(old: object, new: object, where: str, findings: Findings) -> None:
    """Values that both sides have; fields of one side are listed once."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        old, new = _flat(old), _flat(new)
        for name in sorted(old.keys() ^ new.keys()):
            line = f"{_generic(where)}: {name} is a field of {'NEW' if name in new else 'OLD'}"
            if line not in findings.one_sided:
                findings.one_sided.append(line)
        for name in sorted((old.keys() & new.keys()) - _VARYING):
            _compare_json(old[name], new[name], f"{where}: {name}", findings)
    elif isinstance(old, list) and isinstance(new, list):
        findings.equal(f"{where}: number of entries", len(old), len(new))
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            _compare_json(before, after, f"{where} [{index}]", findings)
    else:
        findings.equal(where, old, new)


def _flat(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Figures by name count as fields of what they belong to, wherever a side keeps them; one that is null is none."""
    figures = fields.get("figures")
    flat = {**fields, **figures} if isinstance(figures, Mapping) else fields
    return {name: value for name, value in flat.items() if name != "figures" and value is not None}


def _compare_frames(old: pd.DataFrame, new: pd.DataFrame, where: str, findings: Findings) -> None:
    old, new = (frame.astype(object).where(frame.notna(), None) for frame in (old, new))
    if ("metric" in old.columns) != ("metric" in new.columns):  # no row of one is a row of the other
        long = "NEW" if "metric" in new.columns else "OLD"
        findings.one_sided.append(f"{where} has a row per observation in {long} alone: its values are not compared")
        return
    for column in [*old.columns, *(name for name in new.columns if name not in old.columns)]:
        if column in old.columns and column in new.columns:
            _compare_json(old[column].tolist(), new[column].tolist(), f"{where}: {column}", findings)
        else:
            findings.one_sided.append(f"{where}: {column} is a column of {'NEW' if column in new.columns else 'OLD'}")


def _lines(path: Path) -> list[Any]:
    """The JSON of each line; a ledger's lines have a checksum in front."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line if line.startswith("{") else line.partition(" ")[2]) for line in lines]


def _generic(where: str) -> str:
    """Without the run's name and positions, so that a field is listed once."""
    return "/".join(where.split("/")[1:]).split(" [")[0]


def _short(value: object, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


if __name__ == "__main__":
    sys.exit(main())
