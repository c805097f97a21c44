"""How a model reads texts: prompts in their form, their tokens, and how many of them it can read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError
from editcore.models.encoding import Encoded, TokenSpans, pad_rows, shortened, tokens_of
from editcore.models.positions import position_limit
from editcore.models.prompt_form import PLAIN, PromptForm, chat_form

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PromptReader"]

_AROUND = 30
"""Characters that a message shows before and after a token."""


@documented
class PromptReader:
    """A model's tokenizer, the form of its prompts and its positions: the part of a model that reads."""

    hf: PreTrainedModel
    """The model itself, as transformers has it."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    name: str
    """A catalogue name, a folder or a hub id."""
    prompt_form: PromptForm
    """The text around every prompt: none, or the turns of a chat (:meth:`use_chat_template`)."""
    positions: int | None
    """The most tokens that it reads at once; ``None`` for any number."""

    def __init__(self, hf: Any, tokenizer: Any, *, name: str) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self.prompt_form = PLAIN
        self.positions = position_limit(hf)
        self._rewriters: list[Callable[[str], str]] = []

    @property
    def device(self) -> torch.device:
        """The device of the input embedding, where token ids go. Blocks may be elsewhere (:meth:`place`)."""
        device: torch.device = self.hf.get_input_embeddings().weight.device
        return device

    @property
    def pad_id(self) -> int:
        """The id of the token that pads rows; padding is always masked."""
        return int(self.tokenizer.pad_token_id)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> Encoded:
        """``texts`` as tokens, padded on the right whatever side the tokenizer prefers.

        Args:
            add_special_tokens: with those that the tokenizer puts in front (BOS). Those that it appends are left out.

        Raises:
            RequestError: the model has no embedding of a token.
        """
        if not texts:
            raise ValueError("encode needs at least one text")
        rows = [self._tokens(text, special_tokens=add_special_tokens) for text in texts]
        ids, mask = pad_rows([row for row, _ in rows], self.pad_id, device=self.device)
        return Encoded(ids, mask, tuple(offsets for _, offsets in rows))

    def use_chat_template(self) -> None:
        """From now on, every prompt is the user's turn of a chat, and the continuation is the assistant's answer.

        Raises:
            ModelError: the tokenizer has no chat template, or one that does not keep the user's text.
        """
        self.prompt_form = chat_form(self.tokenizer, name=self.name)

    def read_prompt(self, prompt: str, *, then: str = "") -> tuple[tuple[int, ...], TokenSpans]:
        """Ids of a prompt in its form, continued by ``then``, and the characters of each token.

        The characters are those of the whole text, ``prompt_form.wrap(prompt) + then``; special tokens have (0, 0).
        Special tokens that the tokenizer puts in front (BOS) are included. Those that it appends are not, because a
        text that is continued has not ended.

        Raises:
            RequestError: there are more tokens than :attr:`positions`, or the model has no embedding of one.
        """
        form = self.prompt_form
        ids, offsets = self._tokens(form.wrap(prompt) + then, special_tokens=form.special_tokens)
        if self.positions is not None and len(ids) > self.positions + bool(then):  # the last token of then is not read
            raise RequestError(
                f"{shortened(prompt)}{' with its target' if then else ''} has {len(ids)} tokens; {self.name} reads at "
                f"most {self.positions}. Shorten it or leave its record out."
            )
        return ids, offsets

    def read_text(self, text: str, *, opening: bool = False) -> tuple[int, ...]:
        """Ids of a text as it stands, whatever the form of prompts.

        Args:
            opening: with the special tokens that the tokenizer puts in front of a text.

        Raises:
            RequestError: the model has no embedding of a token.
        """
        return self._tokens(text, special_tokens=opening)[0]

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts in front of every text (BOS); often none."""
        return self._tokens("", special_tokens=True)[0]

    def room(self, prompt: str, *, then: str = "") -> float:
        """How many more tokens the model can read after a prompt in its form, continued by ``then``.

        Less than 0 if these are too long already; infinite where :attr:`positions` is ``None``.
        """
        if self.positions is None:
            return math.inf
        form = self.prompt_form
        return self.positions - len(self._tokens(form.wrap(prompt) + then, special_tokens=form.special_tokens)[0])

    def _tokens(self, text: str, *, special_tokens: bool) -> tuple[tuple[int, ...], TokenSpans]:
        """Ids of a text and their characters; a token without an embedding is refused."""
        ids, offsets = tokens_of(self.tokenizer, text, special_tokens=special_tokens)
        rows = self.hf.get_input_embeddings().weight.shape[0]
        for token, (first, last) in zip(ids, offsets, strict=True):
            if token >= rows:
                around = text[max(0, first - _AROUND) : last + _AROUND]
                raise RequestError(
                    f"The token {self.tokenizer.convert_ids_to_tokens(token)!r} ({token}) in {shortened(around)} has "
                    f"no embedding in {self.name}, which embeds {rows} tokens. Write the text without it, or use a "
                    "model whose embeddings were extended for it."
                )
        return ids, offsets

    @contextlib.contextmanager
    def rewriting(self, rewrite: Callable[[str], str]) -> Iterator[None]:
        """Inside the block, :meth:`asked` also applies ``rewrite`` to prompts, after the rewrites that are there."""
        self._rewriters.append(rewrite)
        try:
            yield
        finally:
            self._rewriters.remove(rewrite)

    @property
    def rewrites_prompts(self) -> bool:
        """Whether attachments rewrite prompts now."""
        return bool(self._rewriters)

    def asked(self, prompt: str) -> str:
        """The prompt that the model reads instead of ``prompt``, where attachments rewrite prompts.

        Generation and evaluation ask for it. Keys and targets are computed from prompts as they are.
        """
        for rewrite in self._rewriters:
            prompt = rewrite(prompt)
        return prompt
