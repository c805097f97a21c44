"""``trust`` keeps the contract of extensions, and its settings are checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from edit_trust.hparams import TrustHParams
from editcore import EditRequest, EditSession, FactRecord, HParamsError, Plugins
from editcore.testing import ExtensionContract, tiny_records

Open = Callable[[str], EditSession]


class TestTrustContract(ExtensionContract):
    """It measures every batch, and lets all of them in."""

    @pytest.fixture
    def extension_name(self) -> str:
        return "trust"

    @pytest.fixture
    def hparams(self, loose: dict[str, Any]) -> dict[str, object]:
        return loose


class TestRejectingContract(TestTrustContract):
    """It looks for the facts that do harm: one of the first batch, and both of the one that is compared."""

    @pytest.fixture
    def hparams(self, loose: dict[str, Any]) -> dict[str, object]:
        return {**loose, "trust_max_kl": 5e-3}

    @pytest.fixture
    def records(self) -> tuple[FactRecord, ...]:
        facts = tiny_records(6)
        return (*facts[:2], *facts[4:], *facts[2:4])

    def test_it_rejects(self, open_session: Open, batches: list[list[EditRequest]]) -> None:
        session = open_session("run")
        assert [len(session.edit(requests)[0].rejected) for requests in batches] == [1, 0, 2]


class TestScalingContract(TestTrustContract):
    """It puts a smaller change into the model."""

    @pytest.fixture
    def hparams(self, loose: dict[str, Any]) -> dict[str, object]:
        return {**loose, "trust_max_kl": 5e-3, "trust_action": "scale"}

    def test_it_scales(self, open_session: Open, batches: list[list[EditRequest]]) -> None:
        session = open_session("run")
        assert session.edit(batches[0])[0].verdicts["trust"].action == "scale"


def test_it_is_installed_under_its_name() -> None:
    spec = Plugins.load().extension("trust")
    assert spec.summary
    assert spec.hparams == "edit_trust.hparams:TrustHParams"
    assert spec.settles_conflicts


def test_announcing_it_imports_no_torch() -> None:
    light = "edit_trust.plugin, edit_trust.hparams, edit_trust.closed_form, edit_trust.search, edit_trust.conflicts"
    code = f"import sys, {light}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"trust_threshold": 1.5}, "trust_threshold = 1.5 is out of range. Allowed: ≥ 0 and ≤ 1"),
        ({"trust_action": "undo"}, "trust_action"),
        ({"trust_scale": 1.0}, "trust_scale = 1.0 is out of range"),
        ({"trust_weights": [0.0, 0.0]}, "trust_weights must not both be 0"),
        ({"trust_weights": [1.0]}, "trust_weights"),
        ({"trust_text": "self"}, "trust_text must not be 'self'.*Give docs, hf:NAME or a file"),
        ({"on_conflict": "last"}, "on_conflict"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, object], message: str) -> None:
    from editcore.settings.hparams import build

    with pytest.raises(HParamsError, match=f"^trust: .*{message}"):
        build(TrustHParams, [bad], owner="trust")
