"""A model folder that other programs read: with transformers 5, and with transformers 4 from 4.51 on.

transformers 5 renamed some fields of configurations. Where transformers 4 does not find a field, it takes its default
without a warning: a RoPE base of 10000 for 100000. So a folder has the fields of both, unless transformers 5 would read
it differently then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["both_forms", "write_folder"]

_ROPE_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
"""By ``model_type``: the names in transformers 4 of RoPE's base and of the rotated share, where they are unusual."""
_ALL_ROTATED = {"phi3", "phi4_multimodal"}
"""Model types whose rotated share is not written under its older name if it is 1. That is the default of transformers
4, and transformers 5 would take the name for another field."""
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Class names of transformers 5 with those of transformers 4; both versions read the latter."""


def write_folder(hf: Any, tokenizer: Any, directory: Path, *, base_config: Mapping[str, Any] | None = None) -> None:
    """Write model and tokenizer into an existing folder.

    Args:
        base_config: the configuration file of the folder that the model was loaded from. Fields of it that only an
            older transformers reads are kept.
    """
    hf.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _rewrite(directory / "config.json", lambda config: _config(config, hf, base_config or {}))
    _rewrite(directory / "tokenizer_config.json", _tokenizer_config)


def both_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5 with the fields that transformers 4 reads. Fields that it has already stay.

    >>> found = both_forms({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "dtype": "float32"})
    >>> found["rope_theta"], found["torch_dtype"]
    (100000.0, 'float32')
    """
    found = {name: both_forms(value) if _is_config(value) else value for name, value in config.items()}
    if isinstance(found.get("dtype"), str):
        found["torch_dtype"] = found["dtype"]
    if isinstance(rope := found.get("rope_parameters"), Mapping):
        by_layer = [value for value in rope.values() if isinstance(value, Mapping)]
        whole = rope.get("full_attention", {}) if by_layer else rope
        theta, share = _ROPE_NAMES.get(str(found.get("model_type")), ("rope_theta", "partial_rotary_factor"))
        older = {theta: whole.get("rope_theta"), share: whole.get("partial_rotary_factor")}
        if found.get("model_type") in _ALL_ROTATED and older[share] == 1:
            del older[share]
        if whole.get("rope_type", "default") != "default":
            older["rope_scaling"] = {
                name: value for name, value in whole.items() if name not in {"rope_theta", "partial_rotary_factor"}
            }
        if isinstance(near := rope.get("sliding_attention"), Mapping):
            older["rope_local_base_freq"] = near.get("rope_theta")
        for name, value in older.items():
            if value is not None:
                found.setdefault(name, value)
    return found


def _is_config(value: object) -> bool:
    return isinstance(value, Mapping) and "model_type" in value


def _config(config: dict[str, Any], hf: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    if embedding is not None and head is not None:
        _say_tied(config, embedding.weight is head.weight)
    return both_forms(_with_older(config, base, hf.config.to_dict()))


def _say_tied(config: dict[str, Any], tied: bool) -> None:
    """Write into the configuration whether input and output embedding are one weight."""
    for part in (config, *(value for value in config.values() if _is_config(value))):
        if part is config or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied


def _with_older(config: Mapping[str, Any], base: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the fields of ``base`` that this version of transformers does not know."""
    kept = {name: value for name, value in base.items() if name not in known and not name.startswith("_")}
    nested = {
        name: _with_older(value, base[name], known[name])
        for name, value in config.items()
        if all(isinstance(part, Mapping) for part in (value, base.get(name), known.get(name))) and _is_config(value)
    }
    return {**kept, **config, **nested}


def _tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") in _TOKENIZER_CLASSES:
        config["tokenizer_class"] = _TOKENIZER_CLASSES[config["tokenizer_class"]]
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 has a dict of that name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if path.exists():
        found = change(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
