"""Texts as tokens: where a fact is looked up, how a prompt is joined to its target, and padding.

Shapes: ``rows`` token rows, ``seq`` their padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import SubjectNotFoundError
from editcore.interfaces.values import EditRequest

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "FactToken",
    "TokenRow",
    "continuation_row",
    "join_continuation",
    "last_index_covering",
    "lookup_row",
    "pad_rows",
]

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


@documented
@dataclass(frozen=True, slots=True)
class TokenRow:
    """One text as tokens, with the position where the fact is looked up."""

    ids: tuple[int, ...]
    """Token ids of the text, a beginning-of-sequence token included where the tokenizer adds one."""
    lookup: int
    """Index into ``ids``; δ is added and the key is read here."""
    target_start: int
    """Index of the first target token, ``len(ids)`` if the row has no target."""

    @property
    def targets(self) -> tuple[int, ...]:
        """Token ids of the target; empty for a row without one."""
        return self.ids[self.target_start :]


def last_index_covering(offsets: Sequence[tuple[int, int]], position: int) -> int | None:
    """The last token whose character span covers ``position``; ``None`` if no token does.

    The last one, because a character that takes several byte-level tokens gives all of them the same span.
    """
    covering = [index for index, (start, end) in enumerate(offsets) if start <= position < end]
    return covering[-1] if covering else None


def lookup_row(
    model: LanguageModel, request: EditRequest, *, template: str = "{}", fact_token: FactToken = "subject_last"
) -> TokenRow:
    """Tokens of the filled prompt inside ``template``, and the lookup token from the tokenizer's character offsets.

    Padding and special tokens never move it, because the position is found in the text and not counted in tokens. What
    the model's prompt form puts around the whole is in the row, too.

    Raises:
        SubjectNotFoundError: the request has no subject, no token covers it, or there is no token after it where one
            is asked for.
    """
    if not request.subject:
        raise SubjectNotFoundError(f"'{request.text}' names no subject, so there is no token to look it up at.")
    before, _, after = template.partition("{}")
    start = len(before) + request.prompt.index("{}")
    text = before + request.text + after
    ids, offsets = model.read_prompt(text)
    start += len(model.prompt_form.before)
    return TokenRow(ids, _lookup_index(offsets, text, start, request.subject, fact_token, len(ids)), len(ids))


def continuation_row(
    model: LanguageModel,
    request: EditRequest,
    *,
    template: str = "{}",
    fact_token: FactToken = "subject_last",
) -> TokenRow:
    """:func:`lookup_row` followed by the tokens of ``" " + target_new`` (in a chat, of ``target_new``).

    The prompt and the target are tokenised apart and joined, which is how the target will be generated. Where the
    tokenizer merges across the border (the joint encoding differs), the joint encoding is used.
    """
    row = lookup_row(model, request, template=template, fact_token=fact_token)
    before, _, after = template.partition("{}")
    text = before + request.text + after
    ids, target_start = join_continuation(model, text, row.ids, request.target_new)
    return TokenRow(ids, row.lookup, target_start)


def join_continuation(
    model: LanguageModel, text: str, text_ids: tuple[int, ...], target: str
) -> tuple[tuple[int, ...], int]:
    """Ids of the prompt ``text`` continued by ``target``, and the index of the first target token.

    Args:
        text_ids: those of the prompt alone.
    """
    continuation = model.prompt_form.continuation(target)
    alone = tuple(model.tokenizer(continuation, add_special_tokens=False)["input_ids"])
    joint, offsets = model.read_prompt(text, then=continuation)
    while joint and offsets[-1] == (0, 0):  # a tokenizer that appends an end token would end the target with it
        joint, offsets = joint[:-1], offsets[:-1]
    if joint == text_ids + alone:
        return joint, len(text_ids)
    if joint[: len(text_ids)] == text_ids:
        return joint, len(text_ids)
    end_of_prompt = len(model.prompt_form.wrap(text))
    first = next(index for index, (_, end) in enumerate(offsets) if end > end_of_prompt)
    return joint, first


def _lookup_index(
    offsets: Sequence[tuple[int, int]], text: str, start: int, subject: str, fact_token: FactToken, length: int
) -> int:
    if fact_token == "last":
        return length - 1
    position = start if fact_token == "subject_first" else start + len(subject) - 1
    found = last_index_covering(offsets, position)
    if found is None:
        raise SubjectNotFoundError(
            f"No token covers the subject {subject!r} in {text!r}; the tokenizer drops its characters. "
            "Write the subject with other characters."
        )
    if fact_token == "subject_first_after_last":
        found += 1
        if found >= length:
            raise SubjectNotFoundError(
                f"fact_token is 'subject_first_after_last', but {text!r} ends with the subject {subject!r}. "
                "Use fact_token = 'subject_last'."
            )
    return found


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """``(input_ids, attention_mask)``, both ``[rows, seq]`` int64."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    return ids.to(device), mask.to(device)
