"""Memory: how much is used and free, and how to continue when there is too little.

accelerate has a test for errors that mean too little memory (``should_reduce_batch_size``). It is not used, because it
knows neither the messages of Windows, nor those of cuBLAS, cuSOLVER and similar libraries, nor ``MemoryError``.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["free_memory_bytes", "in_halves", "is_out_of_memory", "peak_memory_bytes", "release", "uncollected"]

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_halves(work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """``work(items)``. If memory runs out, each half of ``items`` is processed alone, down to single items.

    ``work`` must leave nothing behind when it fails.
    """
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if len(items) < 2 or not is_out_of_memory(error):
            raise
        _log.warning("out of memory with %d at once; continuing with half as many", len(items))
    # Outside the handler, so that the failed attempt's tensors are not held by its traceback.
    release()
    middle = len(items) // 2
    return [*in_halves(work, items[:middle]), *in_halves(work, items[middle:])]


_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of ?memory"  # the CPU's allocator on Linux, on Windows; any other
    r"|Invalid buffer size"  # MPS, of a tensor larger than a buffer may be
    r"|_STATUS_ALLOC_FAILED"  # cuBLAS, cuSOLVER, cuDNN and their kin, for their workspace
    r"|_STATUS_(?:INTERNAL_ERROR|NOT_INITIALIZED).*Create\(",  # and for themselves
    re.IGNORECASE | re.DOTALL,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on any device.

    torch has an error class for its allocators on accelerators only. Its allocator on the CPU, and the libraries that
    it calls, raise a RuntimeError with a text that says so.
    """
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def release() -> None:
    """Give back memory that is free but cached, by torch for an accelerator and by the C library."""
    import ctypes

    import torch

    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of an accelerator."""
    import torch

    return int(torch.accelerator.get_memory_info(device)[0])


def peak_memory_bytes(device: torch.device) -> int:
    """The process's peak resident memory; for an accelerator, the sum of the peaks that were allocated on each."""
    import torch

    if device.type != "cpu":
        return sum(
            int(torch.accelerator.max_memory_allocated(index)) for index in range(torch.accelerator.device_count())
        )
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


@contextmanager
def uncollected() -> Iterator[None]:
    """Do not search for reference cycles inside the block. It is for making many objects that all stay: the searches
    among them would take as long as making them."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
