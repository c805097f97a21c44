"""Solves in sequence against one dense solve of all facts, and facts that are left out against never having come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from editcore import NumericalError
from editcore.second_moments import Accumulator, Metric, SubspaceMetric
from hypothesis import given, settings, strategies as st
from torch import Tensor

PRIORS = ("moment", "moment and norm", "norm", "subspace")
EXACT = 1e-10

problems = st.tuples(st.integers(0, 10_000), st.integers(1, 5), st.integers(6, 16), st.integers(1, 5))
"""Seed, facts per batch, m, d. Six batches have fewer facts than m, or more."""


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def prior_of(kind: str, moment: Tensor) -> Metric:
    """S₀."""
    if kind == "subspace":
        _, vectors = torch.linalg.eigh(moment)
        return SubspaceMetric(vectors[:, : len(moment) // 2]).scaled(weight=0.3)
    if kind == "norm":
        return Metric.identity(len(moment)).scaled(weight=0.7)
    return Metric(moment).scaled(weight=3.0, ridge=0.2 if kind == "moment and norm" else 0.0)


class Solved:
    """Batches solved one after the other, with the weight that they lead to."""

    def __init__(self, kind: str, size: tuple[int, int, int, int], *, batches: int) -> None:
        seed, n, m, d = size
        generator = torch.Generator().manual_seed(seed)
        samples = random(generator, 4 * m, m)
        self.kind, self.moment = kind, samples.T @ samples / len(samples)
        self.start = random(generator, d, m)
        self.keys = [random(generator, n, m) for _ in range(batches)]
        self.values = [random(generator, n, d) for _ in range(batches)]
        self.weights = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 for _ in range(batches)]
        self.accumulator = Accumulator(prior_of(kind, self.moment))
        self.weight = self.start.clone()
        for keys, values, weights in zip(self.keys, self.values, self.weights, strict=True):
            update = self.accumulator.solve(keys, values - keys @ self.weight.T, weights=weights)
            self.weight += update.delta.dense()
            self.accumulator.update(keys, weights)

    def at_once(self, batches: Sequence[int]) -> Tensor:
        """The minimiser of Σ wᵢ‖Wkᵢ − vᵢ‖² + the prior, over some batches, by numpy's dense solve."""
        join = [np.concatenate([part[batch].numpy() for batch in batches]) for part in (self.keys, self.values)]
        keys, values = join
        weights = np.concatenate([self.weights[batch].numpy() for batch in batches])[:, None]
        basis, moment = np.eye(len(self.moment)), self.moment.numpy()
        if self.kind == "subspace":
            basis = np.linalg.eigh(moment)[1][:, : len(moment) // 2]
            prior = 0.3 * np.eye(basis.shape[1])
        else:
            prior = {
                "moment": 3.0 * moment,
                "moment and norm": 3.0 * moment + 0.2 * np.eye(len(moment)),
                "norm": 0.7 * np.eye(len(moment)),
            }[self.kind]
        inside = keys @ basis
        missing = values - keys @ self.start.numpy().T
        change = np.linalg.solve(inside.T @ (weights * inside) + prior, inside.T @ (weights * missing)).T @ basis.T
        return self.start + torch.from_numpy(change)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("batches", [2, 6])
@settings(max_examples=25, deadline=None)
@given(problems)
def test_batches_in_sequence_are_one_solve_of_all(kind: str, batches: int, size: tuple[int, int, int, int]) -> None:
    sequence = Solved(kind, size, batches=batches)
    assert relative(sequence.weight, sequence.at_once(range(batches))) < EXACT


@pytest.mark.parametrize("kind", PRIORS)
@settings(max_examples=25, deadline=None)
@given(problems, st.integers(0, 5))
def test_a_forgotten_batch_was_never_solved(kind: str, size: tuple[int, int, int, int], gone: int) -> None:
    """Whichever batch is left out, W is that of the sequence without it, and so is S: the batch can come again."""
    sequence = Solved(kind, size, batches=6)
    keys = sequence.keys[gone]
    misses = keys @ sequence.weight.T - sequence.values[gone]
    delta = sequence.accumulator.forget(keys, misses, sequence.weights[gone])
    assert delta.rank == len(keys)
    rest = [batch for batch in range(6) if batch != gone]
    left = sequence.weight + delta.dense()
    assert relative(left, sequence.at_once(rest)) < EXACT
    update = sequence.accumulator.solve(keys, sequence.values[gone] - keys @ left.T, weights=sequence.weights[gone])
    assert relative(left + update.delta.dense(), sequence.at_once(range(6))) < EXACT


def test_keys_that_are_not_in_the_sum_cannot_be_forgotten() -> None:
    sequence = Solved("moment", (3, 2, 8, 3), batches=2)
    stranger = 100 * torch.ones(1, 8, dtype=torch.float64)
    before = sequence.accumulator.metric
    with pytest.raises(NumericalError, match="not part of this sum"):
        sequence.accumulator.forget(stranger, torch.zeros(1, 3, dtype=torch.float64))
    assert sequence.accumulator.metric is before


@pytest.mark.parametrize("kind", PRIORS)
def test_the_price_of_a_change_counts_every_key(kind: str) -> None:
    """cost(Δ) = tr(Δ S₀ Δᵀ) + Σ w ‖Δk‖², for a change that the prior allows."""
    sequence = Solved(kind, (5, 2, 10, 3), batches=3)
    delta = Accumulator(prior_of(kind, sequence.moment)).solve(sequence.keys[0], sequence.values[0]).delta
    keys, weights = torch.cat(sequence.keys), torch.cat(sequence.weights)
    moved = ((keys @ delta.dense().T).square().sum(1) * weights).sum()
    expected = sequence.accumulator.prior.cost(delta) + float(moved)
    assert sequence.accumulator.metric.cost(delta) == pytest.approx(expected, rel=1e-9)


def test_a_subspace_lets_no_change_out() -> None:
    sequence = Solved("subspace", (9, 4, 8, 3), batches=6)
    metric = sequence.accumulator.metric
    assert metric.subspace is not None
    basis = metric.subspace[0]
    change = sequence.weight - sequence.start
    assert (change - change @ basis @ basis.T).norm() < 1e-12 * change.norm()
    assert metric.width == 8
    assert metric.subspace[1].width == 4
    torch.testing.assert_close(metric.matrix, basis @ metric.subspace[1].matrix @ basis.T)


def test_few_keys_reuse_the_factor_and_many_make_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is faster: a new factor costs m³/3, whatever the number of new keys."""
    factored: list[int] = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factored.append(len(matrix)) or cholesky(matrix))
    generator = torch.Generator().manual_seed(0)
    accumulator = Accumulator(Metric.identity(40).scaled(weight=2.0))
    dense = 2 * torch.eye(40, dtype=torch.float64)
    for _ in range(12):  # 48 keys at m = 40
        keys = random(generator, 4, 40)
        accumulator.update(keys)
        dense += keys.T @ keys
        columns = random(generator, 40, 2)
        torch.testing.assert_close(accumulator.metric.inverse_times(columns), torch.linalg.solve(dense, columns))
    assert factored.count(40) == 2, "after 24 and 48 keys"


def test_without_a_key_nothing_is_computed() -> None:
    """A price that depends on no text needs no matrix, which would not fit into memory here."""
    accumulator = Accumulator(Metric.identity(1_000_000))
    accumulator.update(torch.empty(0, 1_000_000))
    accumulator.downdate(torch.empty(0, 1_000_000))
    assert accumulator.metric is accumulator.prior
