"""The presets hold what was published, and nothing that the editor does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from editcore import Plugins
from editcore.settings import import_file
from editcore.testing import check_presets

FIELDS = (
    "layers",
    "v_num_grad_steps",
    "v_lr",
    "clamp_norm_factor",
    "v_weight_decay",
    "mom2_adjustment",
)
PUBLISHED = {
    "gpt2-medium": ((8,), 20, 0.5, 3, 0.5, True),
    "gpt2-large": ((12,), 20, 0.5, 4, 0.5, True),
    "gpt2-xl": ((17,), 20, 0.5, 4, 0.5, True),
    "gpt-j-6b": ((5,), 20, 0.5, 4, 0.5, True),
    "gpt-neox-20b": ((15,), 20, 0.5, 4, 0.5, True),
    "llama-2-7b": ((5,), 25, 0.5, 4, 0.001, False),
    "llama-3-8b": ((5,), 25, 0.5, 4, 0.001, False),
    "llama-3.2-3b": ((5,), 25, 0.5, 4, 0.001, False),
    "mistral-7b": ((5,), 25, 0.5, 4, 0.001, False),
    "qwen2-7b": ((5,), 25, 0.5, 4, 0.001, False),
    "qwen2.5-7b": ((5,), 25, 0.5, 4, 0.001, False),
}
COMMON = {
    "kl_factor": 0.0625,
    "kl_position": "lookup",
    "v_stop_loss": 0.05,
    "context_count": 20,
    "context_length": (5, 10),
    "key_weighting": "mean",
}


def test_presets() -> None:
    check_presets(
        "rome",
        {name: dict(zip(FIELDS, values, strict=True)) | COMMON for name, values in PUBLISHED.items()},
    )


@pytest.mark.parametrize(
    ("name", "mode", "asks"), [("ROME", "mean", "shift"), ("R-ROME", "mean", "value"), ("P-ROME", "prompt", "shift")]
)
def test_files_of_the_reference_codes(name: str, mode: str, asks: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"alg_name": name, "layers": [5], "clamp_norm_factor": 4}))
    imported = import_file(path, Plugins.load())
    values = imported.settings["rome"].model_dump()
    assert (values["key_mode"], values["mean_asks"]) == (mode, asks)
    assert values["clamp_norm"] == "output", "its code measures by the output of the projection"
    assert (f'key_mode = "{mode}"' in imported.added) == (name != "ROME")
