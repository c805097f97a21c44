"""What trust keeps of a poisoned stream of edits, as Markdown tables.

    python tools/trust_table.py --model smollm2-135m --editor emmet --edits 100

A stream of clean facts is edited as it is, and with poisoned requests mixed in: values of absurd norms (a solved value,
stretched), contradictions of facts of earlier batches, and targets of 30 tokens. ES, PS and NS are those of the clean
facts in all cases. Presets and corpus are the defaults.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from editcore import (
    EditRequest,
    EditSession,
    FactRecord,
    KnownTarget,
    LanguageModel,
    Plugins,
    RejectedRequest,
    SessionConfig,
)
from editcore.cli.run import settings_from
from editcore.datasets import check_records, load_records

METRICS = ("ES", "PS", "NS", "score")
KINDS = ("norm", "contradiction", "long")
LONG_TOKENS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Requests in the order in which they are edited."""

    requests: tuple[EditRequest, ...]
    known: Mapping[str, KnownTarget]
    poison: Mapping[str, str]
    """What kind of poison a request is, by its id; clean ones are not in it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--editor", default="emmet")
    parser.add_argument("--dataset", default="worldfacts")
    parser.add_argument("--edits", type=int, default=100, help="clean facts")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--poison", type=float, default=0.05, help="poisoned requests per clean one")
    parser.add_argument("--stretch", type=float, default=30.0, help="how far a poisoned value is from where it was")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plugin", action="append", default=[], help="an extension beside trust, such as replay")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of editctl run")
    options = parser.parse_args(arguments)
    # A contradiction is poison here, so what was there first stays.
    base = {"trust": {"on_conflict": "keep"}}
    options.settings = settings_from(options.set, base, editor=options.editor)
    registry = Plugins.load()
    model = LanguageModel.load(options.model, families=registry.family_paths())
    available, _ = check_records(load_records(options.dataset, plugins=registry))
    clean, others = available[: options.edits], available[options.edits :]
    poisoned = poison(model, clean, others, options)
    plain = Stream(requests=tuple(record.request for record in clean), known={}, poison={})
    trusted = ["trust", *options.plugin]
    print(f"| {options.model}, {options.editor} | " + " | ".join(METRICS) + " | rejected |")
    print("|---|" + "---:|" * (len(METRICS) + 1))
    _arm("clean", model, plain, clean, options, options.plugin)
    _arm("clean, trust", model, plain, clean, options, trusted)
    _arm("poisoned", model, poisoned, clean, options, options.plugin)
    rejected = _arm("poisoned, trust", model, poisoned, clean, options, trusted)
    print("\n| rejected | kind | prompt | why |\n|---|---|---|---|")
    for rejection in rejected:
        request = rejection.request
        kind = poisoned.poison.get(request.id, "clean")
        print(f"| {request.id} | {kind} | {request.text} | {rejection.reason} |")
    missed = set(poisoned.poison) - {rejection.request.id for rejection in rejected}
    print(f"\n{len(poisoned.poison) - len(missed)} of {len(poisoned.poison)} poisoned requests were rejected.")
    for name in sorted(missed):
        print(f"Not rejected: {name} ({poisoned.poison[name]})")


def poison(
    model: LanguageModel, clean: Sequence[FactRecord], others: Sequence[FactRecord], options: argparse.Namespace
) -> Stream:
    """The clean requests with poisoned ones at random places, as many of each kind as of the others."""
    rng = random.Random(f"poison:{options.seed}")
    requests = [record.request for record in clean]
    known: dict[str, KnownTarget] = {}
    kinds: dict[str, str] = {}
    count = math.ceil(options.poison * len(clean))
    if count > len(others):
        raise SystemExit(f"{count} more records are needed for poison; {len(others)} are left. Lower --edits.")
    targets = sorted({record.request.target_new for record in (*clean, *others)})
    for number, record in enumerate(others[:count]):
        kind = KINDS[number % len(KINDS)]
        bad = record.request.model_copy(update={"id": f"poison-{number}"})
        place = rng.randrange(len(requests) + 1)
        if kind == "norm":
            known[bad.id] = _stretched(model, bad, options)
        elif kind == "long":
            bad = bad.model_copy(update={"target_new": _long(model, targets, rng)})
        else:  # a fact of an earlier batch, so that it stands when it is contradicted
            place = rng.randrange(2 * len(requests) // 3, len(requests) + 1)
            victim = rng.choice(requests[: len(requests) // 3])
            while victim.id in kinds:
                victim = rng.choice(requests[: len(requests) // 3])
            contradiction = rng.choice([target for target in targets if target != victim.target_new])
            bad = victim.model_copy(update={"id": bad.id, "target_new": contradiction})
        requests.insert(place, bad)
        kinds[bad.id] = kind
    return Stream(requests=tuple(requests), known=known, poison=kinds)


def _stretched(model: LanguageModel, request: EditRequest, options: argparse.Namespace) -> KnownTarget:
    """The solved key and value of a request, the value moved far away from what the model gives now."""
    session = _open(model, options, ())
    [result] = session.edit([request])
    session.close()
    solved = result.proposal.known[request.id]
    values = {}
    for name, value in solved.values.items():
        projection = model.projection(model.layout.layer_of(name))
        now = projection(solved.keys[name].to(model.weight(name))).detach().to(value)
        values[name] = now + options.stretch * (value - now)
    return replace(solved, values=values)


def _open(model: LanguageModel, options: argparse.Namespace, plugins: Sequence[str]) -> EditSession:
    settings = {name: values for name, values in options.settings.items() if name in (options.editor, *plugins)}
    return EditSession.open(
        model,
        SessionConfig(
            editor=options.editor, plugins=plugins, settings=settings, seed=options.seed, evaluators=("counterfact",)
        ),
    )


def _long(model: LanguageModel, words: Sequence[str], rng: random.Random) -> str:
    """Words of about :data:`LONG_TOKENS` tokens."""
    text = ""
    while len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) < LONG_TOKENS:
        text = f"{text} {rng.choice(words)}".strip()
    return text


def _arm(
    name: str,
    model: LanguageModel,
    stream: Stream,
    records: Sequence[FactRecord],
    options: argparse.Namespace,
    plugins: Sequence[str],
) -> tuple[RejectedRequest, ...]:
    """Edit a stream in a session of its own, print its line, and say what was rejected."""
    session = _open(model, options, plugins)
    session.edit(stream.requests, batch_size=options.batch_size, known=stream.known)
    found = session.evaluate(records).summary
    rejected = tuple(rejection for entry in session.ledger.batches for rejection in entry.all_rejected)
    session.close()
    cells = [f"{found.value(metric):.1f}" for metric in METRICS] + [str(len(rejected))]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return rejected


if __name__ == "__main__":
    main()
