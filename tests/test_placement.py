"""A model spread over several devices: every batch gives what it gives on one.

No machine of the test runner has several accelerators. ``Places`` plays them: a tensor remembers which of them it is on
(``cpu:1`` and ``cpu:2``, which torch keeps apart from ``cpu`` by name and treats as the same memory), and an operation
on tensors of two places fails as it does on real ones. What moves activations from block to block is accelerate's own
hook, as in a model loaded with a ``device_map``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from editcore import EditSession, FactRecord, LanguageModel, LoadOptions, ModelError, Probe, SessionConfig
from editcore.datasets import KnownFact
from editcore.evaluation import CounterFactEvaluator, perplexity
from editcore.ledger.blame import blame
from editcore.onboarding import TracingOptions
from editcore.onboarding.causal_tracing import trace
from editcore.testing import tiny_model, tiny_requests, tiny_tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

HOST, FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1), torch.device("cpu", 2)

_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]  # a property made in C
_MAKERS = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn,
    torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip


class Places(TorchFunctionMode):
    """Every tensor made under it is on a device, and no operation takes tensors of two."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE:
            return place(args[0]) or HOST
        asked = kwargs.get("device")
        if func is Tensor.to:
            asked = next((_device(arg) for arg in args[1:] if _device(arg)), asked)
        if func is Tensor.cpu:
            asked = HOST
        if asked is not None:
            return _moved(func(*args, **kwargs), torch.device(asked), *args[:1])
        if func in _MAKERS:
            return _at(HOST, func(*args, **kwargs))
        if func in (Tensor.numpy, Tensor.__array__):
            assert (place(args[0]) or HOST) == HOST, "numpy reads the host's tensors alone"
            return func(*args, **kwargs)
        if func is Tensor.copy_:
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            outputs, inputs = args[0], args[1]
            found = func(outputs, inputs, *args[2:], **kwargs)
            sources = [inputs] if isinstance(inputs, Tensor) else inputs
            return tuple(_at(place(source), grad) for source, grad in zip(sources, found, strict=True))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return self._indexed(func, args)
        places = _places([args, kwargs])
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {places} in {func}")
        return tree_map(lambda result: _at(next(iter(places), None), result), func(*args, **kwargs))

    @staticmethod
    def _indexed(func: Any, args: Any) -> Any:
        source, (index, *value) = args[0], args[1:]
        where = place(source)
        strangers = _places([index]) - {where, HOST}
        by_tensor = any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_flatten(index)[0])
        if by_tensor:  # a plain slice is copied to, from anywhere
            strangers |= _places(value) - {where}
        if where is not None and strangers:
            raise RuntimeError(f"A tensor on {where} is indexed with or given one on {strangers}")
        return _at(where, func(*args))


def place(tensor: Tensor) -> torch.device | None:
    """Where it is; ``None`` for what was made out of sight (inside ``torch.vmap``), which may be anywhere."""
    return getattr(tensor, "place", None)


def _at(where: torch.device | None, value: Any) -> Any:
    if isinstance(value, Tensor) and where is not None:
        value.place = where
    return value


def _device(argument: object) -> torch.device | None:
    if isinstance(argument, Tensor):
        return place(argument)
    return torch.device(argument) if isinstance(argument, str | torch.device) else None


def _moved(result: Tensor, where: torch.device, source: Any = None) -> Tensor:
    """``result`` on another device is another tensor."""
    if result is source and place(result) != where:
        result = result.clone()
    return _at(where, result)


def _places(values: Any) -> set[torch.device]:
    """Of all tensors in nested arguments; one without a dimension may be the host's."""
    tensors = [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]
    found = {place(tensor) for tensor in tensors if tensor.ndim} or {place(tensor) for tensor in tensors}
    return {where for where in found if where is not None}


