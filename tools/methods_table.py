"""ES, PS and NS of every installed editor on a model, as a Markdown table.

    python tools/methods_table.py --model smollm2-135m --dataset FILE --edits 20

An editor that solves one fact at a time edits a fresh model for each fact and is measured on that fact; the others
write all facts in one batch. Presets and corpus are the defaults.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from editcore import EditSession, FactRecord, LanguageModel, Observation, Plugins, SessionConfig
from editcore.datasets import check_records, load_records
from editcore.evaluation import COUNTERFACT, CounterFactEvaluator, Measurement, measures_of

METRICS = ("ES", "PS", "NS", "score")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="worldfacts")
    parser.add_argument("--edits", type=int, default=20)
    options = parser.parse_args()
    registry = Plugins.load()
    model = LanguageModel.load(options.model, families=registry.family_paths())
    records, _ = check_records(load_records(options.dataset, plugins=registry)[: options.edits])
    print(f"| {options.model} | " + " | ".join(METRICS) + " | seconds per edit |")
    print("|---|" + "---:|" * (len(METRICS) + 1))
    _print_row("unedited", CounterFactEvaluator().evaluate(model, records), None)
    for name, spec in registry.editors().items():
        singly = spec.capabilities.max_batch == 1
        observed, seconds = _edit(model, name, [[record] for record in records] if singly else [list(records)])
        _print_row(f"{name}, {'each alone' if singly else 'one batch'}", observed, seconds / len(records))


def _edit(model: LanguageModel, editor: str, groups: Sequence[Sequence[FactRecord]]) -> tuple[list[Observation], float]:
    """Write each group into the unedited model, and measure it there."""
    observed: list[Observation] = []
    seconds = 0.0
    for group in groups:
        session = EditSession.open(model, SessionConfig(editor=editor, evaluators=(COUNTERFACT.name,)))
        start = time.perf_counter()
        session.edit([record.request for record in group])
        seconds += time.perf_counter() - start
        observed += session.evaluate(group).observations[COUNTERFACT.name]
        session.close()
    return observed, seconds


def _print_row(name: str, observed: Sequence[Observation], seconds: float | None) -> None:
    found = Measurement(measures=measures_of([COUNTERFACT]), observations={COUNTERFACT.name: observed}).summary
    cells = [f"{found.value(metric):.1f}" for metric in METRICS] + [f"{seconds:.2f}" if seconds is not None else ""]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
