"""Build the ``worldfacts`` data set: counterfactual edits in the CounterFact schema.

The facts are the tables in ``tools/worldfacts/facts``, one TOML file per relation, which list
subjects under their true object. Everything else (which subjects are edited, the new target,
paraphrases, neighbours) follows from the seed, so the same tables and seed give the same bytes.

    python tools/make_worldfacts.py            # write the data set
    python tools/make_worldfacts.py --check    # exit 1 if the committed file differs
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FACTS = ROOT / "tools" / "worldfacts" / "facts"
OUTPUT = ROOT / "packages" / "editcore" / "src" / "editcore" / "datasets" / "worldfacts.jsonl"

DEFAULT_SEED = 0
NEIGHBOURS = 10
PARAPHRASES = 2
MAX_PER_RELATION = 24
MAX_SHARE = 0.10
"""No relation may hold more than this share of the records."""

LEAD_INS = (
    "It had rained all morning.",
    "The quiz went on for another hour.",
    "Nobody in the room said a word.",
    "The radio was still playing.",
    "There was one more question on the sheet.",
    "The bus was late again.",
    "Someone had left the window open.",
    "The lesson ended at noon.",
)
"""Sentences that say nothing about any subject; some paraphrases start with one."""

Record = dict[str, Any]


class FactsError(ValueError):
    """A fact table that cannot be turned into records, with the file and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One fact table: the templates (one ``{}`` each) and the subjects of every object."""

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    generation: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]


def contains(text: str, part: str) -> bool:
    """Whether ``part`` occurs in ``text``, letter case aside; inside a longer word counts too."""
    return part.casefold() in text.casefold()


def load_relation(path: Path) -> Relation:
    """Read and check one fact table; the file's stem is the relation id."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    relation = Relation(
        name=path.stem,
        prompt=table["prompt"],
        paraphrases=tuple(table["paraphrases"]),
        generation=tuple(table["generation"]),
        facts={target: tuple(subjects) for target, subjects in table["facts"].items()},
    )
    check_relation(relation)
    return relation


def check_relation(relation: Relation) -> None:
    """Raise `FactsError` for a table that would give ambiguous, leaking or too few prompts."""
    where = f"{relation.name}.toml"
    for template in (relation.prompt, *relation.paraphrases, *relation.generation):
        if template.count("{}") != 1 or template != template.strip():
            raise FactsError(f"{where}: {template!r} needs exactly one {{}} and no outer space.")
    if len(relation.paraphrases) < 4 or len(relation.generation) < 3:
        raise FactsError(f"{where}: needs at least 4 paraphrases and 3 generation templates.")
    if len(relation.facts) < 3:
        raise FactsError(f"{where}: has {len(relation.facts)} objects; at least 3 are needed.")
    for target, subjects in relation.facts.items():
        if len(subjects) <= NEIGHBOURS:
            raise FactsError(
                f"{where}: {target!r} has {len(subjects)} subjects; an edit and its neighbours "
                f"need at least {NEIGHBOURS + 1}."
            )
    subjects_of_all = list(chain.from_iterable(relation.facts.values()))
    for subject, count in Counter(subjects_of_all).items():
        if count > 1:
            raise FactsError(f"{where}: {subject!r} is listed {count} times; one object each.")
        for target in relation.facts:
            if contains(subject, target):
                raise FactsError(f"{where}: the subject {subject!r} gives away {target!r}.")


def choose_edited(relation: Relation, rng: Random, *, limit: int) -> list[tuple[str, str]]:
    """Pick up to ``limit`` (subject, object) pairs to edit, spread evenly over the objects.

    Each object keeps at least `NEIGHBOURS` subjects that are never edited, so that no edit of the
    set contradicts the neighbourhood of another, even when all records are edited at once.
    """
    queues: dict[str, list[str]] = {}
    for target, subjects in relation.facts.items():
        # A name inside another one ("Nile" in "Blue Nile") would be named by a neighbour.
        usable = [s for s in subjects if sum(contains(other, s) for other in subjects) == 1]
        rng.shuffle(usable)
        queues[target] = usable[: len(subjects) - NEIGHBOURS]
    targets = list(relation.facts)
    rng.shuffle(targets)
    edited: list[tuple[str, str]] = []
    while len(edited) < limit and any(queues.values()):
        for target in targets:
            if queues[target] and len(edited) < limit:
                edited.append((queues[target].pop(), target))
    return edited


