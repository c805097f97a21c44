"""Facts as tokens: the lookup token, and the prompt joined to its target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import SubjectNotFoundError
from editcore.interfaces.values import EditRequest

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "FactToken",
    "TokenRow",
    "continuation_row",
    "fitting",
    "join_continuation",
    "last_index_covering",
    "lookup_row",
    "refuse_too_long",
]

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


@documented
@dataclass(frozen=True, slots=True)
class TokenRow:
    """One text as tokens, with the lookup token of a fact."""

    ids: tuple[int, ...]
    """Token ids of the text, a beginning-of-sequence token included where the tokenizer adds one."""
    lookup: int
    """Index of the lookup token, where δ is added and the key is read."""
    target_start: int
    """Index of the first target token, ``len(ids)`` if the row has no target."""

    @property
    def targets(self) -> tuple[int, ...]:
        """Token ids of the target; empty for a row without one."""
        return self.ids[self.target_start :]


def last_index_covering(offsets: Sequence[tuple[int, int]], position: int) -> int | None:
    """The last token whose character span covers ``position``; ``None`` if no token does.

    A character of several byte-level tokens gives all of them the same span; the last of them counts.
    """
    covering = [index for index, (start, end) in enumerate(offsets) if start <= position < end]
    return covering[-1] if covering else None


def lookup_row(
    model: LanguageModel, request: EditRequest, *, template: str = "{}", fact_token: FactToken = "subject_last"
) -> TokenRow:
    """Tokens of the filled prompt inside ``template``, with the lookup token.

    The lookup token is found in the text, by the character offsets of the tokenizer. So padding and special tokens do
    not move it. Without a subject, it is the last token of the prompt; editors refuse such requests unless their
    settings ask for it (:attr:`HParams.needs_subject`). The row includes what the model's prompt form puts around the
    text. A context that is too long for the model is shortened (:func:`fitting`).

    Raises:
        RequestError: the prompt alone, with its target, is longer than the model's positions.
        SubjectNotFoundError: no token covers the subject, or there is no token after it where one is asked for.
    """
    return _lookup_row(model, request, fitting(model, request, template), fact_token)


def continuation_row(
    model: LanguageModel,
    request: EditRequest,
    *,
    template: str = "{}",
    fact_token: FactToken = "subject_last",
) -> TokenRow:
    """:func:`lookup_row` followed by the tokens of ``target_new``, joined as :func:`join_continuation` joins them."""
    template = fitting(model, request, template)
    row = _lookup_row(model, request, template, fact_token)
    text, join = _in_context(request, template)
    ids, target_start = join_continuation(model, text, row.ids, request.target_new, join=join)
    return TokenRow(ids, row.lookup, target_start)


def _lookup_row(model: LanguageModel, request: EditRequest, template: str, fact_token: FactToken) -> TokenRow:
    """:func:`lookup_row`, without shortening the template."""
    text, _ = _in_context(request, template)
    ids, offsets = model.read_prompt(text)
    if not request.subject:
        return TokenRow(ids, len(ids) - 1, len(ids))
    start = template.index("{}") + request.prompt.index("{}")
    start += len(model.prompt_form.before)
    return TokenRow(ids, _lookup_index(offsets, text, start, request.subject, fact_token, len(ids)), len(ids))


def fitting(model: LanguageModel, request: EditRequest, template: str) -> str:
    """``template`` without its first words, as many as must go for the text to fit the model's positions.

    The prompt, its target and the end of the template stay whole.
    """
    if model.positions is None:
        return template
    before, slot, after = template.partition("{}")
    words = before.split(" ")
    while any(words):
        text, join = _in_context(request, " ".join(words) + slot + after)
        if model.room(text, then=model.prompt_form.continuation(text, request.target_new, join=join)) >= -1:
            break
        words = words[1:]
    return " ".join(words) + slot + after


def _in_context(request: EditRequest, template: str) -> tuple[str, str | None]:
    """The filled prompt inside ``template``, and the text that joins it to the target."""
    before, _, after = template.partition("{}")
    return before + request.text + after, None if after else request.join


def refuse_too_long(model: LanguageModel, requests: Iterable[EditRequest]) -> None:
    """Refuse requests whose prompt and target have more tokens than the model has positions.

    Raises:
        RequestError: one has; the message shows its text.
    """
    if model.positions is None:
        return
    for request in requests:
        continuation = model.prompt_form.continuation(request.text, request.target_new, join=request.join)
        model.read_prompt(request.text, then=continuation)


def join_continuation(
    model: LanguageModel, text: str, text_ids: tuple[int, ...], target: str, *, join: str | None = None
) -> tuple[tuple[int, ...], int]:
    """Ids of the prompt ``text`` continued by ``target``, and the index of the first target token.

    Usually these are the ids of the prompt, then those of the target, as the model would generate it. If the tokenizer
    merges the end of the prompt with the start of the target, the ids of the whole text are used, and the target starts
    with the token that reaches beyond the prompt. A prompt that ends in white space keeps its own ids.

    Args:
        text_ids: ids of the prompt alone.
        join: the text between the two; see :meth:`PromptForm.continuation`.

    Raises:
        RequestError: they are longer than the model's positions, or a token has no embedding.
    """
    form = model.prompt_form
    continuation = form.continuation(text, target, join=join)
    joint, offsets = model.read_prompt(text, then=continuation)
    if joint[: len(text_ids)] == text_ids:
        return joint, len(text_ids)
    whole = form.wrap(text)
    if whole[-1:].isspace():
        # Encoded after a line break, because some tokenizers put a space before the start of a text.
        start, target_ids = model.read_text("\n"), model.read_text(f"\n{continuation}")
        if target_ids[: len(start)] == start:
            return text_ids + target_ids[len(start) :], len(text_ids)
    first = next(index for index, (_, end) in enumerate(offsets) if end > len(whole))
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
