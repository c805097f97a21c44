"""What many edits in sequence leave of each other and of the model: ES, PS, NS and perplexity, as a Markdown table.

    python tools/replay_table.py --dataset FILE --text FILE --edits 500 --plugin replay --set replay.replay_rate=1

A row at each checkpoint measures every edit made so far, or every ``--each`` of them. Perplexity is a ratio to the
unedited model's. NS before and after is that of the same facts.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from editcore import EditSession, LanguageModel, Plugins
from editcore._hparams import parse_assignment
from editcore.datasets import check_records, load_records
from editcore.evaluation import CounterFactEvaluator, PromptScore, perplexity, summarize


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = _options(arguments)
    registry = Plugins.load()
    model = LanguageModel.load(options.model, plugins=registry)
    records, _ = check_records(load_records(options.dataset, plugins=registry)[: options.edits])
    text = (
        gzip.decompress(options.text.read_bytes()).decode()
        if options.text.suffix == ".gz"
        else options.text.read_text()
    )
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    for assignment in options.set:
        name, value = parse_assignment(assignment)
        owner, _, key = name.rpartition(".")
        settings[owner or options.editor][key] = value
    unedited_perplexity = perplexity(model, text, max_tokens=options.text_tokens)
    session = EditSession.open(
        model,
        editor=options.editor,
        plugins=options.plugin,
        settings=settings,
        corpus=options.corpus,
        corpus_tokens=options.corpus_tokens,
    )
    unedited: dict[str, list[PromptScore]] = {}
    print("| edits | ES | PS | NS | NS before | perplexity | seconds per edit | replay |")
    print("|---:|---:|---:|---:|---:|---:|---:|---|")
    start, seconds = 0, 0.0
    for stop in [*range(options.checkpoint, len(records), options.checkpoint), len(records)]:
        began = time.perf_counter()
        session.edit([one.request for one in records[start:stop]], batch_size=options.batch_size)
        seconds += time.perf_counter() - began
        measured = records[:stop] if stop == len(records) else records[: stop : options.each]
        missing = [one for one in measured if one.request.id not in unedited]
        for score in session.without_edits(partial(CounterFactEvaluator().evaluate, model, missing)):
            unedited.setdefault(score.case_id, []).append(score)
        before = summarize([score for one in measured for score in unedited[one.request.id]]).percentages()
        after = summarize(CounterFactEvaluator().evaluate(model, measured)).percentages()
        ratio = perplexity(model, text, max_tokens=options.text_tokens) / unedited_perplexity
        cells = [f"{after[name]:.1f}" for name in ("ES", "PS", "NS")] + [f"{before['NS']:.1f}", f"{ratio:.3f}"]
        print(f"| {stop} | {' | '.join(cells)} | {seconds / stop:.2f} | {session.statistics()} |", flush=True)
        start = stop


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--editor", default="emmet")
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="[OWNER.]KEY=VALUE")
    parser.add_argument("--corpus", default="self")
    parser.add_argument("--corpus-tokens", type=int)
    parser.add_argument("--dataset", default="worldfacts")
    parser.add_argument("--text", type=Path, required=True, help="text for perplexity, .txt or .txt.gz")
    parser.add_argument("--text-tokens", type=int, default=None)
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--checkpoint", type=int, default=100)
    parser.add_argument("--each", type=int, default=5, help="measure every Nth edit at checkpoints; all at the end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
