"""The presets hold what was published, and nothing that the editor does not know."""

from __future__ import annotations

from editcore.testing import check_presets

FIELDS = (
    "layers",
    "v_num_grad_steps",
    "v_lr",
    "v_loss_layer",
    "clamp_norm_factor",
    "v_weight_decay",
    "mom2_adjustment",
)
PUBLISHED = {
    "gpt2-medium": ((8,), 20, 0.5, 23, 3, 0.5, True),
    "gpt2-large": ((12,), 20, 0.5, 35, 4, 0.5, True),
    "gpt2-xl": ((17,), 20, 0.5, 47, 4, 0.5, True),
    "gpt-j-6b": ((5,), 20, 0.5, 27, 4, 0.5, True),
    "gpt-neox-20b": ((15,), 20, 0.5, 43, 4, 0.5, True),
    "llama-2-7b": ((5,), 25, 0.5, 31, 4, 0.001, False),
    "llama-3-8b": ((5,), 25, 0.5, 31, 4, 0.001, False),
    "llama-3.2-3b": ((5,), 25, 0.5, 27, 4, 0.001, False),
    "mistral-7b": ((5,), 25, 0.5, 31, 4, 0.001, False),
    "qwen2-7b": ((5,), 25, 0.5, 27, 4, 0.001, False),
    "qwen2.5-7b": ((5,), 25, 0.5, 27, 4, 0.001, False),
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
