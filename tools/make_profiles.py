"""Build the ``profiles`` data set: five facts about each of a few subjects.

The facts are the tables in ``tools/profiles/facts``, one TOML file per relation, which list real
subjects under their true object. ``tools/profiles/subjects.toml`` names the subjects that are
edited. Everything else (the objects, the wording, the neighbours, the order) follows from the seed,
so the same tables and seed give the same bytes.

    python tools/make_profiles.py            # write the data set
    python tools/make_profiles.py --check    # exit 1 if the committed file differs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from random import Random

from fact_tables import (
    Facts,
    FactsError,
    Record,
    check_facts,
    check_prompts,
    check_subject,
    check_templates,
    facts_of,
    make,
    read_table,
    take_least_used,
)

FACTS = Path(__file__).resolve().parent / "profiles" / "facts"
SUBJECTS = "subjects.toml"
"""Beside the folder of fact tables."""

FACTS_PER_SUBJECT = 5
NEIGHBOURS = 6
ELSEWHERE = 3
MIN_GAP = 10
"""In the shuffled order, at least this many facts of other subjects stand between two of one subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One fact table: the prompts (one ``{}`` each) and the subjects of every object."""

    name: str
    first: tuple[str, ...]
    """Prompts that begin with the subject."""
    middle: tuple[str, ...]
    """Prompts with the subject in the middle."""
    facts: Facts
    used_as_new: Counter[str] = field(default_factory=Counter)
    used_as_true: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Subjects that have facts of the same relations."""

    kind: str
    known: bool
    relations: tuple[str, ...]
    elsewhere: tuple[str, ...]
    """Prompts about the subject that ask for none of its facts."""
    subjects: tuple[str, ...]


def load_relation(path: Path) -> Relation:
    """Read and check one fact table; the file's stem is the relation id."""
    table = read_table(path)
    first, middle = tuple(table["first"]), tuple(table["middle"])
    relation = Relation(name=path.stem, first=first, middle=middle, facts=facts_of(table))
    check_relation(relation)
    return relation


def check_relation(relation: Relation) -> None:
    """Raise `FactsError` for prompts of a wrong kind, and for objects that cannot follow them alike."""
    where = f"{relation.name}.toml"
    check_templates((*relation.first, *relation.middle), where=where)
    check_facts(relation.facts, neighbours=NEIGHBOURS, where=where)
    if len(relation.first) != 2 or len(relation.middle) != 2:
        raise FactsError(f"{where}: needs two prompts that begin with the subject and two that do not.")
    for template, at_the_start in (*((t, True) for t in relation.first), *((t, False) for t in relation.middle)):
        if template.startswith("{}") != at_the_start or template.endswith("{}"):
            raise FactsError(f"{where}: {template!r} has its subject in the wrong place.")
        if template.endswith((" a", " an")):
            vowels = {target[0] in "aeiou" for target in relation.facts}
            if vowels != {template.endswith(" an")}:
                raise FactsError(f"{where}: the article in {template!r} does not fit every object.")
    if len({target[0].isupper() for target in relation.facts}) > 1:
        raise FactsError(f"{where}: some objects begin with a capital letter and some do not.")
    for target in relation.facts:
        if target.lower().startswith(("a ", "an ", "the ")):
            raise FactsError(f"{where}: the object {target!r} begins with an article.")


def load_groups(path: Path, relations: Mapping[str, Relation]) -> list[Group]:
    """Read and check the subjects to edit."""
    groups = [
        Group(
            kind=table["kind"],
            known=table["known"],
            relations=tuple(table["relations"]),
            elsewhere=tuple(table["elsewhere"]),
            subjects=tuple(table["subjects"]),
        )
        for table in read_table(path)["groups"]
    ]
    subjects = Counter(chain.from_iterable(group.subjects for group in groups))
    if several := [subject for subject, count in subjects.items() if count > 1]:
        raise FactsError(f"{path.name}: {several[0]!r} is listed more than once.")
    for group in groups:
        check_group(group, relations, where=path.name)
    return groups


def check_group(group: Group, relations: Mapping[str, Relation], *, where: str) -> None:
    """Raise `FactsError` for the wrong number of facts, and for a subject that the tables do not fit."""
    check_templates(group.elsewhere, where=where)
    if len(set(group.relations)) != FACTS_PER_SUBJECT or len(set(group.elsewhere)) != ELSEWHERE:
        raise FactsError(f"{where}: a group has {FACTS_PER_SUBJECT} relations and {ELSEWHERE} other prompts.")
    for name in group.relations:
        if name not in relations:
            raise FactsError(f"{where}: there is no table {name}.toml.")
        for subject in group.subjects:
            check_subject(subject, relations[name].facts, where=where)
            listed = true_object(relations[name], subject) is not None
            if listed != group.known:
                raise FactsError(f"{name}.toml: lists {subject!r}: {listed}; {where} says known: {group.known}.")


def true_object(relation: Relation, subject: str) -> str | None:
    """The object under which a table lists the subject; ``None`` for an invented subject."""
    return next((target for target, subjects in relation.facts.items() if subject in subjects), None)


