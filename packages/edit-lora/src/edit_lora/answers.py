"""What a model answers to prompts: its greedy tokens, and its likeliest first tokens. From torch, whoever loaded it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from editcore import LanguageModel, ModelError
from editcore.evaluation import log_probabilities_after

__all__ = ["LIKELIEST", "Answer", "ModelFolder", "PeftFolder", "Served", "answers_of"]

LIKELIEST = 20
"""Tokens whose log-probabilities are compared; vLLM gives no more unless it is told to."""
Row = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What follows one prompt."""

    tokens: tuple[int, ...] | None
    """The greedy tokens, up to a special one; ``None`` from a server that gives only text."""
    text: str
    """The same as text."""
    likeliest: Mapping[int, float] | None = None
    """Log-probabilities of the likeliest first tokens; ``None`` from a server that gives none."""


class Served(Protocol):
    """Something that answers, with a run's edits or without."""

    @property
    def has_base(self) -> bool:
        """Whether it can answer without the edits."""

    def answers(self, rows: Sequence[Row], *, tokens: int, edited: bool) -> list[Answer]:
        """The answer to each prompt.

        Args:
            rows: the prompts, as token ids.
            tokens: the most tokens of an answer.
        """


def answers_of(model: LanguageModel, rows: Sequence[Row], *, tokens: int) -> list[Answer]:
    """What a model in memory answers, in the state that it is in."""
    special = frozenset(model.tokenizer.all_special_ids)
    written = model.generate_ids(rows, max_new_tokens=tokens)
    best = log_probabilities_after(model, rows).topk(min(LIKELIEST, model.layout.vocab_size))
    found = []
    for new, values, ids in zip(written, best.values.tolist(), best.indices.tolist(), strict=True):
        kept = before_special(new, special)
        text = str(model.tokenizer.decode(kept))
        found.append(Answer(tokens=kept, text=text, likeliest=dict(zip(ids, values, strict=True))))
    return found


def before_special(tokens: Sequence[int], special: frozenset[int]) -> tuple[int, ...]:
    """The tokens up to the first special one, where engines differ in what they write on."""
    end = next((index for index, token in enumerate(tokens) if token in special), len(tokens))
    return tuple(tokens[:end])


class ModelFolder:
    """A model with the edits in its weights, as transformers loads it."""

    has_base = False

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def answers(self, rows: Sequence[Row], *, tokens: int, edited: bool) -> list[Answer]:
        """See :class:`Served`."""
        return answers_of(self._model, rows, tokens=tokens)


class PeftFolder:
    """An adapter folder, as peft puts it onto a model.

    Args:
        model: the base; it is wrapped.

    Raises:
        ModelError: peft cannot load the adapter onto that model.
    """

    has_base = True

    def __init__(self, folder: Path, model: LanguageModel) -> None:
        from peft import PeftModel

        try:
            self._peft: Any = PeftModel.from_pretrained(model.hf, str(folder)).eval()
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise ModelError(f"peft cannot put {folder} onto {model.name}: {' '.join(str(error).split())}") from error
        self._model = model

    def answers(self, rows: Sequence[Row], *, tokens: int, edited: bool) -> list[Answer]:
        """See :class:`Served`."""
        with torch.inference_mode(), self._state(edited=edited):
            return answers_of(self._model, rows, tokens=tokens)

    def _state(self, *, edited: bool) -> AbstractContextManager[Any]:
        from contextlib import nullcontext

        state: AbstractContextManager[Any] = nullcontext() if edited else self._peft.disable_adapter()
        return state
