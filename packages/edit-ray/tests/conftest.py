"""A Ray cluster of this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Two cores; gives its address. It is ended with the session, whatever happens."""
    ray = pytest.importorskip("ray", reason="the package ray is not installed")
    # Not under pytest's folders: the paths of Ray's sockets may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray")
    try:
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
            object_store_memory=100_000_000,
        )  # fmt: skip
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
