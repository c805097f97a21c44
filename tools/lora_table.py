"""Measure what edits keep as adapters: python tools/lora_table.py --edits 500 --out runs/lora-table

Writes facts one batch after another, once, and then measures every prefix at a checkpoint in each form: without edits,
in the weights, as an exact adapter, and cut to each rank by both criteria. Rows go to table.csv as they are measured;
started again, the tool goes on where it was. table.md has the same as Markdown.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch
from edit_lora.backend import LoraBackend
from edit_lora.hparams import LoraHParams
from editcore import BackendContext, Changes, EditcoreError, EditSession, FactRecord, SessionConfig
from editcore.cli import TerminalProgress
from editcore.datasets import check_records, load_records
from editcore.settings.hparams import parse_assignment
from torch import Tensor

__all__ = ["Form", "Row", "main", "measure", "table"]


@dataclass(frozen=True)
class Form:
    """A way to hold edits."""

    name: str
    """``none``, ``raw``, ``lora`` (exact) or a criterion."""
    rank: int | None = None


@dataclass(frozen=True)
class Row:
    """One form at one checkpoint; scores in percent over the facts written so far, and what their neighbours say."""

    edits: int
    form: str
    rank: int
    """Of the adapter; 0 where there is none."""
    facts: int
    """Facts scored: all that were written, or of the cut forms a sample."""
    ES: float
    PS: float
    NS: float
    score: float
    kept_text: float
    """1 − ‖(Δ − BA) C^½‖² / ‖Δ C^½‖²."""
    kept_keys: float
    """1 − ‖(Δ − BA) Kᵀ‖² / ‖ΔKᵀ‖²."""
    kept_norm: float
    """1 − ‖Δ − BA‖² / ‖Δ‖²."""
    logits_off: float
    """Largest difference of last-token logits from raw's, over the prompts compared."""


def forms(ranks: Sequence[int]) -> list[Form]:
    """In the order of the table."""
    cut = [Form(criterion, rank) for rank in ranks for criterion in ("frobenius", "weighted")]
    return [Form("none"), Form("raw"), Form("lora"), *cut]


def edit_up_to(
    session: EditSession, records: Sequence[FactRecord], checkpoints: Sequence[int], batch_size: int
) -> None:
    """Write the facts that the ledger does not have yet; a batch ends where a checkpoint falls."""
    done = sum(entry.num_new for entry in session.ledger.entries)
    with session.context.progress.task("editing", checkpoints[-1]) as advance:
        advance(done)
        for stop in checkpoints:
            while done < stop:
                size = min(batch_size, stop - done)
                session.edit([record.request for record in records[done : done + size]])
                done += size
                advance(size)


def prefix(session: EditSession, edits: int) -> list[Changes]:
    """The changes of the batches that wrote the first facts."""
    found, done = [], 0
    for entry in session.ledger.entries:
        if done >= edits:
            break
        found.append(entry.changes)
        done += entry.num_new
    return found


@torch.inference_mode()
def last_logits(session: EditSession, prompts: Sequence[str]) -> Tensor:
    """``[prompts, vocab]``"""
    parts = []
    for start in range(0, len(prompts), 16):
        encoded = session.model.encode(prompts[start : start + 16])
        logits = session.model.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
        ends = encoded.attention_mask.sum(1) - 1
        parts.append(logits[torch.arange(len(ends)), ends].float())
    return torch.cat(parts)


