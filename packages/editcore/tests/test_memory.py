"""Work that runs out of memory goes on with less at a time."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import LanguageModel, ModelError
from editcore._util.memory import in_halves, is_out_of_memory
from editcore.locate_then_edit import cached_prefixes, fact_rows, optimise_targets, prefixes_can_be_cached
from editcore.locate_then_edit.hparams import LocateThenEditHParams
from editcore.locate_then_edit.prepared_rows import logits_with_delta
from editcore.locate_then_edit.side_by_side import ValueOptimiser
from editcore.testing import tiny_model, tiny_requests

TEMPLATES = ("{}", "The old story. {}")
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"
)


SAYING_SO = [
    RuntimeError(CPU_MESSAGE),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd(...)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)."),
    RuntimeError("Invalid buffer size: 24.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.OutOfMemoryError("Allocation on device"),
    MemoryError(),
]
"""What says that memory ran out, as torch and the libraries that it calls say it."""
OTHERS = [
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXpotrf(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ModelError("'x' is out of memory"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", SAYING_SO, ids=str)
def test_what_says_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_what_says_something_else(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("place", ["logits_with_delta", "CachedPrefixes"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), SAYING_SO[2]], ids=str)
def test_too_little_memory_is_no_property_of_a_family(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether prefix caches fit is not decided by a check that ran out of memory."""
    model, [request] = tiny_model("llama"), tiny_requests(1)
    hparams = LocateThenEditHParams(layers=(1,))

    [value] = fact_rows(model, [request], TEMPLATES, hparams)

    def fails(model: LanguageModel, prepared: Any, *, error: Exception = error, **options: Any) -> object:
        if place == "CachedPrefixes" or prepared.edited is not None:
            raise error
        return logits_with_delta(model, prepared, **options)

    monkeypatch.setattr(cached_prefixes, place, fails)
    with pytest.raises(type(error), match=re.escape(str(error))):
        prefixes_can_be_cached(model, value, layer=1)
    unfit = functools.partial(fails, error=RuntimeError("no such cache"))
    monkeypatch.setattr(cached_prefixes, place, unfit)
    assert not prefixes_can_be_cached(model, value, layer=1)


SINCE = {
    "current_accelerator": (2, 6),
    "device_count": (2, 6),
    "is_available": (2, 6),
    "empty_cache": (2, 9),
    "max_memory_allocated": (2, 9),
    "get_memory_info": (2, 10),
}
"""Since when ``torch.accelerator`` has what."""


def test_the_oldest_torch_allowed_has_what_is_called() -> None:
    package = Path(__file__).parents[1]
    needs = tomllib.loads((package / "pyproject.toml").read_text())["project"]["dependencies"]
    [bound] = [need.removeprefix("torch>=") for need in needs if need.startswith("torch>=")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in package.glob("src/**/*.py"))
    called = set(re.findall(r"torch\.accelerator\.(\w+)", code))
    assert called <= SINCE.keys()
    assert tuple(map(int, bound.split("."))) >= max(SINCE[name] for name in called)


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
    sizes: list[int] = []

    def fail_with(error: Exception) -> Callable[[Sequence[int]], list[int]]:
        def work(items: Sequence[int]) -> list[int]:
            sizes.append(len(items))
            raise error

        return work

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_halves(fail_with(RuntimeError("shapes differ")), range(4))
    assert sizes == [4], "it is tried once"
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(fail_with(torch.OutOfMemoryError("out of memory")), range(4))
    assert sizes == [4, 4, 2, 1]


def test_targets_are_the_same_after_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = tiny_model("llama"), tiny_requests(6)
    hparams = LocateThenEditHParams(layers=(1,), v_num_grad_steps=6, v_stop_loss=0.0, v_lr=0.1)
    expected = optimise_targets(
        model, [[fact] for fact in fact_rows(model, requests, TEMPLATES, hparams)], layer=1, hparams=hparams
    )
    step, failures = ValueOptimiser._step, []

    def sometimes(self: ValueOptimiser) -> object:
        if len(self.active) > 2 and int(self.movement.steps.max()) >= 2:
            failures.append(len(self.active))
            raise RuntimeError(CPU_MESSAGE)
        return step(self)

    monkeypatch.setattr(ValueOptimiser, "_step", sometimes)
    found = optimise_targets(
        model, [[fact] for fact in fact_rows(model, requests, TEMPLATES, hparams)], layer=1, hparams=hparams
    )
    assert failures, "the facts should have run out of memory in the middle"
    assert found.steps == expected.steps
    assert torch.allclose(found.deltas, expected.deltas, atol=1e-5)
