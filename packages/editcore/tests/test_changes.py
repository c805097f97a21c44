"""What changes of weights say of themselves is what their dense arithmetic says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from editcore import Attachment, DenseDelta, FactoredDelta, VectorDelta, WeightChange, Written, as_change
from hypothesis import given, settings, strategies as st
from torch import Tensor

DTYPES = st.sampled_from([torch.float32, torch.float64])
WIDTH = st.integers(1, 7)


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def changes(draw: st.DrawFn) -> WeightChange:
    """A change of any kind, of any shape that it may have."""
    seed, dtype = draw(st.integers(0, 10_000)), draw(DTYPES)
    kind = draw(st.sampled_from(["factored", "dense", "stack", "vector", "number"]))
    d_out, d_in = draw(WIDTH), draw(WIDTH)
    if kind == "factored":
        rank = draw(st.integers(0, 5))
        return FactoredDelta(drawn(seed, d_out, rank, dtype=dtype), drawn(seed + 1, rank, d_in, dtype=dtype))
    if kind in ("dense", "stack"):
        more = (draw(WIDTH),) if kind == "stack" else ()
        return DenseDelta(drawn(seed, *more, d_out, d_in, dtype=dtype))
    return VectorDelta(drawn(seed, *((d_out,) if kind == "vector" else ()), dtype=dtype))


KINDS: dict[str, Callable[[Tensor], WeightChange]] = {
    "dense": DenseDelta,
    "vector": lambda value: VectorDelta(value[0]),
    "factored": lambda value: FactoredDelta(value, value.T),
}


@settings(deadline=None)
@given(changes())
def test_shape_and_norm_are_those_of_the_dense_change(change: WeightChange) -> None:
    dense = change.dense()
    assert change.shape == tuple(dense.shape)
    # A thin change of float32 has its norm from products of float32 numbers.
    assert change.norm() == pytest.approx(float(dense.double().norm()), rel=1e-4, abs=1e-5)
    if isinstance(change, FactoredDelta):
        assert change.rank == change.left.shape[1] == change.right.shape[0]


@settings(deadline=None)
@given(changes(), st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.5]))
def test_scaled_is_a_multiple_and_leaves_the_first(change: WeightChange, factor: float) -> None:
    before = {name: tensor.clone() for name, tensor in change.tensors().items()}
    scaled = change.scaled(factor)
    assert type(scaled) is type(change)
    torch.testing.assert_close(scaled.dense(), factor * change.dense())
    assert scaled.norm() == pytest.approx(abs(factor) * change.norm(), rel=1e-5, abs=1e-7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in change.tensors().items())


@settings(deadline=None)
@given(changes())
def test_a_change_comes_back_from_its_tensors(change: WeightChange) -> None:
    again = as_change(change.tensors())
    assert type(again) is type(change)
    assert again.kind == change.kind
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in change.tensors().items())


@settings(deadline=None)
@given(changes())
def test_moving_keeps_the_bits(change: WeightChange) -> None:
    moved = change.to("cpu")
    assert type(moved) is type(change)
    assert all(torch.equal(tensor, moved.tensors()[name]) for name, tensor in change.tensors().items())
    away = change.to("meta")
    assert away.shape == change.shape
    assert all(tensor.is_meta for tensor in away.tensors().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_one_entry_that_is_no_number_is_found(kind: str, bad: float) -> None:
    value = torch.ones(2, 3, dtype=torch.float64)
    assert KINDS[kind](value).is_finite()
    value[0, 2] = bad
    assert not KINDS[kind](value).is_finite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_both_factors_are_looked_at(bad: float) -> None:
    fine, spoilt = torch.ones(2, 2), torch.full((2, 2), bad)
    assert not FactoredDelta(fine, spoilt).is_finite()
    assert not FactoredDelta(spoilt, fine).is_finite()


def test_the_norm_of_factors_that_cancel_is_no_nan() -> None:
    """Rounding may leave less than nothing under the root."""
    left = torch.tensor([[1e8, -1e8]], dtype=torch.float64)
    right = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    assert FactoredDelta(left, right).norm() == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FactoredDelta(torch.ones(4, 2), torch.ones(3, 5)),
            r"factors of shape \(4, 2\) and \(3, 5\) do not multiply",
        ),
        (lambda: FactoredDelta(torch.ones(4), torch.ones(4, 5)), r"factors of shape \(4,\) and \(4, 5\)"),
        (lambda: FactoredDelta(torch.ones(4, 2), torch.ones(2)), r"factors of shape \(4, 2\) and \(2,\)"),
        (lambda: DenseDelta(torch.ones(4)), r"a dense change has two axes or more, found the shape \(4,\)"),
        (lambda: DenseDelta(torch.tensor(1.0)), r"two axes or more, found the shape \(\)"),
        (
            lambda: VectorDelta(torch.ones(4, 1)),
            r"a change of a vector has one axis at most, found the shape \(4, 1\)",
        ),
    ],
)
def test_shapes_that_are_no_change_are_refused(make: Callable[[], WeightChange], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "nothing"), (("left",), "left"), (("dense", "vector"), "dense and vector"), (("delta",), "delta")],
)
def test_tensors_of_no_change_are_refused(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=f"no change of a weight is made of {said}"):
        as_change(dict.fromkeys(names, torch.ones(2, 2)))


def test_what_is_written_is_nothing_unless_it_is_said() -> None:
    assert (Written().changes, Written().attachment, Written().memory) == ({}, None, {})
    assert (Attachment(kind="notes").tensors, Attachment(kind="notes").fields) == ({}, {})