def spread(records: Sequence[FactRecord], number: int) -> list[FactRecord]:
    """``number`` of them from the first to the last at equal distances, or all."""
    number = min(number, len(records))
    return [records[index * len(records) // number] for index in range(number)]


def measure(
    session: EditSession,
    records: Sequence[FactRecord],
    active: list[Changes],
    form: Form,
    prompts: Sequence[str],
    *,
    edits: int,
) -> Row:
    """One row, scored on ``records``; the model is unedited before and after."""
    session.backend.rebuild(active)
    reference = last_logits(session, prompts)
    kept = {"rank": 0, "kept_weighted": 1.0, "kept_keys": 1.0, "kept_frobenius": 1.0}
    backend = session.backend
    if form.name != "raw":
        session.backend.rebuild([])
        backend = LoraBackend(hparams_of(form))
        backend.take(BackendContext(metrics=session.context.statistics.metrics))
        backend.open(session.model)
        backend.rebuild([] if form.name == "none" else active)
        kept |= {name: value for name, value in backend.statistics().items() if value is not None}
    try:
        off = float((last_logits(session, prompts) - reference).abs().max())
        summary = session.evaluate(records).summary
    finally:
        backend.rebuild([])
    return Row(
        edits=edits,
        form=form.name,
        rank=int(kept["rank"]),
        facts=len(records),
        ES=summary.value("ES"),
        PS=summary.value("PS"),
        NS=summary.value("NS"),
        score=summary.value("score"),
        kept_text=kept["kept_weighted"],
        kept_keys=kept["kept_keys"],
        kept_norm=kept["kept_frobenius"],
        logits_off=off,
    )


def hparams_of(form: Form) -> LoraHParams:
    """The backend's settings for a form."""
    if form.rank is None:
        return LoraHParams()
    return LoraHParams.model_validate({"lora_rank": form.rank, "lora_criterion": form.name})


def read_rows(path: Path) -> list[Row]:
    """What was measured before."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Row)}
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def add_row(path: Path, row: Row) -> None:
    """Append, with a heading if it is the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(asdict(row))
        writer.writerow(astuple(row))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| edits | form | rank | facts | ES | PS | NS | score | kept: text | keys | of ‖Δ‖² | logits off raw's |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        scores = " | ".join(f"{value:.1f}" for value in (row.ES, row.PS, row.NS, row.score))
        held = row.form in ("lora", "frobenius", "weighted")
        kept = (f"{100 * value:.1f} %" if held else "" for value in (row.kept_text, row.kept_keys, row.kept_norm))
        rank = row.rank if held else ""
        cells = (row.edits, row.form, rank, row.facts, scores, " | ".join(kept), f"{row.logits_off:.2g}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def missing(rows: Sequence[Row], checkpoints: Sequence[int], wanted: Sequence[Form]) -> Iterator[tuple[int, Form]]:
    """What is not measured yet. A cut to a rank that all edits fit is the exact adapter, and left out."""
    have = {(row.edits, row.form, row.rank if row.form in ("frobenius", "weighted") else None) for row in rows}
    for edits in checkpoints:
        for form in wanted:
            fits = form.rank is not None and form.rank >= edits
            if not fits and (edits, form.name, form.rank) not in have:
                yield edits, form


def numbers(text: str) -> tuple[int, ...]:
    """``"15,50"``, ascending."""
    return tuple(sorted({int(part) for part in text.split(",")}))


def main(arguments: list[str] | None = None) -> int:
    """Edit, measure, write."""
    parser = argparse.ArgumentParser(prog="lora_table.py", description="Measure what edits keep as adapters.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--editor", default="emmet")
    parser.add_argument("--dataset", default="worldfacts")
    parser.add_argument("--edits", type=int, default=500, help="facts to write; checkpoints beyond are left out")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--checkpoints", type=numbers, default=(15, 50, 100, 250, 500), metavar="N,N,...")
    parser.add_argument("--ranks", type=numbers, default=(16, 32, 64, 128), metavar="R,R,...")
    parser.add_argument("--prompts", type=int, default=200, help="prompts whose logits are compared")
    parser.add_argument("--sample", type=int, metavar="N", help="facts to score cut forms on; all if left out")
    parser.add_argument("--corpus", default="self")
    parser.add_argument("--corpus-tokens", type=int)
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except EditcoreError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    session = EditSession.open(
        given.model,
        SessionConfig(
            editor=given.editor,
            settings={given.editor: dict(map(parse_assignment, given.assignments))},
            corpus=given.corpus,
            corpus_tokens=given.corpus_tokens,
            evaluators=("counterfact",),
        ),
        directory=given.out / "run",
        progress=TerminalProgress(),
    )
    records, _ = check_records(load_records(given.dataset, plugins=session.plugins)[: given.edits])
    checkpoints = sorted({min(number, len(records)) for number in given.checkpoints if number <= given.edits})
    if not checkpoints:
        print(f"Error: no checkpoint lies within {given.edits} edits.", file=sys.stderr)
        return 2
    edit_up_to(session, records, checkpoints, given.batch_size)
    asked = [(record, [*record.of_kind("paraphrase"), *record.of_kind("neighborhood")]) for record in records]
    every = [
        prompt for record, probes in asked for prompt in (record.request.text, *(probe.prompt for probe in probes))
    ]
    prompts = every[:: max(1, len(every) // given.prompts)][: given.prompts]
    path = given.out / "table.csv"
    for edits, form in list(missing(read_rows(path), checkpoints, forms(given.ranks))):
        scored = records[:edits] if form.rank is None else spread(records[:edits], given.sample or edits)
        row = measure(session, scored, prefix(session, edits), form, prompts, edits=edits)
        add_row(path, row)
        print(f"{edits} edits, {form.name} {form.rank or ''}: ES {row.ES:.1f}, PS {row.PS:.1f}, NS {row.NS:.1f}")
    (given.out / "table.md").write_text(table(read_rows(path)), encoding="utf-8")
    print(f"Wrote {path} and {given.out / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
