"""Random models of the common architectures, with a tokenizer made in memory.

They know no facts, but have every part of a real model. Nothing is downloaded or mocked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from editcore.interfaces.values import EditRequest, FactRecord, Probe
from editcore.models import LanguageModel

__all__ = [
    "TINY_FAMILIES",
    "TINY_MOE_FAMILIES",
    "three_facts",
    "tiny_hf_model",
    "tiny_model",
    "tiny_records",
    "tiny_requests",
    "tiny_tokenizer",
]

_D_MODEL = 32
_POSITIONS = 256
_VOCABULARY = 640

_SUBJECTS = (
    "Marie Curie", "Isaac Newton", "Ada Lovelace", "Alan Turing", "Rosa Parks", "Niels Bohr", "Emmy Noether",
    "Leonhard Euler", "Grace Hopper", "Max Planck", "Jane Austen", "Victor Hugo", "Frida Kahlo", "Claude Monet",
    "Nina Simone", "Bob Dylan", "Greta Garbo", "Bruce Lee", "Diego Rivera", "Sophie Germain",
)  # fmt: skip
_RELATIONS = (
    ("{} was born in", ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna")),
    ("The mother tongue of {} is", ("French", "English", "Italian", "German", "Spanish", "Polish")),
    ("{} works as a", ("painter", "doctor", "singer", "lawyer", "teacher", "pilot")),
    ("{} plays the sport of", ("tennis", "football", "hockey", "chess", "rugby", "golf")),
)
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

    Args:
        tokenizer: left out, ``tiny_tokenizer()``.

    >>> tiny_model("gpt2").layout.projection
    'transformer.h.{}.mlp.c_proj'
    """
    hf = tiny_hf_model(family, seed=seed, num_layers=num_layers, dtype=dtype, config=config)
    return LanguageModel.wrap(hf, tokenizer or tiny_tokenizer(), name=f"tiny-{family}")


def three_facts() -> tuple[EditRequest, ...]:
    """Three requests about three people and three relations."""
    return tiny_requests(3)


def tiny_requests(n: int) -> tuple[EditRequest, ...]:
    """``n`` requests that do not contradict each other, each with a ``target_true``; at most 80.

    >>> tiny_requests(1)[0].text
    'Marie Curie was born in'
    """
    most = len(_SUBJECTS) * len(_RELATIONS)
    if not 0 <= n <= most:
        raise ValueError(f"there are {most} tiny requests, asked for {n}")
    return tuple(_request(index) for index in range(n))


def _request(index: int) -> EditRequest:
    # Subject and relation both change from one request to the next, and their pairing shifts with each round.
    number, turn = index % len(_SUBJECTS), index // len(_SUBJECTS)
    prompt, targets = _RELATIONS[(index + turn) % len(_RELATIONS)]
    return EditRequest(
        subject=_SUBJECTS[number],
        prompt=prompt,
        target_new=targets[index % len(targets)],
        target_true=targets[(index + 1 + turn) % len(targets)],
        id=f"tiny-{index}",
    )


def tiny_records(n: int) -> tuple[FactRecord, ...]:
    """The facts of :func:`tiny_requests` as records, with two probes of every usual kind and an opening for generation.

    >>> sorted({probe.kind.partition(".")[0] for probe in tiny_records(1)[0].probes})
    ['generation', 'locality', 'multihop', 'neighborhood', 'paraphrase', 'portability']
    """
    return tuple(
        FactRecord(request=request, relation=request.prompt, probes=_probes(request, number))
        for number, request in enumerate(tiny_requests(n))
    )


def _probes(request: EditRequest, number: int) -> tuple[Probe, ...]:
    assert request.target_true is not None
    new, true = (request.target_new,), (request.target_true,)
    others = [_SUBJECTS[(number + step) % len(_SUBJECTS)] for step in (1, 2)]
    asked = [
        *(("paraphrase", f"{opening} {request.text}", new) for opening in ("It is known that", "It is a city where")),
        *(("neighborhood", request.prompt.replace("{}", other), true) for other in others),
        *(("portability.reasoning", f"{other} knows that {request.text}", new) for other in others),
        *(("multihop", f"The city of {other} and what {request.text}", new) for other in others),
        *(("locality.relation_specificity", f"The capital of {other} is", true) for other in others),
        ("generation", request.subject, ()),
    ]
    return tuple(Probe(kind=kind, prompt=prompt, answers=answers) for kind, prompt, answers in asked)


def _corpus() -> list[str]:
    texts = [_MORE_WORDS]
    for prompt, targets in _RELATIONS:
        texts += [prompt.replace("{}", subject) for subject in _SUBJECTS]
        texts += [f"{subject} {target}" for subject in _SUBJECTS for target in targets]
    return texts
