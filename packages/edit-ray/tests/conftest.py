"""A Ray cluster of this machine, with a temporary folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Two cores; gives its address. It is ended with the session, whatever happens."""
    ray = pytest.importorskip("ray", reason="the package ray is not installed")
    usual = os.environ.get("TMPDIR")
    # Not under pytest's folders: the paths of Ray's sockets may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray")
    os.environ["TMPDIR"] = folder  # where workers make what they send home
    try:
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
            object_store_memory=100_000_000,
            _system_config={"worker_niceness": 0},  # at Ray's 15 they stand still beside the other tests
        )  # fmt: skip
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        os.environ.pop("TMPDIR")
        if usual is not None:
            os.environ["TMPDIR"] = usual
        shutil.rmtree(folder, ignore_errors=True)
