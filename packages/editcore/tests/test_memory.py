"""Work that runs out of memory goes on with less at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from editcore._util.memory import in_halves
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.targets import _Solver, optimise_targets
from editcore.testing import tiny_model, tiny_requests

TEMPLATES = ("{}", "The old story. {}")
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"
)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_MESSAGE), MemoryError()]
)
def test_work_is_halved_until_it_fits(error: Exception) -> None:
    sizes: list[int] = []

    def work(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 2:
            raise error
        return [item * 10 for item in items]

    assert in_halves(work, range(7)) == [0, 10, 20, 30, 40, 50, 60]
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_another_error_and_a_single_item_too_large_are_passed_on() -> None:
    def fails(_items: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_halves(fails, range(4))

    def too_large(_items: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        in_halves(too_large, range(4))


def test_targets_are_the_same_after_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), tiny_requests(6)
    hparams = LocateThenEditHParams(layers=(1,), v_num_grad_steps=6, v_stop_loss=0.0, v_lr=0.1)
    expected = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams)
    step, failures = _Solver._step, []

    def sometimes(self: _Solver) -> object:
        if len(self.active) > 2 and int(self.adam.steps.max()) >= 2:
            failures.append(len(self.active))
            raise RuntimeError(CPU_MESSAGE)
        return step(self)

    monkeypatch.setattr(_Solver, "_step", sometimes)
    found = optimise_targets(model, requests, layer=1, templates=TEMPLATES, hparams=hparams)
    assert failures, "the facts should have run out of memory in the middle"
    assert found.steps == expected.steps
    assert torch.allclose(found.deltas, expected.deltas, atol=1e-5)
