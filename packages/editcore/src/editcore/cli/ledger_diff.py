"""``editctl ledger RUN diff OTHER``: what another directory's model was told otherwise, in words for a reviewer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Iterator

    from editcore.interfaces.history import Signature
    from editcore.ledger.compare import Comparison
    from editcore.ledger.ledger import Ledger

__all__ = ["diff"]


def diff(
    ctx: typer.Context,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another run directory.")],
    as_json: AsJson = False,
) -> None:
    """Say what OTHER has otherwise than RUN: its facts, its batches and its weights.

    No model is loaded.
    """
    from editcore.cli.console import print_json, print_table
    from editcore.ledger.compare import compare, weight_differences
    from editcore.ledger.ledger import Ledger
    from editcore.runs.state import DirectoryState

    run: Path = ctx.meta["run"]
    first, second = Ledger.read(run), Ledger.read(other)
    found = compare(first, second)
    norms = {**DirectoryState.norms_of(other), **DirectoryState.norms_of(run)}
    compared = found.same_model and not found.same_weights
    weights = weight_differences(first, second) if compared else {}
    rows = [
        *(("added", fact.text, "", fact.target_new, _who(by)) for fact, by in found.added),
        *(("taken out", fact.text, fact.target_new, "", _who(by)) for fact, by in found.removed),
        *(("corrected", old.text, old.target_new, new.target_new, _who(by)) for old, new, by in found.corrected),
    ]
    if as_json:
        names = ("what", "prompt", "here", "there", "by")
        print_json(
            {
                "same": found.same,
                "facts": [dict(zip(names, row, strict=True)) for row in rows],
                "same_model": found.same_model,
                "same_batches": found.same_batches,
                "only_here": found.only_first,
                "only_there": found.only_second,
                "solved_again": list(found.solved_again),
                "same_weights": found.same_weights and found.same_model,
                "weights": {
                    address: {"norm": norm, "relative": _share(norm, norms.get(address))}
                    for address, norm in weights.items()
                },
            }
        )
        return
    here, there = (str(run), str(other)) if run.name == other.name else (run.name, other.name)
    if rows:
        print_table(("", "prompt", f"in {here}", f"in {there}", "by"), rows)
    for sentence in _sentences(found, first, here, there):
        typer.echo(sentence)
    if weights:
        print_table(
            ("weight", f"{there} differs from {here} by"),
            [(address, _size(norm, norms.get(address))) for address, norm in weights.items()],
        )
        if not weights.keys() <= norms.keys():
            typer.echo(f"'editctl check {run}' measures the weights, so that this can be said in percent.")


def _sentences(found: Comparison, first: Ledger, here: str, there: str) -> Iterator[str]:
    from editcore._util.words import counted

    be = "is" if found.same == 1 else "are"
    yield (
        f"Facts: {len(found.added)} added, {len(found.removed)} taken out, {len(found.corrected)} corrected; "
        f"{found.same} {be} the same in both."
    )
    if not found.same_model:
        yield "The two have different base models, so their batches and weights are not compared."
        return
    model = "" if first.header is None else f" of {first.header.model}"
    if found.same_batches:
        yield (
            f"Both are edits{model}, and begin with the same {counted(found.same_batches, 'batch', 'batches')}. "
            f"{here} has {found.only_first} more, {there} has {found.only_second} more."
        )
    else:
        yield f"Both are edits{model}; they have no batch in common."
    if found.solved_again:
        yield (
            f"Solved again, because other facts are taken out: batch{'es' * (len(found.solved_again) > 1)} "
            f"{', '.join(map(str, found.solved_again))}."
        )
    if found.same_weights:
        yield "The edited weights are the same, bit for bit."


def _who(signature: Signature | None) -> str:
    if signature is None:
        return ""
    return f"{signature.author}, {signature.day}" + (f": {signature.note}" if signature.note else "")


def _share(norm: float, whole: float | None) -> float | None:
    return norm / whole if whole else None


def _size(norm: float, whole: float | None) -> str:
    share = _share(norm, whole)
    return f"‖ΔW‖ = {norm:.3g}" if share is None else f"{100 * share:.2g} % of the weight (‖ΔW‖ / ‖W‖)"
