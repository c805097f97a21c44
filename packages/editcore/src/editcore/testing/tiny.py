"""Random models of the common architectures, with a tokenizer made in memory.

They know no facts, but have every part of a real model. Nothing is downloaded or mocked.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from editcore.models import LanguageModel
from editcore.testing.facts import RELATIONS, SUBJECTS

__all__ = [
    "TINY_FAMILIES",
    "TINY_MOE_FAMILIES",
    "repeating_model",
    "tiny_hf_model",
    "tiny_model",
    "tiny_tokenizer",
]

_D_MODEL = 32
_POSITIONS = 256
_VOCABULARY = 640

_MORE_WORDS = "The capital of France is a city. It is in the north and has many people who live there. My name is"


def _llama_like(num_layers: int, d_ff: int) -> dict[str, Any]:
    return {
        "hidden_size": _D_MODEL,
        "intermediate_size": d_ff,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": _POSITIONS,
    }


def _with(**more: Any) -> Callable[[int, int], dict[str, Any]]:
    return lambda num_layers, d_ff: {**_llama_like(num_layers, d_ff), **more}


def _gpt2_like(num_layers: int, d_ff: int) -> dict[str, Any]:
    return {"n_embd": _D_MODEL, "n_layer": num_layers, "n_head": 4, "n_inner": d_ff, "n_positions": _POSITIONS}


def _gpt_neo(num_layers: int, d_ff: int) -> dict[str, Any]:
    return {
        "hidden_size": _D_MODEL,
        "intermediate_size": d_ff,
        "num_layers": num_layers,
        "num_heads": 4,
        "max_position_embeddings": _POSITIONS,
        "window_size": 16,
        "attention_types": [[["global"], 1], *([[["local"], num_layers - 1]] if num_layers > 1 else [])],
    }


def _opt(num_layers: int, d_ff: int) -> dict[str, Any]:
    return {**_llama_like(num_layers, d_ff), "ffn_dim": d_ff, "word_embed_proj_dim": _D_MODEL}


def _bloom(num_layers: int, d_ff: int) -> dict[str, Any]:
    return {"hidden_size": _D_MODEL, "n_layer": num_layers, "n_head": 4}  # its MLP is 4 * hidden_size wide


def _falcon(num_layers: int, d_ff: int) -> dict[str, Any]:
    return {**_llama_like(num_layers, d_ff), "ffn_hidden_size": d_ff, "multi_query": True, "parallel_attn": True}


def _mpt(num_layers: int, d_ff: int) -> dict[str, Any]:
    return {"d_model": _D_MODEL, "n_layers": num_layers, "n_heads": 4, "max_seq_len": _POSITIONS}


_DENSE: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "gpt2": _gpt2_like,
    "gptj": lambda num_layers, d_ff: {**_gpt2_like(num_layers, d_ff), "rotary_dim": 4},
    "gpt_neox": _llama_like,
    "gpt_neo": _gpt_neo,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _with(head_dim=8),
    "gemma2": _with(head_dim=8, sliding_window=64),
    "gemma3_text": _with(head_dim=8, sliding_window=64),
    "phi": _with(num_key_value_heads=4),
    "phi3": _llama_like,
    "stablelm": _llama_like,
    "olmo2": _llama_like,
    "granite": _with(residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=2.0, attention_multiplier=0.35),
    "cohere": _llama_like,
    "smollm3": _llama_like,
    "starcoder2": _llama_like,
    "mpt": _mpt,
}
_MOE: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "mixtral": _with(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _with(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "olmoe": _with(num_experts=4, num_experts_per_tok=2),
}

TINY_FAMILIES: tuple[str, ...] = tuple(_DENSE)
"""The ``config.model_type`` of every dense architecture that :func:`tiny_model` makes."""
TINY_MOE_FAMILIES: tuple[str, ...] = tuple(_MOE)
"""Mixtures of experts. :func:`tiny_hf_model` makes them; :func:`tiny_model` raises the error that a user would see."""


def tiny_tokenizer(*, bos: bool = True, padding_side: Literal["left", "right"] = "right") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with character offsets, the same in every process; subjects take about two tokens.

    Args:
        bos: whether to put ``<s>`` before every text, as Llama does. Otherwise there is no such token, as in Qwen.
    """
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_max_length=_POSITIONS,
    )


