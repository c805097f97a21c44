"""The presets hold what was published, and nothing that the editor does not know."""

from __future__ import annotations

import importlib.resources
import tomllib

import pytest
from edit_rome.hparams import RomeHParams
from editcore._hparams import build, list_presets, load_preset

PRESETS = "edit_rome.presets"
PUBLISHED: dict[str, tuple[tuple[int, ...], int, float, int, float, float, bool]] = {
    # layers, steps, v_lr, v_loss_layer, clamp, weight decay, second moment
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


def test_every_published_model_has_a_preset() -> None:
    assert set(PUBLISHED) <= set(list_presets(PRESETS))


@pytest.mark.parametrize("name", list_presets(PRESETS))
def test_a_preset_is_read_and_says_where_it_is_from(name: str) -> None:
    assert build(RomeHParams, [load_preset(PRESETS, name)], owner="rome").layers
    text = importlib.resources.files(PRESETS).joinpath(f"{name}.toml").read_text("utf-8")
    assert text.startswith("# ")
    assert not {"device", "model_name"} & set(tomllib.loads(text))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_has_the_published_numbers(name: str) -> None:
    found = build(RomeHParams, [load_preset(PRESETS, name)], owner="rome")
    numbers = (
        found.layers,
        found.v_num_grad_steps,
        found.v_lr,
        found.v_loss_layer,
        found.clamp_norm_factor,
        found.v_weight_decay,
        found.mom2_adjustment,
    )
    assert numbers == PUBLISHED[name]
    assert (found.kl_factor, found.kl_position, found.v_stop_loss) == (0.0625, "lookup", 0.05)
    assert (found.context_count, found.context_length, found.key_weighting) == (20, 10, "mean")
