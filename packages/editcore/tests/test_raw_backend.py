"""The built-in backend keeps the contract of backends, and rounds each weight once."""

from __future__ import annotations

import pytest
import torch
from editcore import FactoredDelta
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


def test_a_backend_that_was_not_opened_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"RawBackend\.open was not called"):
        RawBackend().apply({})