def choose_paraphrases(relation: Relation, subject: str, rng: Random) -> list[str]:
    """Fill two of the paraphrase templates; every second record gets a lead-in on one of them."""
    filled = [t.format(subject) for t in rng.sample(relation.paraphrases, PARAPHRASES)]
    if rng.random() < 0.5:
        position = rng.randrange(PARAPHRASES)
        filled[position] = f"{rng.choice(LEAD_INS)} {filled[position]}"
    return filled


def build_relation(relation: Relation, *, seed: int) -> list[Record]:
    """Make one relation's records (``case_id`` 0; the caller numbers them), in random order."""
    rng = Random(f"{seed}:{relation.name}")
    edited = choose_edited(relation, rng, limit=MAX_PER_RELATION)
    rng.shuffle(edited)
    edited_subjects = {subject for subject, _ in edited}
    used_as_new: Counter[str] = Counter()
    records: list[Record] = []
    for subject, true in edited:
        others = [target for target in relation.facts if target != true]
        # Least used first, random among equals: every object is asked for about equally often.
        new = min(others, key=lambda target: (used_as_new[target], rng.random()))
        used_as_new[new] += 1
        pool = [s for s in relation.facts[true] if s not in edited_subjects]
        neighbours = [relation.prompt.format(s) for s in rng.sample(pool, NEIGHBOURS)]
        paraphrases = choose_paraphrases(relation, subject, rng)
        record: Record = {
            "case_id": 0,
            "requested_rewrite": {
                "prompt": relation.prompt,
                "relation_id": relation.name,
                "target_new": {"str": new},
                "target_true": {"str": true},
                "subject": subject,
            },
            "paraphrase_prompts": paraphrases,
            "neighborhood_prompts": neighbours,
            "generation_prompts": [template.format(subject) for template in relation.generation],
        }
        check_record(record)
        records.append(record)
    return records


def check_record(record: Record) -> None:
    """Raise `FactsError` if a prompt gives an answer away or a neighbour names the subject."""
    rewrite = record["requested_rewrite"]
    subject, relation = rewrite["subject"], rewrite["relation_id"]
    answers = [rewrite["target_new"]["str"], rewrite["target_true"]["str"]]
    neighbours = record["neighborhood_prompts"]
    own = [rewrite["prompt"].format(subject), *record["paraphrase_prompts"]]
    for prompt in [*own, *neighbours, *record["generation_prompts"]]:
        for answer in answers:
            if contains(prompt, answer):
                raise FactsError(f"{relation}.toml: the prompt {prompt!r} contains {answer!r}.")
    for prompt in neighbours:
        if contains(prompt, subject):
            raise FactsError(f"{relation}.toml: the neighbour {prompt!r} names {subject!r}.")


def build(relations: Sequence[Relation], *, seed: int) -> list[Record]:
    """Make the whole data set: one record of every relation per round, each round shuffled.

    So any run of records as long as the number of relations covers nearly all of them.
    """
    queues = [build_relation(relation, seed=seed) for relation in relations]
    rng = Random(f"{seed}:order")
    records: list[Record] = []
    for turn in range(max(map(len, queues), default=0)):
        this_round = [queue[turn] for queue in queues if turn < len(queue)]
        rng.shuffle(this_round)
        records.extend(this_round)
    for case_id, record in enumerate(records):
        record["case_id"] = case_id
    for queue in queues:
        if len(queue) > MAX_SHARE * len(records):
            name = queue[0]["requested_rewrite"]["relation_id"]
            raise FactsError(f"{name}.toml: {len(queue)} of {len(records)} records is too many.")
    return records


def render(records: Sequence[Record]) -> str:
    """One JSON object per line, UTF-8 characters kept."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the data set; the exit status is 0 when the file is (now) right."""
    parser = argparse.ArgumentParser(description="Build the worldfacts data set.")
    parser.add_argument("--facts", type=Path, default=FACTS, help="folder of fact tables")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSONL file to write")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(argv)

    try:
        relations = [load_relation(path) for path in sorted(args.facts.glob("*.toml"))]
        records = build(relations, seed=args.seed)
    except FactsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    text = render(records)
    summary = f"{len(records)} records over {len(relations)} relations"
    if args.check:
        found = args.output.read_text(encoding="utf-8") if args.output.exists() else ""
        if found != text:
            sys.stderr.write(
                f"{args.output} is not what the tables and seed {args.seed} give ({summary}). "
                "Run python tools/make_worldfacts.py and commit the result.\n"
            )
            return 1
        sys.stdout.write(f"{args.output.name} is up to date: {summary}\n")
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8", newline="\n")
    sys.stdout.write(f"wrote {args.output.name}: {summary}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
