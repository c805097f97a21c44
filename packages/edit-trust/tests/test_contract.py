"""``trust`` is announced as plugins are."""

from __future__ import annotations

import subprocess
import sys

import pytest
from edit_trust.hparams import TrustHParams
from editcore import Plugins
from pydantic import ValidationError


def test_it_is_installed_under_its_name() -> None:
    spec = Plugins.load().extension("trust")
    assert spec.summary
    assert spec.hparams == "edit_trust.hparams:TrustHParams"


def test_announcing_it_imports_no_torch() -> None:
    code = "import sys, edit_trust.plugin, edit_trust.hparams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_hyperparameters_survive_json_and_refuse_unknown_names() -> None:
    hparams = TrustHParams(every=3)
    assert TrustHParams.model_validate_json(hparams.model_dump_json()) == hparams
    with pytest.raises(ValidationError, match="no_such_setting"):
        TrustHParams.model_validate({"no_such_setting": 1})