@functools.cache
def _trained_tokenizer() -> str:
    """The merges, learned once in a process, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer=trainer)
    return tokenizer.to_str()


def tiny_hf_model(
    family: str = "llama",
    *,
    seed: int = 0,
    num_layers: int = 3,
    d_ff: int = 64,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """A random transformers model of ``family``, 32 wide, whose logits vary from token to token.

    Args:
        seed: seed of the weights. The global generators are not changed.
        d_ff: width of the MLP, if the architecture allows a choice (Bloom and MPT have 128).
        config: fields of the configuration that differ from the usual ones.
    """
    known = {**_DENSE, **_MOE}
    if family not in known:
        raise ValueError(f"no tiny model of family {family!r}; choose from {', '.join(known)}")
    fields: dict[str, Any] = {
        **known[family](num_layers, d_ff),
        "vocab_size": _VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        **(config or {}),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # fork_rng gives the caller's state back
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    _draw_weights(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    """Replace the usual initialisation, whose logits are nearly flat, by one in which every part matters."""
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in drawn:  # tied
                continue
            drawn.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2 or name == "bias":
                parameter.add_(0.1 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
                parameter.copy_(noise * 1.5 / math.sqrt(fan_in))


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    num_layers: int = 3,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> LanguageModel:
    """A :class:`LanguageModel` around :func:`tiny_hf_model` and :func:`tiny_tokenizer`, with its layout checked.

    Each call gives a model of its own. With the tokenizer left out it is a copy: finding the layout takes ten times
    longer than copying, so an original of each kind is made once in a process.

    Args:
        tokenizer: left out, ``tiny_tokenizer()``.

    >>> tiny_model("gpt2").layout.projection
    'transformer.h.{}.mlp.c_proj'
    """
    if tokenizer is None:
        return copy.deepcopy(_original(family, seed, num_layers, dtype, json.dumps(dict(config or {}))))
    hf = tiny_hf_model(family, seed=seed, num_layers=num_layers, dtype=dtype, config=config)
    return LanguageModel.wrap(hf, tokenizer, name=f"tiny-{family}")


@functools.cache
def _original(family: str, seed: int, num_layers: int, dtype: torch.dtype, config: str) -> LanguageModel:
    """The model that :func:`tiny_model` copies. ``config`` is JSON, because a cache takes only what can be hashed."""
    hf = tiny_hf_model(family, seed=seed, num_layers=num_layers, dtype=dtype, config=json.loads(config))
    return LanguageModel.wrap(hf, tiny_tokenizer(), name=f"tiny-{family}")


def repeating_model() -> LanguageModel:
    """A random model whose first attention hands on what it reads, so that words of the prompt become likelier.

    It is for attachments that put text before a prompt.
    """
    model = tiny_model("gpt2")
    width = model.layout.d_model
    with torch.no_grad():
        model.weight("transformer.wpe.weight").mul_(0.1)
        for layer in range(model.layout.num_layers):
            model.weight(model.layout.weight_name(layer)).mul_(0.5)
            model.weight(f"transformer.h.{layer}.attn.c_proj.weight").mul_(0.5)
        queries_keys_values = model.weight("transformer.h.0.attn.c_attn.weight")  # [d_model, 3 * d_model]
        queries_keys_values[:, :width].mul_(0.1)  # it reads everything alike
        queries_keys_values[:, 2 * width :] = torch.eye(width)
        model.weight("transformer.h.0.attn.c_proj.weight").copy_(2 * torch.eye(width))
    return model


def _corpus() -> list[str]:
    texts = [_MORE_WORDS]
    for prompt, targets in RELATIONS:
        texts += [prompt.replace("{}", subject) for subject in SUBJECTS]
        texts += [f"{subject} {target}" for subject in SUBJECTS for target in targets]
    return texts
