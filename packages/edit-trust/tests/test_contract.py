"""``trust`` is announced as plugins are, and its settings are checked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from edit_trust.hparams import TrustHParams
from editcore import HParamsError, Plugins
from pydantic import ValidationError


def test_it_is_installed_under_its_name() -> None:
    spec = Plugins.load().extension("trust")
    assert spec.summary
    assert spec.hparams == "edit_trust.hparams:TrustHParams"
    assert spec.settles_conflicts


def test_announcing_it_imports_no_torch() -> None:
    light = "edit_trust.plugin, edit_trust.hparams, edit_trust.closed_form, edit_trust.search, edit_trust.conflicts"
    code = f"import sys, {light}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_hyperparameters_survive_json_and_refuse_unknown_names() -> None:
    hparams = TrustHParams(trust_threshold=0.25, trust_weights=(1.0, 3.0), trust_action="scale")
    assert TrustHParams.model_validate_json(hparams.model_dump_json()) == hparams
    with pytest.raises(ValidationError, match="no_such_setting"):
        TrustHParams.model_validate({"no_such_setting": 1})


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
