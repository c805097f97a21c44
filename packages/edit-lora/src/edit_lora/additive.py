"""Which of peft's configurations add a product of two factors to each module, and nothing else.

Some adapters do more than add their factors. PiSSA and its kin start by subtracting a part of the base's own weights,
so their factors belong to weights that are not the base's. DoRA scales the weights, and others train biases or tokens.
This module lists the settings and initialisations that are known to give a plain sum. Any other is refused, so that a
new one of peft is not read wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editcore import ModelError
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

__all__ = ["ADDITIVE_BEGINNINGS", "HANDLED", "WITHOUT_EFFECT", "check_additive", "check_targets"]

ADDITIVE_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
"""The values of ``init_lora_weights``, apart from true and false, that leave the base's weights as they are. ``pissa``,
``olora``, ``corda``, ``loftq`` and ``lora_ga`` change them (``LoraLayer.update_layer`` in peft)."""
HANDLED = frozenset(
    {
        "peft_type", "init_lora_weights", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora",
        "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern",
    }
)  # fmt: skip
"""Fields that are read: what the factors are multiplied by, and which modules they are for."""
WITHOUT_EFFECT = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "runtime_config",
        "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    }
)  # fmt: skip
"""Fields that are ignored: they only say how an adapter is trained or initialised, or matter only along with a field
that is refused."""


def check_additive(config: Mapping[str, Any], *, where: object) -> None:
    """Refuse an adapter that is more than a product of two factors at each module.

    Args:
        config: of the adapter, as in its file.
        where: its folder, for the message.

    Raises:
        ModelError: its initialisation changes the base, or a field is set that is not known to be harmless.
    """
    beginning = config.get("init_lora_weights", True)
    if isinstance(beginning, str) and beginning.lower() not in ADDITIVE_BEGINNINGS:
        raise ModelError(
            f"{where} was begun with init_lora_weights='{beginning}', which is not known to leave the base's weights "
            "as they are: what it adds is a difference to other weights. In peft, save it again with "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it, or "
            "merge it there."
        )
    more = [
        name
        for name, value in config.items()
        if name not in HANDLED | WITHOUT_EFFECT and value and not (name == "bias" and value == "none")
    ]
    if more:
        raise ModelError(
            f"{where} is not a plain LoRA adapter: it uses {', '.join(more)}, which adds something else than a product "
            "of two factors to each module, or is not known here. Merge it with peft."
        )


def check_targets(config: Mapping[str, Any], paths: list[str], *, where: object) -> None:
    """Refuse factors of modules that the configuration does not choose: peft would ignore them.

    Args:
        paths: of the modules that the file has factors for.

    Raises:
        ModelError: there are such factors, or the fields that choose modules are damaged.
    """
    chosen = config.get("target_modules")
    if not chosen or chosen == "all-linear":  # nothing is said of single modules
        return
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    try:
        spoken_of = LoraConfig(**{name: config.get(name) for name in names})
        unknown = [path for path in paths if not check_target_module_exists(spoken_of, path)]
    except (ValueError, TypeError) as error:
        raise ModelError(f"{where}: {' '.join(str(error).split())}") from error
    if unknown:
        raise ModelError(
            f"{where} holds factors for '{unknown[0]}', which its configuration leaves out (target_modules, "
            "exclude_modules, layers_to_transform): peft would not use them. Take them out of the file, or name the "
            "module in target_modules."
        )
