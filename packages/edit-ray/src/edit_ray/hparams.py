"""Hyperparameters of the executor; imports neither torch nor ray."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from pydantic import Field

__all__ = ["RayHParams"]


class RayHParams(HParams):
    """Which cluster to use, and the share of it that each worker gets."""

    address: str | None = None
    """Address of the cluster: ``HOST:6379``, ``ray://HOST:10001``, or ``auto`` for the one that this machine belongs
    to. ``none`` starts one on this machine, which ends with the command."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Number of trials at a time. ``none``: as many as the cluster has room for at the start."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """Cores of each worker, and its number of threads. The last bits of a result may depend on this number."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each worker; a fraction lets several share one. With 0, work that needs a GPU still gets one."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory that Ray sets aside for each worker, in units of 10⁹ bytes. ``none``: Ray does not take memory into
    account."""
    shared_files: bool = False
    """Whether all machines see the sweep directory under the same path. If not, runs are made in a temporary folder of
    the worker's machine and copied to the sweep directory when they are finished."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often an item is tried again after its worker was lost."""
