"""The presets hold what was published, and nothing that the editor does not know."""

from __future__ import annotations

import json
from pathlib import Path

from editcore import Plugins
from editcore.settings import import_file
from editcore.testing import check_presets

FIELDS = (
    "layers",
    "layer_rule",
    "v_num_grad_steps",
    "v_lr",
    "clamp_norm_factor",
    "v_weight_decay",
    "L2",
)
PUBLISHED = {
    "gpt2-xl": ((13, 14, 15, 16, 17), "spread", 20, 0.5, 0.75, 0.5, 10),
    "gpt-j-6b": ((3, 4, 5, 6, 7, 8), "spread", 25, 0.5, 0.75, 0.5, 10),
    "llama-3-8b": ((4, 5, 6, 7, 8), "spread", 25, 0.1, 0.75, 0.5, 10),
    "qwen2.5-7b": ((4, 5, 6, 7, 8), "spread", 25, 0.5, 4, 0.001, 1),
    "blue-gpt2-xl": ((13, 17), "blue", 20, 0.5, 0.75, 0.5, 80),
    "blue-gpt-j-6b": ((3, 8), "blue", 25, 0.5, 0.75, 0.5, 95),
    "blue-llama-3-8b": ((4, 8), "blue", 25, 0.1, 0.75, 0.5, 1),
}
COMMON = {
    "nullspace_threshold": 0.02,
    "memory": "keys",
    "clamp_norm": "stream",
    "kl_factor": 0.0625,
    "kl_position": "lookup",
    "v_stop_loss": 0.05,
    "context_count": 5,
    "context_length": 10,
    "key_weighting": "grouped",
}


def test_presets() -> None:
    check_presets(
        "alphaedit",
        {name: dict(zip(FIELDS, values, strict=True)) | COMMON for name, values in PUBLISHED.items()},
    )


def test_a_file_of_the_reference_code_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"alg_name": "AlphaEdit", "layers": [5], "nullspace_threshold": 2e-2, "L2": 10}))
    imported = import_file(path, Plugins.load())
    found = imported.settings["alphaedit"].model_dump()
    assert (found["nullspace_threshold"], found["L2"], found["clamp_norm"]) == (0.02, 10, "stream")
