"""The built-in backend keeps the contract of backends, and rounds each weight once."""

from __future__ import annotations

import random

import pytest
import torch
from editcore import Changes, FactoredDelta, LanguageModel
from editcore.runs import backends
from editcore.runs.backends import RawBackend
from editcore.testing import BackendContract, tiny_model


class TestRawBackendContract(BackendContract):
    """On Linear and Conv1D."""

    @pytest.fixture
    def backend_name(self) -> str:
        return "raw"


def test_the_sum_over_batches_is_rounded_once() -> None:
    model = tiny_model()
    name = model.layout.weight_name(0)
    base = model.weight(name).detach().clone()
    backend = RawBackend()
    backend.open(model)
    # Each alone is lost in float32; a thousand of them are not.
    left, right = torch.full((32, 1), 1.0, dtype=torch.float64), torch.full((1, 64), 1e-9, dtype=torch.float64)
    for _ in range(1000):
        backend.apply({name: FactoredDelta(left, right)})
    expected = (base.double() + 1000 * 1e-9).float()
    # Summing 1000 float64 terms errs by 1e-13, which moves a float32 of size 1 by one unit at the most.
    torch.testing.assert_close(model.weight(name), expected, rtol=1.2e-7, atol=1e-9)
    assert not torch.equal(model.weight(name), base)


def thin(model: LanguageModel, seed: int) -> Changes:
    """A change of rank 8 of both projections, of the size of an edit."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)

    names = [model.layout.weight_name(layer) for layer in (0, 1)]
    # Not in rows, as a solve may give them: the ledger keeps them in rows.
    return {name: FactoredDelta(random(8, model.layout.d_model).T, random(model.layout.d_ff, 8).T) for name in names}


def opened(model: LanguageModel) -> RawBackend:
    backend = RawBackend()
    backend.open(model)
    return backend


def weights(model: LanguageModel) -> list[torch.Tensor]:
    return [model.weight(name).detach().clone() for name in model.weights.names()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_trial_has_the_bits_that_are_written_afterwards(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    backend, before = opened(model), weights(model)
    for seed in range(4):
        on_trial = thin(model, seed)
        kept: Changes = {
            name: FactoredDelta(*(tensor.contiguous() for tensor in change.tensors().values()))
            for name, change in on_trial.items()
        }
        previous = weights(model)
        with backend.trial(on_trial), backend.trial(thin(model, 9)):
            pass
        assert all(map(torch.equal, weights(model), previous))
        with backend.trial(on_trial):
            tried = weights(model)
        assert all(map(torch.equal, weights(model), previous))
        backend.apply(kept)
        assert all(map(torch.equal, weights(model), tried))
    backend.rebuild([])
    assert all(map(torch.equal, weights(model), before))


def test_a_trial_inside_a_trial_is_both(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    backend = opened(model)
    for seed in (0, 1):
        backend.apply(thin(model, seed))
    with backend.trial(thin(model, 2)), backend.trial(thin(model, 3)):
        tried = weights(model)
    for seed in (2, 3):
        backend.apply(thin(model, seed))
    assert all(map(torch.equal, weights(model), tried))


@pytest.mark.parametrize("room", [0, 20_000, 10**9])
def test_a_batch_costs_one_batch_and_gives_the_bits_of_all(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sum has room, the batches before it are not multiplied out again; undoing is summing anew."""
    model = tiny_model(dtype=torch.bfloat16)
    backend = opened(model)
    backend._max_sum_bytes = room
    multiplied = []
    monkeypatch.setattr(
        backends,
        "in_float64",
        lambda change, *more, work=backends.in_float64: multiplied.append(change) or work(change, *more),
    )
    batches = [thin(model, seed) for seed in range(6)]
    for batch in batches:
        backend.apply(batch)
    # Two weights a batch: both sums, one of them (16 kB), or none have room.
    assert len(multiplied) == {0: 2 * 21, 20_000: 6 + 21, 10**9: 2 * 6}[room]
    found = weights(model)
    fresh = tiny_model(dtype=torch.bfloat16)
    again = opened(fresh)
    again.rebuild(batches)
    assert all(map(torch.equal, weights(fresh), found))
    del batches[2]
    backend.rebuild(batches)
    again.open(fresh := tiny_model(dtype=torch.bfloat16))
    for batch in batches:
        again.apply(batch)
    assert all(map(torch.equal, weights(fresh), weights(model)))


def test_whatever_was_active_before_the_sums_are_those_of_what_is_active() -> None:
    """One backend over a hundred steps, against a new one at each."""
    draw = random.Random(0)
    model, fresh = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    first, second = model.layout.weight_name(0), model.layout.weight_name(1)
    both = [thin(model, seed) for seed in range(8)]
    batches = [
        {name: change for name, change in changes.items() if draw.random() < 0.7 or name == first} for changes in both
    ]
    batches += [{second: changes[second]} for changes in both[:3]]
    backend, active = opened(model), list[Changes]()
    for step in range(100):
        what = draw.choice(["apply", "apply", "rebuild", "shorter", "unedited", "trial"])
        if what == "apply":
            backend.apply(chosen := draw.choice(batches))
            active = [*active, chosen]
        elif what == "trial":
            with backend.trial(draw.choice(batches)):
                pass
        elif what == "unedited":
            backend.rebuild([])
            backend.rebuild(active)
        else:
            active = active[: draw.randint(0, len(active))] if what == "shorter" else draw.sample(batches, 4)
            backend.rebuild(active)
        again = opened(fresh)
        again.rebuild(active)
        assert all(map(torch.equal, weights(model), weights(fresh))), (step, what)
        if active:
            sums, expected = backend.sums(), again.sums()
            assert sums is not None
            assert expected is not None
            assert sums.keys() == expected.keys()
            assert all(torch.equal(sums[name], total) for name, total in expected.items())
        again.rebuild([])


def test_a_trial_keeps_nothing_of_weights_that_no_batch_touches() -> None:
    """Whoever tries every layer of a model in turn holds one of them at a time."""
    model = tiny_model()
    backend = opened(model)
    with backend.trial(thin(model, 0)):
        assert len(backend._base) == 2
    assert not backend._base
    assert not backend._sums


def test_what_fails_leaves_neither_weight_nor_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    backend = opened(model)
    backend.apply(thin(model, 0))
    before = weights(model)
    last = model.layout.weight_name(1)
    broken: Changes = {**thin(model, 1), last: FactoredDelta(torch.ones(3, 1), torch.ones(1, 3))}
    with pytest.raises(RuntimeError):
        backend.apply(broken)
    with pytest.raises(RuntimeError), backend.trial(broken):
        pytest.fail("there is nothing to try")
    assert all(map(torch.equal, weights(model), before))
    backend.apply(thin(model, 2))
    fresh = tiny_model(dtype=torch.bfloat16)
    opened(fresh).rebuild([thin(model, 0), thin(model, 2)])
    assert all(map(torch.equal, weights(fresh), weights(model)))


def test_a_backend_that_was_not_opened_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"RawBackend\.open was not called"):
        RawBackend().apply({})
