"""Measure how often a model prefers the true object of a data set's records to the new one.

    python tools/measure_facts.py MODEL [--dataset worldfacts] [--tag TAG]

Prints a Markdown table, one row per relation: the share of main prompts, paraphrases and
neighbourhood prompts on which the mean negative log-likelihood per token of the true object is the
lower one. An editor can hardly keep more neighbours right than the unedited model answers right,
so the last column is the ceiling of specificity.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from editcore import FactRecord, Observation, Plugins
from editcore.datasets import load_records
from editcore.evaluation import CounterFactEvaluator
from editcore.models import DEFAULT_MODEL, LanguageModel

TRUE_WINS = {"ES": 0.0, "PS": 0.0, "NS": 1.0}
"""By metric, in the order of the columns: its value where the true object is the likelier one."""


def measure(records: Sequence[FactRecord], observations: Iterable[Observation]) -> dict[str, dict[str, list[bool]]]:
    """Per relation and metric: whether the true object won, once per prompt."""
    relations = {record.request.id: record.relation or "" for record in records}
    wins: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for seen in observations:
        if seen.metric in TRUE_WINS:
            wins[relations[seen.request_id]][seen.metric].append(seen.value == TRUE_WINS[seen.metric])
    return wins


def table(wins: Mapping[str, Mapping[str, list[bool]]]) -> str:
    """The Markdown table, relations by name and the whole set last."""
    lines = [
        "| relation | records | main | paraphrase | neighbourhood |",
        "|---|---:|---:|---:|---:|",
    ]
    total: dict[str, list[bool]] = defaultdict(list)
    for name in sorted(wins):
        for metric in TRUE_WINS:
            total[metric].extend(wins[name][metric])
    for label, row in [*sorted(wins.items()), ("**all**", total)]:
        shares = [f"{100 * sum(row[metric]) / len(row[metric]):.0f} %" for metric in TRUE_WINS]
        lines.append(f"| {label} | {len(row['ES'])} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one model and print the table."""
    parser = argparse.ArgumentParser(description="Measure an unedited model on a data set.")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="name or folder of a model")
    parser.add_argument("--dataset", default="worldfacts", help="NAME or NAME:ARGUMENT")
    parser.add_argument("--tag", help="only records with this tag")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--misses", action="store_true", help="also list main prompts missed")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    records = [
        record
        for record in load_records(args.dataset, plugins=Plugins.load())
        if args.tag is None or args.tag in record.request.tags
    ]
    observations = CounterFactEvaluator().evaluate(LanguageModel.load(args.model), records)
    sys.stdout.write(table(measure(records, observations)))
    if args.misses:
        missed = {seen.request_id for seen in observations if seen.metric == "ES" and seen.value != TRUE_WINS["ES"]}
        for record in records:
            if record.request.id in missed:
                request = record.request
                sys.stdout.write(f"{record.relation}: {request.text} {request.target_true} ({request.target_new})\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
