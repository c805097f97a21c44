"""Build the ``worldfacts`` data set: counterfactual edits in the CounterFact schema.

The facts are the tables in ``tools/worldfacts/facts``, one TOML file per relation, which list
subjects under their true object. Everything else (which subjects are edited, the new target,
paraphrases, neighbours) follows from the seed, so the same tables and seed give the same bytes.

    python tools/make_worldfacts.py            # write the data set
    python tools/make_worldfacts.py --check    # exit 1 if the committed file differs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fact_tables import (
    Facts,
    FactsError,
    Record,
    check_facts,
    check_prompts,
    check_templates,
    contains,
    facts_of,
    make,
    read_table,
    take_least_used,
)

FACTS = Path(__file__).resolve().parent / "worldfacts" / "facts"

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One fact table: the templates (one ``{}`` each) and the subjects of every object."""

    name: str
    prompt: str
    question: str
    paraphrases: tuple[str, ...]
    generation: tuple[str, ...]
    facts: Facts


def load_relation(path: Path) -> Relation:
    """Read and check one fact table; the file's stem is the relation id."""
    table = read_table(path)
    relation = Relation(
        name=path.stem,
        prompt=table["prompt"],
        question=table["question"],
        paraphrases=tuple(table["paraphrases"]),
        generation=tuple(table["generation"]),
        facts=facts_of(table),
    )
    check_relation(relation)
    return relation


def check_relation(relation: Relation) -> None:
    """Raise `FactsError` for a table that would give ambiguous, leaking or too few prompts."""
    where = f"{relation.name}.toml"
    check_templates((relation.prompt, relation.question, *relation.paraphrases, *relation.generation), where=where)
    if len(relation.paraphrases) < 4 or len(relation.generation) < 3:
        raise FactsError(f"{where}: needs at least 4 paraphrases and 3 generation templates.")
    check_facts(relation.facts, neighbours=NEIGHBOURS, where=where)


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
        new = take_least_used(others, used_as_new, rng)
        pool = [s for s in relation.facts[true] if s not in edited_subjects]
        neighbours = [relation.prompt.format(s) for s in rng.sample(pool, NEIGHBOURS)]
        paraphrases = choose_paraphrases(relation, subject, rng)
        record: Record = {
            "case_id": 0,
            "question": relation.question,
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
        check_prompts(
            subject,
            answers=(new, true),
            own=(relation.prompt.format(subject), *paraphrases, *record["generation_prompts"]),
            neighbours=neighbours,
            where=f"{relation.name}.toml",
        )
        records.append(record)
    return records


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


def build_all(folder: Path, seed: int) -> tuple[list[Record], str]:
    """The records that the tables in a folder give, and what they are over."""
    relations = [load_relation(path) for path in sorted(folder.glob("*.toml"))]
    return build(relations, seed=seed), f"{len(relations)} relations"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the data set; the exit status is 0 when the file is (now) right."""
    return make(argv, build_all, name="worldfacts", tables=FACTS)


if __name__ == "__main__":
    raise SystemExit(main())
