"""How long a large ledger takes to open and to verify: python tools/ledger_bench.py [--edits N] [--batch-size N]

Random factors, keys and values in the shapes of SmolLM2-135M (d_model 576, d_ff 1536), one layer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from editcore import EditEvidence, EditRequest, FactoredDelta, KnownTarget
from editcore.interfaces.history import LedgerEntry
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import HeaderLine
from editcore.ledger.verify import verify

__all__ = ["main"]

D_OUT, D_IN, WEIGHT = 576, 1536, "model.layers.3.mlp.down_proj.weight"


def main(arguments: list[str] | None = None) -> int:
    """Build, open, verify and sum up one ledger, and print the seconds that each took."""
    parser = argparse.ArgumentParser(prog="ledger_bench.py", description="Time a large ledger.")
    parser.add_argument("--edits", type=int, default=10_000, metavar="N")
    parser.add_argument("--batch-size", type=int, default=10, metavar="N")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with _timed(f"written: {given.edits} edits in batches of {given.batch_size}"):
            _build(directory, given.edits, given.batch_size)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        lines = (directory / "ledger.jsonl").stat().st_size
        print(f"{size / 1e6:.0f} MB, {lines / 1e6:.0f} MB of them lines")
        with _timed("opened, with the facts that are active"):
            facts = len(Ledger.read(directory).facts())
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
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:6.1f} s  {what}", flush=True)


def _build(directory: Path, edits: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ledger = Ledger(directory, HeaderLine(model="smollm2-135m", fingerprint="0" * 64, editor="emmet"))
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
                    one.id: KnownTarget(keys={WEIGHT: random(D_IN)}, values={WEIGHT: random(D_OUT)}) for one in requests
                },
                diagnostics={"layer_3_condition": 1.5, "layer_3_relative_change": 0.01},
                evidence=tuple(
                    EditEvidence(request_id=one.id, figures={"steps": 20.0, "target_loss": 0.1}) for one in requests
                ),
            )
        )


if __name__ == "__main__":
    sys.exit(main())
