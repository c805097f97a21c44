"""The token rows of a fact, on which its value is optimised.

There is a row for each context template: the context, the prompt and the target. One more row, "{subject} is a", is for
the essence term.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from editcore.interfaces.documented import documented
from editcore.interfaces.values import EditRequest
from editcore.locate_then_edit.windows import Window
from editcore.models.tokens import TokenRow, continuation_row, fitting, lookup_row

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["ESSENCE", "ESSENCE_PROMPT", "FactRows", "RowName", "fact_rows"]

ESSENCE_PROMPT = "{} is a"
"""ROME, section 3.1: the prompt on which the subject's essence must not drift."""

ESSENCE = -1
"""Stands in for a context's number to name the row of the essence term."""


class RowName(NamedTuple):
    """The name of a row."""

    fact: int
    """Number of the fact."""
    context: int
    """Number of the context template, 0 for the bare prompt; :data:`ESSENCE` for the essence prompt."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class FactRows:
    """The rows of one fact."""

    text: str
    """The bare prompt, for messages."""
    contexts: tuple[TokenRow, ...]
    """By context, the prompt and its target; the bare prompt first."""
    essence: TokenRow | None
    """The essence prompt up to the token where the KL term reads the next-token distribution; ``None`` without that
    term."""
    shortened: bool = False
    """Whether a context lost words, because the model cannot read all its tokens."""

    def contexts_and_essence(self) -> Iterator[int]:
        """Numbers of all rows."""
        yield from range(len(self.contexts))
        if self.essence is not None:
            yield ESSENCE

    def row(self, context: int) -> TokenRow:
        """A row with its target."""
        if context != ESSENCE:
            return self.contexts[context]
        assert self.essence is not None
        return self.essence

    def model_input(self, context: int) -> TokenRow:
        """A row as the model reads it: without the last target token, which is only predicted."""
        row = self.row(context)
        return replace(row, ids=row.ids[:-1]) if row.targets else row

    def num_scored(self, context: int) -> int:
        """Number of positions of a row whose logits are needed: one per target token, or one for the essence term."""
        return max(1, len(self.row(context).targets))


def fact_rows(
    model: LanguageModel,
    requests: Iterable[EditRequest],
    templates: Sequence[str],
    hparams: LocateThenEditHParams,
    *,
    windows: Mapping[str, Window] | None = None,
) -> list[FactRows]:
    """The rows of each request.

    Args:
        templates: contexts with ``{}`` for the prompt; the first must be the bare ``"{}"``.
        windows: by id, requests that stand for a window of a long target. They have no essence row.

    Raises:
        RequestError, SubjectNotFoundError: as :func:`editcore.models.lookup_row`.
    """
    windows = windows or {}
    return [
        _rows_of(model, request, templates, hparams)
        if request.id not in windows
        else _rows_of_window(model, windows[request.id], templates, hparams)
        for request in requests
    ]


def _rows_of_window(
    model: LanguageModel, window: Window, templates: Sequence[str], hparams: LocateThenEditHParams
) -> FactRows:
    end = _end_of_turn(model, hparams) if window.last else ()
    rows = [window.row(model, template) for template in templates]
    contexts = tuple(_ended(model, row, end) for row in rows)
    shortened = any(fitting(model, window.request, template) != template for template in templates)
    return FactRows(text=window.request.text, contexts=contexts, essence=None, shortened=shortened)


def _end_of_turn(model: LanguageModel, hparams: LocateThenEditHParams) -> tuple[int, ...]:
    """The token that ends an answer, if it is a part of targets."""
    if hparams.chat_answer != "whole" or model.prompt_form.end == "":
        return ()
    return (int(model.tokenizer.convert_tokens_to_ids(model.prompt_form.end)),)


def _ended(model: LanguageModel, row: TokenRow, end: tuple[int, ...]) -> TokenRow:
    """A row with one more target token, unless the model has no position for it: the last token is only predicted, so
    it needs none."""
    full = model.positions is not None and len(row.ids) > model.positions
    return row if full else replace(row, ids=(*row.ids, *end))


def _rows_of(
    model: LanguageModel, request: EditRequest, templates: Sequence[str], hparams: LocateThenEditHParams
) -> FactRows:
    end = _end_of_turn(model, hparams)
    rows = [
        continuation_row(model, request, template=template, fact_token=hparams.fact_token) for template in templates
    ]
    contexts = tuple(_ended(model, row, end) for row in rows)
    shortened = any(fitting(model, request, template) != template for template in templates)
    if hparams.kl_factor == 0 or not request.subject:
        return FactRows(text=request.text, contexts=contexts, essence=None, shortened=shortened)
    prompt = request.model_copy(update={"prompt": ESSENCE_PROMPT})
    row = lookup_row(model, prompt, fact_token="subject_last" if hparams.fact_token == "last" else hparams.fact_token)
    position = row.lookup if hparams.kl_position == "lookup" and not end else len(row.ids) - 1
    # Tokens after that position are not needed.
    essence = replace(row, ids=row.ids[: position + 1])
    return FactRows(text=request.text, contexts=contexts, essence=essence, shortened=shortened)
