"""The presets hold what was published, and nothing that the editor does not know."""

from __future__ import annotations

import json
from pathlib import Path

from editcore import Plugins
from editcore.settings import import_file, preset_for
from editcore.testing import check_presets

FIELDS = (
    "layers",
    "v_num_grad_steps",
    "v_lr",
    "clamp_norm_factor",
    "v_weight_decay",
    "mom2_update_weight",
)
PUBLISHED = {
    "gpt2-xl": ((13, 14, 15, 16, 17), 20, 0.5, 0.75, 0.5, 20000),
    "gpt-j-6b": ((3, 4, 5, 6, 7, 8), 25, 0.5, 0.75, 0.5, 15000),
    "llama-2-7b": ((4, 5, 6, 7, 8), 25, 0.5, 4, 0.001, 15000),
    "llama-3-8b": ((4, 5, 6, 7, 8), 25, 0.1, 0.75, 0.5, 15000),
    "llama-3.2-3b": ((4, 5, 6, 7, 8), 25, 0.5, 4, 0.001, 15000),
    "mistral-7b": ((4, 5, 6, 7, 8), 25, 0.5, 4, 0.001, 15000),
    "qwen2-7b": ((4, 5, 6, 7, 8), 25, 0.5, 4, 0.001, 15000),
    "qwen2.5-7b": ((4, 5, 6, 7, 8), 25, 0.5, 4, 0.001, 15000),
}
ENCORE = {"gpt2-xl": (10, 4), "llama-2-7b": (10, 3), "llama-3-8b": (20, 2)}
"""λ and the further steps of its stop, by model."""
COMMON = {
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
        "memit",
        {name: dict(zip(FIELDS, values, strict=True)) | COMMON for name, values in PUBLISHED.items()},
    )


def test_presets_of_a_sequence_with_a_norm_term() -> None:
    """They are those of the same model with λ and a memory, and no model gets one unasked."""
    expected = {
        f"encore-{model}": dict(zip(FIELDS, PUBLISHED[model], strict=True))
        | COMMON
        | {"update_norm_lambda": weight, "v_stop_most_probable": further, "memory": "keys"}
        for model, (weight, further) in ENCORE.items()
    }
    check_presets("memit-seq", expected)
    assert preset_for(Plugins.load().editor("memit-seq"), "openai-community/gpt2-xl").name == "gpt2-xl"


def test_a_file_of_the_reference_code_measures_by_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"alg_name": "MEMIT", "layers": [5], "clamp_norm_factor": 0.75}))
    imported = import_file(path, Plugins.load())
    assert imported.settings["memit"].model_dump()["clamp_norm"] == "stream"
    assert "output of the block" in imported.added['clamp_norm = "stream"']
