"""Several facts about one subject: what an editor makes of the data set ``profiles``, as rows of a table.

    python tools/profiles_table.py --facts 3
    python tools/profiles_table.py --facts 3 --sequence
    python tools/profiles_table.py --facts 3 --apart

``--sequence`` writes one fact a batch, in a shuffled order, without replay. ``--apart`` makes each fact a constraint of
its own, as the published methods do.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Sequence

from editcore import EditSession, FactRecord, Plugins, SessionConfig
from editcore.cli.run import settings_from
from editcore.datasets import load_records
from editcore.evaluation import score_targets
from editcore.evaluation.generation import GenerationHParams, answer_of, is_said


def main() -> None:
    """Print the table's head and one row."""
    parser = argparse.ArgumentParser(description="Several facts about one subject.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--editor", default="emmet")
    parser.add_argument("--facts", type=int, default=3, help="facts a subject")
    parser.add_argument("--subjects", type=int, default=16, help="subjects, spread over the data set")
    parser.add_argument("--sequence", action="store_true", help="one fact a batch, shuffled")
    parser.add_argument("--apart", action="store_true", help="each fact is a constraint of its own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the editor")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    records = chosen_records(options.facts, options.subjects, shuffled=options.sequence)
    assignments = [*options.set, *(["shared_key_cosine=none"] if options.apart else [])]
    config = SessionConfig(editor=options.editor, settings=settings_from(assignments, {}, editor=options.editor))
    session = EditSession.open(options.model, config)
    before = measured(session, records)
    start = time.perf_counter()
    session.edit([record.request for record in records], batch_size=1 if options.sequence else None)
    seconds = (time.perf_counter() - start) / len(records)
    after = measured(session, records)
    print("| facts | ES | PS | NS (unedited) | said | generated | paraphrases said | s per fact |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    cells = [f"{after[name]:.1f}" for name in ("ES", "PS", "NS", "said", "generated", "paraphrases said")]
    cells[2] += f" ({before['NS']:.1f})"
    print(f"| {len(records)} | {' | '.join(cells)} | {seconds:.1f} |")


def chosen_records(facts: int, subjects: int, *, shuffled: bool) -> list[FactRecord]:
    """The first facts of some subjects, which are spread evenly over the data set."""
    records = load_records(f"profiles:{facts}", plugins=Plugins.load())
    names = list(dict.fromkeys(record.request.subject for record in records))
    kept = set(names[:: max(1, len(names) // subjects)][:subjects])
    chosen = [record for record in records if record.request.subject in kept]
    if shuffled:
        random.Random(0).shuffle(chosen)
    return chosen


def measured(session: EditSession, records: Sequence[FactRecord]) -> dict[str, float]:
    """ES, PS and NS; how many targets are the likeliest continuation token by token; how many the model's own answer to
    the edited prompt contains, as the evaluator ``generation`` counts it; all in %."""
    main = [(record.request.text, record) for record in records]
    asked = {
        kind: [(probe.prompt, record) for record in records for probe in record.of_kind(kind)]
        for kind in ("paraphrase", "neighborhood")
    }
    es, said = _shares(session, main)
    ps, paraphrases_said = _shares(session, asked["paraphrase"])
    new_wins, _ = _shares(session, asked["neighborhood"])
    return {
        "ES": es,
        "PS": ps,
        "NS": 100 - new_wins,
        "said": said,
        "generated": _generated(session, records),
        "paraphrases said": paraphrases_said,
    }


def _generated(session: EditSession, records: Sequence[FactRecord]) -> float:
    """How often the model's own answer to the edited prompt contains the new object, in %."""
    settings = GenerationHParams()
    wanted = [record.request.target_new for record in records]
    texts = session.generate([record.request.text for record in records], max_new_tokens=settings.answer_tokens)
    answers = [answer_of(text, settings.stop, [target]) for text, target in zip(texts, wanted, strict=True)]
    said = sum(is_said([target], answer) for answer, target in zip(answers, wanted, strict=True))
    return 100 * said / len(records)


def _shares(session: EditSession, asked: Sequence[tuple[str, FactRecord]]) -> tuple[float, float]:
    """How often the new object is likelier than the true one, and how often it is said, in %."""
    prompts = [prompt for prompt, _ in asked]
    new = score_targets(session.model, prompts, [record.request.target_new for _, record in asked])
    true = score_targets(session.model, prompts, [record.request.target_true or "" for _, record in asked])
    wins = sum(new_score.nll < true_score.nll for new_score, true_score in zip(new, true, strict=True))
    return 100 * wins / len(asked), 100 * sum(score.correct for score in new) / len(asked)


if __name__ == "__main__":
    main()
