"""Runs what it is asked on standard input, a line of JSON each, where the packages are installed; answers likewise.

One process for many ``editctl`` commands spares each of them the imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import editcore.figures.runs
import editcore.runs.job  # noqa: F401  heavy, and imported before a child is forked
import torch
from editcore.cli import main
from editcore.evaluation import score_targets
from editcore.models import EditedModel, LanguageModel
from editcore.plugins import Plugins
from editcore.runs import open_run, read_pack


def editctl(arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """What a command ends with: ``code``, ``out`` and ``err``."""
    kept = [os.dup(1), os.dup(2)]
    paths = [log / "out", log / "err"]
    for handle, path in zip((1, 2), paths, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, handle)
        os.close(file)
    sys.argv = ["editctl", *arguments]
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for handle, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, handle)
            os.close(saved)
    return {"code": code, "out": paths[0].read_text(), "err": paths[1].read_text()}


def killed(arguments: Sequence[str], directory: str, log: Path) -> dict[str, Any]:
    """A command in a child that is ended by SIGKILL once the ledger has a batch; ``batches`` is how many it had."""
    child = os.fork()
    if not child:
        editctl(arguments, log)
        os._exit(0)
    ledger, deadline = Path(directory) / "ledger.jsonl", time.monotonic() + 60
    while _batches(ledger) == 0 and time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return {"ended": True, "batches": _batches(ledger), "err": (log / "err").read_text()}
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {"ended": os.waitstatus_to_exitcode(status) != -signal.SIGKILL, "batches": _batches(ledger)}


def _batches(ledger: Path) -> int:
    return ledger.read_bytes().count(b'"kind":"batch"') if ledger.exists() else 0


def state(directory: str, prompts: Sequence[str], batches: Sequence[int] | None = None) -> dict[str, Any]:
    """The bits of a run's model as it is ``now`` and of its ``base``.

    Args:
        batches: the only ones that are active, as they were solved; left out, those that the ledger says.
    """
    edited, ledger = open_run(Path(directory))
    if batches is not None:
        edited.rebuild([entry.written for entry in ledger.entries if entry.batch in batches])
    targets = {request.text: request.target_new for entry in ledger.entries for request in entry.new_requests}
    now = bits(edited, prompts, targets)
    edited.rebuild([])
    return {"now": now, "base": bits(edited, prompts, targets)}


def packed(file: str, model: str, prompts: Sequence[str]) -> dict[str, Any]:
    """The bits of a model that a pack was applied to."""
    pack = read_pack(Path(file))
    edited = pack.apply(LanguageModel.load(model), Plugins.load())
    return bits(edited, prompts, {request.text: request.target_new for request in pack.requests})


@torch.inference_mode()
def bits(edited: EditedModel, prompts: Sequence[str], targets: Mapping[str, str]) -> dict[str, Any]:
    """Weights and logits as digests, scores and answers as they are."""
    model = edited.model
    encoded = model.encode([model.asked(prompt) for prompt in prompts])
    logits = model.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    scores = score_targets(model, list(targets), list(targets.values()))
    return {
        "weights": model.fingerprint(),
        "logits": hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest(),
        "scores": {prompt: score.nll for prompt, score in zip(targets, scores, strict=True)},
        "answers": model.generate(prompts, max_new_tokens=6),
    }


def serve() -> None:
    """Until there is nothing more to read."""
    answers, asked = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = Path(sys.argv[1])
    for line in asked:
        call = json.loads(line)
        match call.pop("call"):
            case "editctl":
                answer = editctl(**call, log=log)
            case "killed":
                answer = killed(**call, log=log)
            case "state":
                answer = state(**call)
            case "packed":
                answer = packed(**call)
            case other:
                raise SystemExit(f"unknown call {other}")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
