"""The presets hold what was published, and nothing that the editor does not know."""

from __future__ import annotations

import importlib.resources
import tomllib

import pytest
from edit_emmet.hparams import EmmetHParams
from editcore._hparams import build, list_presets, load_preset

PRESETS = "edit_emmet.presets"
PUBLISHED: dict[str, tuple[tuple[int, ...], int, int, float, float, float, float]] = {
    # layers, steps, v_loss_layer, clamp, weight decay, λ, w
    "gpt2-xl": ((17,), 20, 47, 0.75, 0.5, 0.1, 1000),
    "gpt-j-6b": ((5,), 25, 27, 0.75, 0.5, 0.1, 10000),
    "llama-2-7b": ((5,), 25, 31, 0.75, 0.5, 0.1, 10000),
    "llama-3.2-3b": ((5,), 25, 27, 4, 0.001, 0.1, 100000),
}


def test_every_published_model_has_a_preset() -> None:
    assert set(PUBLISHED) <= set(list_presets(PRESETS))


@pytest.mark.parametrize("name", list_presets(PRESETS))
def test_a_preset_is_read_and_says_where_it_is_from(name: str) -> None:
    assert build(EmmetHParams, [load_preset(PRESETS, name)], owner="emmet").layers
    text = importlib.resources.files(PRESETS).joinpath(f"{name}.toml").read_text("utf-8")
    assert text.startswith("# ")
    assert not {"device", "model_name"} & set(tomllib.loads(text))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_has_the_published_numbers(name: str) -> None:
    found = build(EmmetHParams, [load_preset(PRESETS, name)], owner="emmet")
    numbers = (
        found.layers,
        found.v_num_grad_steps,
        found.v_loss_layer,
        found.clamp_norm_factor,
        found.v_weight_decay,
        found.emmet_lambda,
        found.mom2_update_weight,
    )
    assert numbers == PUBLISHED[name]
    assert (found.kl_factor, found.kl_position, found.v_stop_loss) == (0.0625, "lookup", 0.05)
    assert (found.context_count, found.context_length, found.key_weighting) == (5, 10, "grouped")