class _Moves(AlignDevicesHook):
    """accelerate's hook, for weights that already are where they belong."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def spread(model: LanguageModel, first: int) -> LanguageModel:
    """The embedding and the first blocks on one device, the others and the head on another."""
    blocks = [model.block(layer) for layer in range(model.layout.num_layers)]
    head, embedding = model.hf.get_output_embeddings(), model.hf.get_input_embeddings()
    late = {*blocks[first:], *([head] if head.weight is not embedding.weight else [])}  # tied weights stay together
    inside = {part for block in blocks for part in block.modules() if part is not block}
    for name, module in model.hf.named_modules():
        leaf = module in blocks or (module not in inside and not any(module.children()))
        if not name or not leaf:
            continue
        where = SECOND if module in late or "norm" in name else FIRST
        for part in [*module.parameters(), *module.buffers()]:
            part.place = where
        hook = _Moves(execution_device=where, skip_keys=["past_key_values", "cache"])
        add_hook_to_module(module, hook)
    return model


@contextlib.contextmanager
def one_or_two(number: int, family: str = "llama") -> Iterator[LanguageModel]:
    """The same tiny model, on one device or on two."""
    model = tiny_model(family)
    if number == 1:
        yield model
        return
    with Places():
        yield spread(model, 2)


REQUESTS = tiny_requests(6)
SETTINGS: dict[str, dict[str, Any]] = {
    "emmet": {"layers": [1, 2]},
    "memit": {"layers": [1, 2]},
    "rome": {"layers": [1]},
}
COMMON = {"v_num_grad_steps": 4, "context_count": 2, "context_length": 5}
ANYTHING = {"trust_threshold": 0.0}


def outcome(model: LanguageModel, corpus: Path, editor: str, plugins: list[str], backend: str) -> dict[str, Any]:
    """What a user sees of six facts in batches."""
    settings = {editor: SETTINGS[editor] | COMMON, **({"trust": ANYTHING} if "trust" in plugins else {})}
    session = EditSession.open(
        model,
        SessionConfig(
            editor=editor, plugins=plugins, backend=backend, settings=settings, corpus=str(corpus), corpus_tokens=640
        ),
    )
    before = {name: model.weight(name).clone() for name in map(model.layout.weight_name, range(3))}
    session.edit(REQUESTS, batch_size=1 if editor == "rome" else 2)
    said = model.generate([request.text for request in tiny_requests(40)], max_new_tokens=1)
    facts = [
        KnownFact(request.subject, request.text, word)
        for request, word in zip(tiny_requests(40), said, strict=True)
        if word
    ]
    traced = trace(model, facts, options=TracingOptions(num=1))
    assert traced.used == 1
    records = [
        FactRecord(request=request, probes=(Probe(kind="paraphrase", prompt=f"So {request.text}"),))
        for request in REQUESTS[:2]
    ]
    seen = {
        "changes": [
            (name, part, tensor.tolist())
            for entry in session.ledger.entries
            for name, change in sorted(entry.changes.items())
            for part, tensor in change.tensors().items()
        ],
        "notes": [entry.notes for entry in session.ledger.entries],
        "blame": blame(session.edited, session.ledger.history(), REQUESTS[0].text),
        "traced": repr(list(traced.rows())),  # absent roles are NaN
        "text": model.generate([request.text for request in REQUESTS], max_new_tokens=4),
        "scores": CounterFactEvaluator().evaluate(model, records),
        "perplexity": perplexity(model, " ".join(request.text for request in REQUESTS)),
    }
    session.undo(batches=[entry.batch for entry in session.ledger.entries])
    assert all(torch.equal(model.weight(name), bits) for name, bits in before.items())
    return seen


def test_places_refuse_what_real_devices_refuse() -> None:
    with Places():
        first, second, host = torch.ones(2, device=FIRST), torch.ones(2).to(SECOND), torch.ones(2)
        assert (first.device, second.device, host.device) == (FIRST, SECOND, HOST)
        for mix in (lambda: first + second, lambda: first + host, lambda: torch.cat([first, second])):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises(RuntimeError, match="indexed"):
            first[torch.zeros(1, dtype=torch.long, device=SECOND)]
        assert (first + second.to(first)).device == FIRST
        assert first[torch.zeros(1, dtype=torch.long)].device == FIRST
        assert (second * torch.tensor(2.0)).sum().sqrt().device == SECOND
        first.requires_grad_()
        assert torch.autograd.grad((first.to(SECOND) * second).sum(), first)[0].device == FIRST


@pytest.mark.parametrize(
    ("family", "editor", "plugins", "backend"),
    [
        ("llama", "emmet", [], "raw"),
        ("llama", "emmet", ["replay", "trust"], "lora"),
        ("llama", "rome", [], "lora"),
        ("gpt2", "memit", ["replay"], "raw"),
        ("gemma2", "rome", [], "raw"),
        ("bloom", "emmet", ["replay"], "raw"),
    ],
)
def test_two_devices_give_what_one_gives(
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    editor: str,
    plugins: list[str],
    backend: str,
) -> None:
    seen = []
    for number in (1, 2):
        monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / f"cache{number}"))
        with one_or_two(number, family) as model:
            seen.append(outcome(model, tiny_corpus, editor, plugins, backend))
    assert seen[0] == seen[1]


def test_auto_gives_the_same_model(tiny_folder: Path) -> None:
    plain, spread_out = (LanguageModel.load(str(tiny_folder), LoadOptions(device=device)) for device in ("cpu", "auto"))
    assert spread_out.fingerprint() == plain.fingerprint()
    assert spread_out.generate(["Marie Curie was born in"]) == plain.generate(["Marie Curie was born in"])


def test_offloaded_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 2 else "cpu" for layer in range(3)}
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder, device_map=places, offload_folder=tmp_path)
    with pytest.raises(ModelError, match=r"big does not fit .* 9 of its 30 weights are offloaded.*bfloat16"):
        LanguageModel.wrap(hf, tiny_tokenizer(), name="big")
