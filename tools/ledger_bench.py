"""How long a large ledger takes to open and to verify: python tools/ledger_bench.py [--edits N] [--batch-size N]

Random factors, keys and values in the shapes of SmolLM2-135M (d_model 576, d_ff 1536), one layer. With ``--into DIR``,
an empty directory of ``editctl init --model smollm2-135m``, they become its edits, and opening its model is measured,
too, without and with its running sums. ``--held 1000 --batch-size 1`` is what replay makes of single edits. Seconds are
those of one processor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import editcore
import torch
from editcore import EditEvidence, EditRequest, FactoredDelta, HeldKey, KnownTarget
from editcore._util.memory import peak_memory_bytes
from editcore.interfaces.history import LedgerEntry
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import HeaderLine
from editcore.ledger.verify import verify
from editcore.runs.running_sums import keep_sums

__all__ = ["main"]

D_OUT, D_IN, WEIGHT = 576, 1536, "model.layers.3.mlp.down_proj.weight"


def main(arguments: list[str] | None = None) -> int:
    """Build, open, verify and sum up one ledger, and print the seconds that each took."""
    parser = argparse.ArgumentParser(prog="ledger_bench.py", description="Time a large ledger.")
    parser.add_argument("--edits", type=int, default=10_000, metavar="N")
    parser.add_argument("--batch-size", type=int, default=10, metavar="N")
    parser.add_argument("--held", type=int, default=0, metavar="N", help="Earlier facts whose keys a batch holds.")
    parser.add_argument("--into", type=Path, metavar="DIR", help="An empty directory of 'editctl init'.")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        directory = given.into or Path(name)
        if given.into is None:
            ledger = Ledger(directory, HeaderLine(model="smollm2-135m", fingerprint="0" * 64, editor="emmet"))
        else:
            ledger = Ledger.read(directory)
        with _timed(f"written: {given.edits} edits in batches of {given.batch_size}"):
            _build(ledger, given.edits, given.batch_size, held=given.held)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        lines = (directory / "ledger.jsonl").stat().st_size
        print(f"{size / 1e6:.0f} MB, {lines / 1e6:.0f} MB of them lines")
        with _timed("opened, with the facts that are active"):
            facts = len(Ledger.read(directory).facts())
        for sums in ("without", "with") if given.into is not None else ():
            with _timed(f"model opened, {sums} running sums"), editcore.workspace(directory) as opened:
                keep_sums(opened.session.edited, opened.ledger)
        with _timed("verified"):
            found = verify(directory)
        with _timed("all factors loaded and summed"):
            total = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
            for written in Ledger.read(directory).active():
                total += written.changes[WEIGHT].dense()
        print(f"{facts} facts, {found.lines} lines, {found.files} files, {len(found.problems)} problems")
    return int(facts != given.edits or bool(found.problems))


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.process_time()
    yield
    memory = peak_memory_bytes(torch.device("cpu")) / 1e6
    print(f"{time.process_time() - start:6.1f} s  {what}; {memory:.0f} MB at most so far", flush=True)


def _build(ledger: Ledger, edits: int, batch_size: int, *, held: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    facts: list[tuple[int, str]] = []
    for batch, start in enumerate(range(0, edits, batch_size)):
        requests = tuple(
            EditRequest(
                subject=f"Subject {number}", prompt="{} is located in the city of", target_new="Rome", id=str(number)
            )
            for number in range(start, min(start + batch_size, edits))
        )
        ledger.append(
            LedgerEntry(
                batch=batch,
                requests=requests,
                weights=(1.0,) * len(requests),
                num_new=len(requests),
                changes={WEIGHT: FactoredDelta(random(D_OUT, len(requests)), random(len(requests), D_IN))},
                known={
                    request.id: KnownTarget(keys={WEIGHT: random(D_IN)}, values={WEIGHT: random(D_OUT)})
                    for request in requests
                },
                held=HeldKey.ordered(
                    HeldKey(batch=earlier, request_id=name, keys={}, weight=0.01)
                    for earlier, name in facts[max(0, len(facts) - held) :]
                ),
                diagnostics={"layer_3_condition": 1.5, "layer_3_relative_change": 0.01},
                evidence=tuple(
                    EditEvidence(request_id=request.id, figures={"steps": 20.0, "target_loss": 0.1})
                    for request in requests
                ),
            )
        )
        facts += [(batch, request.id) for request in requests]


if __name__ == "__main__":
    sys.exit(main())
