"""Measure how often a model prefers the true object of a ``worldfacts`` record to its new target.

    python tools/worldfacts/measure.py MODEL_FOLDER

Prints a Markdown table, one row per relation: the share of main prompts, paraphrases and
neighbourhood prompts on which the mean negative log-likelihood per token of the true object is the
lower one. An editor can hardly keep more neighbours right than the unedited model answers right,
so the last column is the ceiling of specificity.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = (
    Path(__file__).resolve().parents[2]
    / "packages" / "editcore" / "src" / "editcore" / "datasets" / "worldfacts.jsonl"
)  # fmt: skip

Query = tuple[str, str]
"""A prompt and the object asked for, without the space between them."""
KINDS = ("main", "paraphrase", "neighbourhood")


def prompts_of(record: dict[str, Any], *, neighbours: int) -> list[tuple[str, str]]:
    """The (kind, prompt) pairs of one record."""
    rewrite = record["requested_rewrite"]
    return [
        ("main", rewrite["prompt"].format(rewrite["subject"])),
        *(("paraphrase", prompt) for prompt in record["paraphrase_prompts"]),
        *(("neighbourhood", prompt) for prompt in record["neighborhood_prompts"][:neighbours]),
    ]


def mean_nll(model: Any, tokenizer: Any, queries: Iterable[Query], *, batch_size: int) -> dict[Query, float]:
    """Mean negative log-likelihood per token of " " + object after the prompt, per query.

    Queries that feed the model the same tokens (all objects of one token after one prompt) share
    a row.
    """
    rows: dict[tuple[int, ...], list[tuple[Query, list[int]]]] = defaultdict(list)
    for prompt, answer in dict.fromkeys(queries):
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        # The last token is only predicted, never read.
        rows[(*prompt_ids, *answer_ids[:-1])].append(((prompt, answer), answer_ids))
    ordered = sorted(rows, key=len)  # little padding within a batch
    result: dict[Query, float] = {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        for index, row in enumerate(batch):
            for query, answer_ids in rows[row]:
                first = len(row) - len(answer_ids)
                window = logits[index, first : len(row)].log_softmax(-1)  # [num_tokens, vocab]
                picked = window.gather(-1, torch.tensor(answer_ids)[:, None])
                result[query] = -picked.mean().item()
    return result


def measure(
    records: Sequence[dict[str, Any]], nll: dict[Query, float], *, neighbours: int
) -> dict[str, dict[str, list[bool]]]:
    """Per relation and kind of prompt: whether the true object won, once per prompt."""
    wins: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        rewrite = record["requested_rewrite"]
        true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        for kind, prompt in prompts_of(record, neighbours=neighbours):
            won = nll[prompt, true] < nll[prompt, new]
            wins[rewrite["relation_id"]][kind].append(won)
    return wins


def table(wins: dict[str, dict[str, list[bool]]]) -> str:
    """The Markdown table, relations by name and the whole set last."""
    lines = [
        "| relation | records | main | paraphrase | neighbourhood |",
        "|---|---:|---:|---:|---:|",
    ]
    total: dict[str, list[bool]] = defaultdict(list)
    for name in sorted(wins):
        for kind in KINDS:
            total[kind].extend(wins[name][kind])
    for label, row in [*sorted(wins.items()), ("**all**", total)]:
        shares = [f"{100 * sum(row[kind]) / len(row[kind]):.0f} %" for kind in KINDS]
        lines.append(f"| {label} | {len(row['main'])} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one model folder and print the table."""
    parser = argparse.ArgumentParser(description="Measure a model on worldfacts.")
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--neighbours", type=int, default=10, help="neighbours per record, 1-10")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--misses", action="store_true", help="also list main prompts missed")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    lines = args.data.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    queries = [
        (prompt, record["requested_rewrite"][target]["str"])
        for record in records
        for _, prompt in prompts_of(record, neighbours=args.neighbours)
        for target in ("target_true", "target_new")
    ]
    nll = mean_nll(model, tokenizer, queries, batch_size=args.batch_size)
    sys.stdout.write(table(measure(records, nll, neighbours=args.neighbours)))
    if args.misses:
        for record in records:
            rewrite = record["requested_rewrite"]
            prompt = rewrite["prompt"].format(rewrite["subject"])
            true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
            if nll[prompt, true] >= nll[prompt, new]:
                sys.stdout.write(f"{rewrite['relation_id']}: {prompt} {true} ({new})\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
