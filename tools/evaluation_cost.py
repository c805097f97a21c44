"""What evaluation costs: CPU seconds, tokens through the model and rows of logits.

    python tools/evaluation_cost.py --dataset counterfact_dev.jsonl.gz --records 100 --prompts 300

*counterfact*: every prompt of the records with both of its objects. *generation*: continuations of their prompts.
``CPU s`` is the time of all threads, which depends less on what else the machine does than wall time. ``GFLOP`` are
those of the weights that a token or a row of logits meets; attention is left out. ``figures`` is a hash of what was
found: the negative log-likelihoods to seven digits, and the texts.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from editcore import FactRecord, LanguageModel, Plugins
from editcore.datasets import load_records
from editcore.evaluation import score_targets
from torch.nn.modules.module import register_module_forward_hook


@dataclass
class Counts:
    """What went through the model."""

    passes: int = 0
    tokens: int = 0
    """Tokens of all passes, padding included."""
    logits: int = 0
    """Rows of logits."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="worldfacts", help="registered data set or a file of records")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=16, help="of a continuation")
    options = parser.parse_args(arguments)
    model = LanguageModel.load(options.model)
    records = load_records(options.dataset, plugins=Plugins.load())
    print(f"{model.name}, {torch.get_num_threads()} threads")
    print("| | texts | passes | tokens | rows of logits | GFLOP | CPU s | figures |\n|---|--:|--:|--:|--:|--:|--:|---|")
    pairs = list(_pairs(records[: options.records]))
    row("counterfact", model, len(pairs), lambda: _scores(model, pairs))
    prompts = list(dict.fromkeys(prompt for record in records for prompt in _prompts(record)))[: options.prompts]
    row("generation", model, len(prompts), lambda: model.generate(prompts, max_new_tokens=options.tokens))


def row(name: str, model: LanguageModel, texts: int, work: Callable[[], Sequence[object]]) -> None:
    """A line of the table."""
    with counting(model) as counts:
        before = time.process_time()
        found = work()
        seconds = time.process_time() - before
    head = model.hf.get_output_embeddings().weight.numel()
    embedding = model.hf.get_input_embeddings().weight.numel()
    tied = model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
    body = sum(parameter.numel() for parameter in model.hf.parameters()) - embedding - (0 if tied else head)
    gflop = 2e-9 * (body * counts.tokens + head * counts.logits)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:12]
    print(
        f"| {name} | {texts} | {counts.passes} | {counts.tokens} | {counts.logits} | {gflop:.0f} | {seconds:.1f} | "
        f"{digest} |",
        flush=True,
    )


@contextmanager
def counting(model: LanguageModel) -> Iterator[Counts]:
    """Counts what goes through the model inside the block."""
    counts = Counts()

    hf, head = model.hf, model.hf.get_output_embeddings()

    def count(module: torch.nn.Module, _args: object, kwargs: dict[str, Any], output: Any) -> None:
        if module is hf:
            counts.passes += 1
            counts.tokens += kwargs["input_ids"].numel()
        elif module is head:
            counts.logits += output.numel() // output.shape[-1]

    # Of all modules: a hook of the model's own would keep it from being asked in trees.
    handles = [register_module_forward_hook(count, with_kwargs=True)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _pairs(records: Sequence[FactRecord]) -> Iterator[tuple[str, str]]:
    for record in records:
        for prompt in _prompts(record):
            yield from (
                (prompt, target) for target in (record.request.target_new, record.request.target_true) if target
            )


def _prompts(record: FactRecord) -> list[str]:
    kinds = ("paraphrase", "neighborhood")
    return [record.request.text, *(probe.prompt for kind in kinds for probe in record.of_kind(kind))]


def _scores(model: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[object]:
    found = score_targets(model, [prompt for prompt, _ in pairs], [target for _, target in pairs])
    return [(f"{score.nll:.6e}", score.predicted) for score in found]


if __name__ == "__main__":
    main()
