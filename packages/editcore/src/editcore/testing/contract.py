"""The base of all contract suites: fixtures, the refusal of silent overrides, and comparisons to the bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from editcore.interfaces.errors import HParamsError
from editcore.models import LanguageModel
from editcore.plugins.installed import DISABLE_VARIABLE
from editcore.plugins.registry import Plugins
from editcore.runs.session import EditSession
from editcore.settings.hparams import HParams, build
from editcore.testing.facts import tiny_requests
from editcore.testing.tiny import tiny_model

__all__ = [
    "CORPUS_TOKENS",
    "Contract",
    "InjectedFailure",
    "MakeModel",
    "ModelState",
    "counting_passes",
    "imports_nothing_heavy",
    "in_new_process",
    "logits_of",
    "renumbered",
    "same_bits",
    "survives_json",
]

_HEAVY = ("torch", "transformers", "peft", "pandas", "matplotlib")
_CORPUS_WORDS = 1500
CORPUS_TOKENS = 1024

MakeModel = Callable[[], LanguageModel]


class Contract:
    """The base of all suites: common fixtures, and the refusal of silent overrides."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, standard in _standard_tests(cls).items():
            if (used := _used(cls, name)) is not standard and not _is_declared_failure(used):
                raise TypeError(
                    f"{cls.__name__} overrides the standard test {name}. Switch it off only in the open: override it "
                    "with @pytest.mark.xfail(reason='why', strict=True) and call super()."
                )
        marks = [mark for base in cls.__mro__ for mark in _marks(vars(base).get("pytestmark", ()))]
        if any(mark.name in {"skip", "skipif", "xfail"} for mark in marks):
            raise TypeError(
                f"{cls.__name__} switches all standard tests off with pytestmark. Switch single ones off: override "
                "them with @pytest.mark.xfail(reason='why', strict=True) and call super()."
            )

    @pytest.fixture
    def registry(self) -> Plugins:
        """The installed plugins."""
        return Plugins.load()

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        """Hyperparameters of the tested class, as JSON values; small numbers keep tests fast."""
        return {}

    @pytest.fixture
    def make_model(self) -> MakeModel:
        """Makes the same new model each time."""
        return tiny_model

    @pytest.fixture
    def corpus(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A text file for the second moments. The cache is a folder of this test alone."""
        monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
        words = " ".join(request.text for request in tiny_requests(80)).split()
        path = tmp_path / "corpus.txt"
        path.write_text(" ".join(random.Random(0).choices(words, k=_CORPUS_WORDS)), encoding="utf-8")
        return str(path)


def _standard_tests(cls: type) -> dict[str, object]:
    return {
        name: test
        for base in cls.__mro__
        if base.__module__.rpartition(".")[0] == __package__
        for name, test in vars(base).items()
        if name.startswith("test_")
    }


def _used(cls: type, name: str) -> object:
    """The attribute that pytest will find under ``name``, as its class defines it."""
    return next(vars(base)[name] for base in cls.__mro__ if name in vars(base))


def _marks(declared: object) -> Sequence[pytest.Mark]:
    """The marks in a ``pytestmark``: marks, decorators, or a list of either."""
    listed = declared if isinstance(declared, list | tuple) else [declared]
    marks = [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in listed]
    return [mark for mark in marks if isinstance(mark, pytest.Mark)]


def _is_declared_failure(override: object) -> bool:
    marks = _marks(getattr(override, "pytestmark", ()))
    return bool(marks) and all(
        mark.name == "xfail" and not mark.args and mark.kwargs.get("reason") and mark.kwargs.get("strict") is True
        for mark in marks
    )


def imports_nothing_heavy(registry: Plugins, kind: str, name: str, hparams: str | None) -> None:
    """Announce in a new process, with the other plugins disabled, and check what it imported."""
    modules = [hparams.partition(":")[0]] if hparams else []
    code = (
        f"import importlib, sys\nfrom editcore import Plugins\nPlugins.load().{kind}({name!r})\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        f"print(*sorted({set(_HEAVY)!r} & set(sys.modules)))"
    )
    others = [info.name for info in registry.listing() if name not in info.offers.get(f"editcore_{kind}s", ())]
    heavy = in_new_process(code, {DISABLE_VARIABLE: ",".join(others)}, doing="announcing")
    assert not heavy, f"announcing, or importing the hyperparameters, imported {heavy}"


def in_new_process(code: str, environment: Mapping[str, str], *, doing: str) -> str:
    """The output of ``code`` in a new process with the import paths of this one.

    Args:
        environment: environment variables to add to those of this process.
        doing: what the code does, for the message if it fails.
    """
    path = os.pathsep.join(path for path in sys.path if path)
    everything = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=everything)
    assert done.returncode == 0, f"{doing} failed in a new process:\n{done.stderr}"
    return done.stdout.strip()


def survives_json(hparams: type[HParams], values: Mapping[str, object], owner: str) -> None:
    """Fail unless hyperparameters come back from JSON as they were, and an unknown name is refused."""
    assert issubclass(hparams, HParams), f"{hparams.__name__} is no HParams"
    made = build(hparams, [values], owner=owner)
    again = hparams.model_validate_json(json.dumps(made.model_dump(mode="json")))
    assert again == made, "hyperparameters that went through JSON are others"
    with pytest.raises(HParamsError, match="no_such_setting"):
        build(hparams, [values, {"no_such_setting": 1}], owner=owner)
    with pytest.raises(ValidationError, match="no_such_setting"):
        hparams.model_validate({**made.model_dump(), "no_such_setting": 1})


@dataclass(frozen=True)
class ModelState:
    """Everything about a model that must not change by accident."""

    tensors: Mapping[str, Tensor]
    flags: Mapping[str, object]

    @classmethod
    def of(cls, model: LanguageModel) -> ModelState:
        return cls(
            tensors={name: tensor.detach().clone() for name, tensor in model.hf.state_dict().items()},
            flags={
                **{f"{name}.requires_grad": value.requires_grad for name, value in model.hf.named_parameters()},
                **{f"{name}.grad": value.grad is not None for name, value in model.hf.named_parameters()},
                **{f"{name}.{flag}": value for name, module in _modules(model) for flag, value in _flags(module)},
                **{f"tokenizer.{side}": getattr(model.tokenizer, side) for side in ("padding_side", "truncation_side")},
                "generation_config": model.hf.generation_config.to_json_string(use_diff=False),
            },
        )

    def differences(self, other: ModelState) -> list[str]:
        """The names of tensors and flags that differ in any bit."""
        flags = {name for name in {*self.flags, *other.flags} if self.flags.get(name) != other.flags.get(name)}
        return [*self.changed_tensors(other), *sorted(flags)]

    def changed_tensors(self, other: ModelState) -> list[str]:
        """Names of tensors that differ, or that only one of the two states has."""
        both = set(self.tensors) & set(other.tensors)
        changed = {name for name in both if not same_bits(self.tensors[name], other.tensors[name])}
        return sorted(changed | (set(self.tensors) ^ set(other.tensors)))


def _modules(model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name or "model", module) for name, module in model.hf.named_modules())


def _flags(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield "training", module.training
    yield "hooks", len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
    yield "replaced forward", "forward" in vars(module)


def renumbered(*sessions: EditSession) -> None:
    """Give the next batch the same index in all sessions, because random draws depend on it."""
    number = max(session.next_batch for session in sessions)
    for session in sessions:
        session.next_batch = number


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have one type, one shape and the same bytes."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(*(part.contiguous().reshape(-1).view(torch.uint8) for part in (first, second)))


@torch.inference_mode()
def logits_of(model: LanguageModel) -> Tensor:
    """Logits of a few texts, ``[texts, seq, vocab]``."""
    encoded = model.encode([request.text for request in tiny_requests(4)])
    logits: Tensor = model.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    return logits * encoded.attention_mask[..., None]


class InjectedFailure(Exception):  # noqa: N818  stands for any failure
    """Raised inside a forward pass, to test what is left behind after a failure."""


@contextlib.contextmanager
def counting_passes(model: LanguageModel, *, fail_at: int | None = None) -> Iterator[list[int]]:
    """Counts forward passes. The pass with the number ``fail_at`` raises."""
    passes: list[int] = []

    def on_embedding(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        passes.append(len(passes))
        if passes[-1] == fail_at:
            raise InjectedFailure

    handle = model.hf.get_input_embeddings().register_forward_hook(on_embedding)
    try:
        yield passes
    finally:
        handle.remove()
