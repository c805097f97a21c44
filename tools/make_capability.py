"""Build the capability items: arithmetic, copying, following an instruction, and facts that are not edited.

Words and facts are in ``tools/capability/tables.toml``; everything else follows from the seed, so the same tables and
seed give the same bytes. Each prompt shows three solved items of its kind first, so that a model without any
instruction tuning can tell what is asked.

    python tools/make_capability.py            # write the items
    python tools/make_capability.py --check    # exit 1 if the committed file differs
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["Item", "build", "main"]

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "tools" / "capability" / "tables.toml"
TARGET = ROOT / "packages" / "editcore" / "src" / "editcore" / "evaluation" / "capability.jsonl"
SHOTS = 3
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question with its one right answer."""

    kind: str
    prompt: str
    answer: str


Solved = tuple[str, str]
"""A question and its answer, before the shots are put in front."""


def build(tables: dict[str, Any], seed: int = SEED) -> list[Item]:
    """Every item, kind by kind."""
    random = Random(seed)
    items = [
        *_shown("arithmetic", _sums(random, 40), "{} =", random),
        *_shown("arithmetic", _differences(random, 30), "{} =", random),
        *_shown("arithmetic", _products(random, 20), "{} =", random),
        *_shown("copying", _copies(tables["words"], random, 70), "Input: {}\nOutput:", random),
    ]
    for instruction, solved in _instructions(tables, random):
        items += _shown("instructions", solved, f"{instruction}: {{}}\nAnswer:", random)
    for relation in tables["facts"]:
        solved = list(relation["objects"].items())
        items += _shown("facts", solved, relation["prompt"], random)
    return items


def _shown(kind: str, solved: Sequence[Solved], template: str, random: Random) -> Iterator[Item]:
    """An item for each question, after some others with their answers."""
    for question, answer in solved:
        others = random.sample([pair for pair in solved if pair[0] != question], SHOTS)
        shots = "".join(f"{template.replace('{}', other)} {right}\n" for other, right in others)
        yield Item(kind=kind, prompt=shots + template.replace("{}", question), answer=answer)


def _distinct(make: Any, count: int) -> list[Solved]:
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = make()
        found[question] = answer
    return list(found.items())


def _sums(random: Random, count: int) -> list[Solved]:
    def make() -> Solved:
        first, second = random.randint(1, 20), random.randint(1, 20)
        return f"{first} + {second}", str(first + second)

    return _distinct(make, count)


def _differences(random: Random, count: int) -> list[Solved]:
    def make() -> Solved:
        smaller, rest = random.randint(1, 10), random.randint(1, 10)
        return f"{smaller + rest} - {smaller}", str(rest)

    return _distinct(make, count)


def _products(random: Random, count: int) -> list[Solved]:
    def make() -> Solved:
        first, second = random.randint(1, 6), random.randint(1, 10)
        return f"{first} * {second}", str(first * second)

    return _distinct(make, count)


def _copies(words: Sequence[str], random: Random, count: int) -> list[Solved]:
    def make() -> Solved:
        text = " ".join(random.sample(words, random.randint(2, 4)))
        return text, text

    return _distinct(make, count)


def _instructions(tables: dict[str, Any], random: Random) -> Iterator[tuple[str, list[Solved]]]:
    words = tables["words"]

    def listed(pick: Any) -> list[Solved]:
        def make() -> Solved:
            chosen = random.sample(words, 3)
            return ", ".join(chosen), pick(chosen)

        return _distinct(make, 20)

    yield "Write the first word", listed(lambda chosen: chosen[0])
    yield "Write the last word", listed(lambda chosen: chosen[-1])
    yield "Write the word in capital letters", [(word, word.upper()) for word in words[:20]]
    yield "Write the plural", list(tables["plurals"].items())
    yield "Write the opposite", list(tables["opposites"].items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description="Build the built-in capability items.")
    parser.add_argument("--check", action="store_true", help="only compare the committed file")
    options = parser.parse_args(arguments)
    items = build(tomllib.loads(TABLES.read_text(encoding="utf-8")))
    text = "".join(f"{json.dumps(asdict(item), ensure_ascii=False)}\n" for item in items)
    if options.check:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET} is not what make_capability.py writes; run it again.", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    print(f"Wrote {len(items)} items to {TARGET}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