def interleaved(groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """All subjects, those of each group spread evenly, so that any part of the list has some of each."""
    placed = [
        ((place + 0.5) / len(group.subjects), number, group, subject)
        for number, group in enumerate(groups)
        for place, subject in enumerate(group.subjects)
    ]
    return [(group, subject) for _, _, group, subject in sorted(placed, key=lambda entry: entry[:2])]


def choose_objects(subject: str, relations: Iterable[Relation], rng: Random) -> list[tuple[Relation, str, str]]:
    """Each relation with the true and the new object; no two facts of the subject share an object."""
    trues = {relation.name: true_object(relation, subject) for relation in relations}
    taken = {true for true in trues.values() if true is not None}
    chosen: list[tuple[Relation, str, str]] = []
    for relation in relations:
        true = trues[relation.name]
        if true is None:
            true = take_least_used([t for t in relation.facts if t not in taken], relation.used_as_true, rng)
            taken.add(true)
        new = take_least_used([t for t in relation.facts if t not in taken], relation.used_as_new, rng)
        taken.add(new)
        chosen.append((relation, true, new))
    return chosen


def build_subject(
    group: Group, subject: str, number: int, relations: Mapping[str, Relation], edited: frozenset[str], rng: Random
) -> list[Record]:
    """The facts of the subject with this number.

    Subjects begin with different relations. So the first facts of all subjects, which are used alone where fewer than
    five are wanted, are of all relations. The wording changes with every fact: in two of three facts in a row the
    prompt begins with the subject.
    """
    start = number % FACTS_PER_SUBJECT
    names = (*group.relations[start:], *group.relations[:start])
    records: list[Record] = []
    for place, (relation, true, new) in enumerate(choose_objects(subject, [relations[name] for name in names], rng)):
        if (number + place) % 3 < 2:
            prompt, *paraphrases = relation.first[0], relation.first[1], relation.middle[0]
        else:
            prompt, *paraphrases = relation.middle[0], relation.first[0], relation.middle[1]
        others = [name for name in relation.facts[true] if name not in edited]
        asked = [template.format(subject) for template in paraphrases]
        neighbours = [prompt.format(name) for name in rng.sample(others, NEIGHBOURS)]
        elsewhere = [template.format(subject) for template in group.elsewhere]
        check_prompts(
            subject,
            answers=(new, true),
            own=(prompt.format(subject), *asked, *elsewhere),
            neighbours=neighbours,
            where=f"{relation.name}.toml",
        )
        records.append(
            {
                "request": {
                    "id": f"{number:02}-{relation.name}",
                    "subject": subject,
                    "prompt": prompt,
                    "target_new": new,
                    "target_true": true,
                    "tags": [group.kind, "known" if group.known else "invented"],
                },
                "relation": relation.name,
                "probes": [
                    *({"kind": "paraphrase", "prompt": text, "answers": [new]} for text in asked),
                    *({"kind": "neighborhood", "prompt": text, "answers": [true]} for text in neighbours),
                    *({"kind": "locality.same_subject", "prompt": text} for text in elsewhere),
                ],
                "extra": {"fact": place + 1},
            }
        )
    return records


def shuffled_places(records: Sequence[Record], rng: Random) -> list[int]:
    """For each record its place in an order in which the facts of a subject are far apart."""
    while True:
        left: dict[str, list[int]] = {}
        for index, record in enumerate(records):
            left.setdefault(record["request"]["subject"], []).append(index)
        for indices in left.values():
            rng.shuffle(indices)
        order: list[int] = []
        recent: list[str] = []
        # A subject with more facts left is likelier to be next. Even so, the last ones may be of too few subjects;
        # then it begins again.
        while free := [name for name in left if name not in recent]:
            name = rng.choices(free, [len(left[name]) for name in free])[0]
            order.append(left[name].pop())
            if not left[name]:
                del left[name]
            recent = [*recent, name][-MIN_GAP:]
        if not left:
            places = {index: place for place, index in enumerate(order)}
            return [places[index] for index in range(len(records))]


def build(folder: Path, seed: int) -> tuple[list[Record], str]:
    """The records that the tables in a folder give, subject after subject, and what they are over."""
    relations = {path.stem: load_relation(path) for path in sorted(folder.glob("*.toml"))}
    groups = load_groups(folder.parent / SUBJECTS, relations)
    edited = frozenset(chain.from_iterable(group.subjects for group in groups))
    for relation in relations.values():
        for target, subjects in relation.facts.items():
            if len(set(subjects) - edited) < NEIGHBOURS:
                raise FactsError(f"{relation.name}.toml: {target!r} needs {NEIGHBOURS} subjects that are not edited.")
    rng = Random(f"{seed}:profiles")
    edits = interleaved(groups)
    records = list(
        chain.from_iterable(
            build_subject(group, subject, number, relations, edited, rng)
            for number, (group, subject) in enumerate(edits)
        )
    )
    for record, place in zip(records, shuffled_places(records, Random(f"{seed}:order")), strict=True):
        record["extra"]["shuffled"] = place
    return records, f"{len(edits)} subjects and {len(relations)} relations"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the data set; the exit status is 0 when the file is (now) right."""
    return make(argv, build, name="profiles", tables=FACTS)


if __name__ == "__main__":
    raise SystemExit(main())
