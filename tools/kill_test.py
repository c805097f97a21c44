"""Kill a run at random moments, resume it, compare with one that nothing ended: python tools/kill_test.py [--kills N]

Every process is a child with ``editctl run ... --resume``, ended by SIGKILL after a random time, again and again until
one comes to its end. What it leaves must then be, byte for byte, what an uninterrupted run leaves, but for times.

With ``--single``, facts are written one by one with ``editctl edit DIR``, each call again until it succeeds. Every fact
must then be there once, and the weights must be those of the same calls that nothing ended.

Needs a system with fork, which spares each of them the imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

TIMES = {"seconds", "seconds_per_edit", "peak_memory_bytes", "stages", "started", "command"}
"""Fields that may differ."""
_HEAVY = (
    "editcore.runs.job",
    "editcore.runs.begin",
    "editcore.runs.workspace",
    "editcore.figures.runs",
    "matplotlib.backends.backend_agg",
    "pandas",
    "pyarrow.parquet",
)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if every chain of killed and resumed runs ended like the uninterrupted one."""
    parser = argparse.ArgumentParser(prog="kill_test.py", description="Kill runs at random moments and resume them.")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how many processes to kill")
    parser.add_argument("--model", metavar="NAME", help="a real model with its data set, instead of a tiny random one")
    parser.add_argument("--batches", type=int, default=20, metavar="N", help="batches of two facts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--single", action="store_true", help="single edits of a directory, instead of a run")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*_command(folder, given.model), "--edits", str(2 * given.batches), "--batch-size", "2"]
        if given.single:
            return _kill_single_edits(folder, command, given.kills, random.Random(given.seed))
        return _kill(folder, command, given.kills, random.Random(given.seed))


