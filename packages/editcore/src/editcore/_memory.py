"""How much memory the process has used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["peak_memory_bytes"]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak resident memory of the process, and on an accelerator the peak allocated there instead."""
    import torch

    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes
