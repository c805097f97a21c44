"""The executor keeps editcore's contract, on a Ray cluster of two cores on this machine."""

from __future__ import annotations

import pytest

pytest.importorskip("ray", reason="the package ray is not installed")

from editcore.testing import ExecutorContract


@pytest.mark.usefixtures("cluster")
class TestRayContract(ExecutorContract):
    @pytest.fixture
    def executor_name(self) -> str:
        return "ray"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"workers": 2, "retries": 1}