def _kill_single_edits(folder: Path, options: Sequence[str], kills: int, rng: random.Random) -> int:
    from editcore.ledger.ledger import Ledger
    from editcore.testing import tiny_requests

    log, facts = folder / "log", tiny_requests(40)
    begun, whole, killed = folder / "begun", folder / "whole", folder / "killed"
    start = _started(["init", str(begun), *_without_facts(options)], log)
    if _ended(start, None) != 0:
        print(log.read_text(), file=sys.stderr)
        return 1
    for directory in (whole, killed):
        shutil.copytree(begun, directory)
    done, written, length = 0, 0, 0.0
    for fact in facts:
        if done >= kills:
            break
        written += 1
        words = ["--subject", fact.subject, "--prompt", fact.prompt, "--target", fact.target_new]
        start_time = time.monotonic()
        if _ended(_started(["edit", str(whole), *words], log), None) != 0:
            print(log.read_text(), file=sys.stderr)
            return 1
        length = max(length, time.monotonic() - start_time)
        for attempt in range(-(-kills // len(facts)) + 1):
            limit = rng.uniform(0, length) if attempt < -(-kills // len(facts)) and done < kills else None
            code = _ended(_started(["edit", str(killed), *words], log), limit)
            done += code is None
            if code not in (None, 0):
                print(f"edit {written}: ended with {code}\n{log.read_text()}", file=sys.stderr)
                return 1
    expected = [(fact.text, fact.target_new) for fact in facts[:written]]
    ledger = Ledger.read(killed)
    found = [(request.text, request.target_new) for request in ledger.written()]
    if found != expected or _contents(killed)["weights"] != _contents(whole)["weights"]:
        print(f"{len(found)} edits are in the ledger, {len(expected)} were made, or weights differ.", file=sys.stderr)
        return 1
    print(f"{done} processes killed while {written} facts were written one by one; each is there once.")
    return 0


def _without_facts(options: Sequence[str]) -> list[str]:
    """The options of a run that 'editctl init' has, too."""
    pairs = list(zip(options[::2], options[1::2], strict=True))
    unknown = ("--dataset", "--edits", "--eval-every", "--eval-sample", "--eval-text")
    return [word for pair in pairs if pair[0] not in unknown for word in pair]


def _kill(folder: Path, command: Sequence[str], kills: int, rng: random.Random) -> int:
    start = time.monotonic()
    whole = folder / "whole"
    if _ended(_start(command, whole, folder / "log"), None) != 0:
        print((folder / "log").read_text(), file=sys.stderr)
        return 1
    length = time.monotonic() - start
    expected = _contents(whole)
    done, chain = 0, 0
    states: dict[str, int] = {}
    while done < kills:
        chain += 1
        directory = folder / f"run-{chain}"
        before: list[bytes] = []
        while True:
            # The last ones are let go, so that what a kill left is always resumed.
            limit = rng.uniform(0, length) if done < kills else None
            code = _ended(_start(command, directory, folder / "log"), limit)
            if code is None:
                done += 1
                before.append(_complete_lines(directory))
                state = _state(directory)
                states[state] = states.get(state, 0) + 1
                continue
            if code != 0:
                print(f"chain {chain}: resuming ended with {code}\n{(folder / 'log').read_text()}", file=sys.stderr)
                return 1
            break
        found = _contents(directory)
        final = (directory / "ledger.jsonl").read_bytes()
        different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if different or not all(final.startswith(lines) for lines in before):
            print(f"chain {chain}: {', '.join(different) or 'lines of the ledger'} differ", file=sys.stderr)
            return 1
    print(f"{done} processes killed in {chain} runs, each resumed to its end; all as the uninterrupted run.")
    print("When they were killed: " + ", ".join(f"{state} {count}" for state, count in sorted(states.items())))
    return 0


def _command(folder: Path, model: str | None) -> list[str]:
    from editcore.testing import tiny_model, tiny_requests

    common = ["--editor", "emmet", "--plugin", "replay", "--set", "replay.replay_strategy=priority"]
    common += ["--set", "replay.replay_eviction=lru", "--set", "replay.replay_buffer_size=12"]
    common += ["--eval-every", "4", "--eval-sample", "3", "--eval-text", "docs"]
    if model is not None:
        return [*common, "--model", model]
    tiny_model().save(folder / "tiny")
    facts = tiny_requests(80)
    lines = [{**fact.model_dump(mode="json"), "neighborhood_prompts": [facts[-1].text]} for fact in facts]
    (folder / "facts.jsonl").write_text("".join(f"{json.dumps(_plain(line))}\n" for line in lines), encoding="utf-8")
    words = " ".join(fact.text for fact in facts).split()
    (folder / "corpus.txt").write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return [
        *common, "--model", str(folder / "tiny"), "--dataset", str(folder / "facts.jsonl"),
        "--corpus", str(folder / "corpus.txt"), "--corpus-tokens", "2000", "--set", "layers=[1]",
        "--set", "v_num_grad_steps=3", "--set", "context_count=2", "--set", "context_length=3",
    ]  # fmt: skip


def _plain(line: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in line.items() if name not in ("tags", "id")}


def _start(command: Sequence[str], directory: Path, log: Path) -> int:
    """``editctl run`` in a child, its output in a file; its process id."""
    return _started(["run", *command, "--out", str(directory), "--resume"], log)


def _started(arguments: Sequence[str], log: Path) -> int:
    """``editctl`` in a child, its output in a file; its process id."""
    import editcore.cli

    for module in _HEAVY:  # the parent imports once for all children
        importlib.import_module(module)

    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["editctl", *arguments]
        try:
            editcore.cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    finally:
        os._exit(code)


def _ended(child: int, limit: float | None) -> int | None:
    """The exit code of a child, or ``None`` if it was killed because its time was up."""
    end = None if limit is None else time.monotonic() + limit
    while True:
        ended, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def _state(directory: Path) -> str:
    """What a killed process had come to."""
    if not (directory / "run.json").exists():
        return "before the first batch"
    if (directory / "summary.json").exists():
        return "after the end"
    return "while editing or measuring"


def _complete_lines(directory: Path) -> bytes:
    path = directory / "ledger.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _contents(directory: Path) -> dict[str, object]:
    """Every file, without the times in it, and the weights."""
    from editcore.runs.reopening import open_run

    edited, _ = open_run(directory)
    found: dict[str, object] = {"weights": edited.model.fingerprint()}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(directory))
            if path.suffix in (".json", ".jsonl") and name != "ledger.jsonl":
                found[name] = [_timeless(json.loads(line)) for line in _objects(path)]
            else:
                found[name] = path.read_bytes()
    return found


def _objects(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if name not in TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
