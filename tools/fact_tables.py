"""What the scripts that make data sets share: fact tables, checks of prompts, writing or checking the file.

A fact table is a TOML file of one relation. Its section ``facts`` lists real subjects under their true object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

DATASETS = Path(__file__).resolve().parent.parent / "packages" / "editcore" / "src" / "editcore" / "datasets"

Record = dict[str, Any]
Facts = Mapping[str, tuple[str, ...]]
"""By object: the subjects for which it is the true one."""


class FactsError(ValueError):
    """A fact table that cannot be turned into records, with the file and the reason."""


def contains(text: str, part: str) -> bool:
    """Whether ``part`` occurs in ``text``, letter case aside; inside a longer word counts too."""
    return part.casefold() in text.casefold()


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file as it stands."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def facts_of(table: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The subjects of every object."""
    return {target: tuple(subjects) for target, subjects in table["facts"].items()}


def check_templates(templates: Iterable[str], *, where: str) -> None:
    """Raise `FactsError` for a prompt without a place for its subject."""
    for template in templates:
        if template.count("{}") != 1 or template != template.strip():
            raise FactsError(f"{where}: {template!r} needs exactly one {{}} and no outer space.")


def check_facts(facts: Facts, *, neighbours: int, where: str) -> None:
    """Raise `FactsError` for too few objects or subjects, and for ambiguous or leaking subjects."""
    if len(facts) < 3:
        raise FactsError(f"{where}: has {len(facts)} objects; at least 3 are needed.")
    for target, subjects in facts.items():
        if len(subjects) <= neighbours:
            raise FactsError(
                f"{where}: {target!r} has {len(subjects)} subjects; an edit and its neighbours "
                f"need at least {neighbours + 1}."
            )
    for subject, count in Counter(chain.from_iterable(facts.values())).items():
        if count > 1:
            raise FactsError(f"{where}: {subject!r} is listed {count} times; one object each.")
        check_subject(subject, facts, where=where)


def check_subject(subject: str, targets: Iterable[str], *, where: str) -> None:
    """Raise `FactsError` if the subject's name has one of the objects in it."""
    for target in targets:
        if contains(subject, target):
            raise FactsError(f"{where}: the subject {subject!r} gives away {target!r}.")


def check_prompts(
    subject: str, *, answers: Iterable[str], own: Iterable[str], neighbours: Iterable[str], where: str
) -> None:
    """Raise `FactsError` if a prompt gives an answer away or a neighbour names the subject."""
    neighbours, answers = list(neighbours), list(answers)
    for prompt in [*own, *neighbours]:
        for answer in answers:
            if contains(prompt, answer):
                raise FactsError(f"{where}: the prompt {prompt!r} contains {answer!r}.")
    for prompt in neighbours:
        if contains(prompt, subject):
            raise FactsError(f"{where}: the neighbour {prompt!r} names {subject!r}.")


def take_least_used(targets: Iterable[str], used: Counter[str], rng: Random) -> str:
    """The object that was taken least often so far, random among equals, and count it.

    Taken so, every object is used about equally often.
    """
    taken = min(targets, key=lambda target: (used[target], rng.random()))
    used[taken] += 1
    return taken


def render(records: Sequence[Record]) -> str:
    """One JSON object per line, UTF-8 characters kept."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def make(
    argv: Sequence[str] | None,
    build: Callable[[Path, int], tuple[Sequence[Record], str]],
    *,
    name: str,
    tables: Path,
    seed: int = 0,
) -> int:
    """The command line of such a script: write or check the data set ``name``.

    Args:
        build: called with the folder of tables and the seed; returns the records, and what they are over ("21
            relations").
        tables: the folder, unless ``--facts`` names another.
        seed: unless ``--seed`` gives another.

    Returns:
        The exit status: 0 when the file is (now) right.
    """
    parser = argparse.ArgumentParser(description=f"Build the {name} data set.")
    parser.add_argument("--facts", type=Path, default=tables, help="folder of fact tables")
    parser.add_argument("--output", type=Path, default=DATASETS / f"{name}.jsonl", help="JSONL file to write")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(argv)

    try:
        records, over = build(args.facts, args.seed)
    except FactsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    text = render(records)
    summary = f"{len(records)} records over {over}"
    if args.check:
        found = args.output.read_text(encoding="utf-8") if args.output.exists() else ""
        if found != text:
            sys.stderr.write(
                f"{args.output} is not what the tables and seed {args.seed} give ({summary}). "
                f"Run python tools/make_{name}.py and commit the result.\n"
            )
            return 1
        sys.stdout.write(f"{args.output.name} is up to date: {summary}\n")
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8", newline="\n")
    sys.stdout.write(f"wrote {args.output.name}: {summary}\n")
    return 0
