"""Only what is known to be a plain sum is read: every setting of peft is in a list here, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_lora.adapter import Adapter
from edit_lora.additive import ADDITIVE_BEGINNINGS, HANDLED, WITHOUT_EFFECT
from edit_lora.backend import LoraBackend
from edit_lora.config_file import CONFIG_NAME
from edit_lora.hparams import LoraHParams
from editcore import ModelError
from editcore.testing import tiny_hf_model, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

NOT_PLAIN = frozenset(
    {
        "bias", "modules_to_save", "trainable_token_indices", "use_dora", "velora_config", "alora_invocation_tokens",
        "use_qalora", "monteclora_config", "layer_replication", "lora_bias", "target_parameters", "use_bdlora",
        "arrow_config", "kasa_config", "ensure_weight_tying", "megatron_config",
    }
)  # fmt: skip
"""Read in peft 0.21's code: each changes what an adapter does, or what it is made for."""


@torch.inference_mode()
def logits(hf: object) -> Tensor:
    found: Tensor = hf(input_ids=torch.arange(3, 43).reshape(4, 10)).logits  # type: ignore[operator]
    return found


def trained(init: Any, folder: Path, **more: Any) -> Any:
    """An adapter that peft begins in some way, moved as training would, saved."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init, **more)
    made = get_peft_model(tiny_hf_model(), config)
    if "pissa" in str(init) or init == "olora":
        made.peft_config["default"].init_lora_weights = True
        made.save_pretrained(folder / "begun")  # what peft asks for, to make a plain adapter later
        made.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder / "adapter")
    return made


def attached(folder: Path) -> Tensor:
    model = tiny_model()
    backend = LoraBackend(LoraHParams())
    backend.open(model)
    backend.attach("theirs", Adapter.read(folder))
    return logits(model.hf)


@pytest.mark.parametrize("init", [True, False, *ADDITIVE_BEGINNINGS])
@pytest.mark.filterwarnings("ignore:.init_lora_weights. is 'eva'")
def test_what_is_read_does_what_peft_does_with_the_saved_folder(init: bool | str, tmp_path: Path) -> None:
    trained(init, tmp_path)
    folder = tmp_path / "adapter"
    assert json.loads((folder / CONFIG_NAME).read_text())["init_lora_weights"] == init
    theirs = logits(PeftModel.from_pretrained(tiny_hf_model(), folder).eval())
    assert (theirs - logits(tiny_hf_model())).abs().max() > 0.05
    torch.testing.assert_close(attached(folder), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_beginning_that_changes_the_base_is_refused_and_the_advice_works(init: str, tmp_path: Path) -> None:
    made = trained(init, tmp_path)
    folder = tmp_path / "adapter"
    theirs = logits(PeftModel.from_pretrained(tiny_hf_model(), folder).eval())
    with pytest.raises(ModelError, match=f"was begun with init_lora_weights='{init}'.*path_initial_model_for_weight"):
        Adapter.read(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "init_lora_weights": True}))
    assert (attached(folder) - theirs).abs().max() > 0.05  # as a plain sum it would be another model
    made.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    if init != "pissa_niter_4":  # whose beginning is drawn, so that peft itself does not find it again
        torch.testing.assert_close(attached(tmp_path / "plain"), theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "invented"])
def test_other_beginnings_are_refused_by_name(init: str, tmp_path: Path) -> None:
    trained(True, tmp_path)
    path = tmp_path / "adapter" / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    with pytest.raises(ModelError, match=f"init_lora_weights='{init}', which is not known to leave the base's weights"):
        Adapter.read(tmp_path / "adapter")


def test_every_setting_of_peft_is_read_or_harmless_or_refused(tmp_path: Path) -> None:
    """A version of peft with a new setting fails here: find out what it does, and list it."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == HANDLED | WITHOUT_EFFECT | NOT_PLAIN
    assert not NOT_PLAIN & (HANDLED | WITHOUT_EFFECT)
    trained(True, tmp_path)
    path = tmp_path / "adapter" / CONFIG_NAME
    good = json.loads(path.read_text())
    for name in (*NOT_PLAIN, "of_tomorrow"):
        path.write_text(json.dumps({**good, name: "all" if name == "bias" else [[0, 2]]}))
        with pytest.raises(ModelError, match=rf"not a plain LoRA adapter: it uses {name}, which adds something else"):
            Adapter.read(tmp_path / "adapter")
    path.write_text(json.dumps({**good, "of_tomorrow": None}))
    Adapter.read(tmp_path / "adapter")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"exclude_modules": ["down_proj"]},
        {"layers_to_transform": [0]},
    ],
)
def test_factors_that_peft_would_leave_out_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    trained(False, tmp_path)
    folder = tmp_path / "adapter"
    good = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**good, **fields}))
    with pytest.raises(ModelError, match=r"holds factors for 'model\.layers\.\d\.\w+\.\w+', which its configuration"):
        Adapter.read(folder)


def test_an_adapter_that_names_no_alpha_has_pefts(tmp_path: Path) -> None:
    trained(True, tmp_path)
    folder = tmp_path / "adapter"
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["lora_alpha"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    theirs = logits(PeftModel.from_pretrained(tiny_hf_model(), folder).eval())
    torch.testing.assert_close(attached(folder), theirs, rtol=0, atol=1e-4)
