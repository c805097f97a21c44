"""Hyperparameters of the executor; imports neither torch nor ray."""

from __future__ import annotations

from typing import Annotated

from editcore import HParams
from pydantic import Field

__all__ = ["RayHParams"]


class RayHParams(HParams):
    """Which cluster, and what each worker gets of it."""

    address: str | None = None
    """Of the cluster: ``auto`` for the one that this machine belongs to, ``HOST:6379``, ``ray://HOST:10001``. ``none``
    starts one on this machine, which ends with the command."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time. ``none``: as many as the cluster has room for when the work begins."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """Cores of each worker, which are also its threads. The last bits of a result may depend on it."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each worker; a fraction lets several share one. Work that needs a GPU gets one where this is 0."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory that Ray sets aside for each worker, in units of 10⁹ bytes. ``none``: it does not count memory."""
    shared_files: bool = False
    """Whether all machines see the sweep directory under the same path. If not, runs are made in a temporary folder of
    the worker's machine and sent home when they are finished."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often an item is tried again whose worker was lost."""
