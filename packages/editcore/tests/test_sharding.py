"""Work in shards: merged, it is what it would be in one piece, whoever does which part and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from editcore import Outcome, RunError
from editcore.execution.executors import attempt
from editcore.execution.sharding import ModelSource, sharded_moments
from editcore.models import LanguageModel
from editcore.second_moments import CorpusOptions
from editcore.second_moments.statistics import StatisticsStore, second_moments

Call = Callable[..., SimpleNamespace]

pytestmark = pytest.mark.usefixtures("toys")


class Shuffled:
    """Items from the last to the first, each ``workers``-th by the same worker."""

    shares_files = True

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(
        self,
        make: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        *,
        started: Callable[[int], None],
        accelerator: bool = False,
    ) -> Iterator[Outcome[Any]]:
        functions = [make() for _ in range(self.workers)]
        for index in reversed(range(len(items))):
            yield attempt(functions[index % self.workers], index, items[index])

    def close(self) -> None: ...


def test_sharded_moments_are_those_of_one_pass(small: Path) -> None:
    model = LanguageModel.load(str(small))
    sequences = torch.randint(5, 300, (150, 128), generator=torch.Generator().manual_seed(0))
    source, fingerprint = ModelSource(name=str(small)), model.base_fingerprint
    whole = second_moments(model, sequences, [0, 2])
    found = [sharded_moments(source, sequences, [0, 2], Shuffled(n), fingerprint=fingerprint) for n in (1, 3)]
    for layer, moment in whole.items():
        assert torch.equal(found[0][layer], found[1][layer])
        torch.testing.assert_close(found[0][layer], moment, rtol=1e-13, atol=1e-15)
    with pytest.raises(RunError, match="another model on the worker"):
        sharded_moments(source, sequences, [0], Shuffled(1), fingerprint="0" * 64)


def test_editctl_counts_in_shards(editctl: Call, small: Path, corpus_file: Path) -> None:
    arguments = ["stats", "compute", "--model", small, "--corpus", corpus_file, "--corpus-tokens", 2000, "--layer", 1]
    done = editctl(*arguments, "--executor", "inline")
    assert done.code == 0, done.err
    model = LanguageModel.load(str(small))
    store = StatisticsStore(model, CorpusOptions(name=str(corpus_file), tokens=2000))
    assert store.path(1).exists()
    sequences = store.corpus.sequences(model, 2000, 128)
    torch.testing.assert_close(store.moments([1])[1], second_moments(model, sequences, [1])[1], rtol=1e-13, atol=1e-15)
