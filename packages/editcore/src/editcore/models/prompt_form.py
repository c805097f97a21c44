"""What stands around a prompt when a model reads it: nothing, or the turns of its chat template.

A model has one such form, and every prompt is read in it: the prompts of an edit (with context templates, and the
essence prompt), prompts that are scored, and prompts that are continued. Other text is read as it stands: a corpus, the
sampled openings of context templates, the text of a perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import ModelError
from editcore.interfaces.joining import separator

__all__ = ["PLAIN", "PromptForm", "chat_form"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    """A prompt is read as ``before + prompt + after``, and its continuation follows at once."""

    before: str = ""
    """Text in front of the prompt."""
    after: str = ""
    """Text behind it, where the answer begins."""
    space: bool = True
    """Whether a continuation follows the prompt as in one text, where a space may join them (see
    :func:`editcore.interfaces.joining.separator`). False for a chat, where the answer is a text of its own."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens (BOS). A chat template has them in its text."""
    end: str = ""
    """The special token that ends an answer, such as ``<|im_end|>``; empty where none is known."""

    def wrap(self, prompt: str) -> str:
        """The text that the model reads."""
        return self.before + prompt + self.after

    def continuation(self, prompt: str, target: str, *, join: str | None = None) -> str:
        """``target`` as it follows ``prompt``, with or without a space in front.

        Args:
            join: the text between the two; left out, the last character of the prompt decides. In a chat there is none.
        """
        joined = "" if not self.space else separator(prompt) if join is None else join
        return joined + target.removeprefix(" ")

    def shown(self, prompt: str, answer: str) -> str:
        """Prompt and answer for people: one sentence, or a turn and its answer."""
        return prompt + answer if self.space else f"{prompt} → {answer}"


PLAIN = PromptForm()
"""Plain text, which the tokenizer encodes as usual."""

_SLOT = "PROMPTGOESHERE"
_ANSWER = "ANSWERGOESHERE"


def chat_form(tokenizer: Any, *, name: str, thinking: bool = False) -> PromptForm:
    """The form in which the prompt is the user's turn, and the answer is the start of the assistant's turn.

    What a template writes instead of a thought, or at its beginning, is part of ``after``.

    Args:
        thinking: whether the model is to think first. Templates that know it as ``enable_thinking`` are told.

    Raises:
        ModelError: the tokenizer has no chat template, it does not keep a user's text as it is, or it does not know
            ``enable_thinking`` where the model is to think.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"The tokenizer of {name} has no chat template, so --chat-template cannot be used: leave it out (base "
            "models continue plain text), or choose an instruct model."
        )
    if thinking and "enable_thinking" not in str(tokenizer.chat_template):
        raise ModelError(
            f"The chat template of {name} does not know enable_thinking, so thinking cannot be switched on."
        )
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": _SLOT}]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    except (TemplateError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The chat template of {name} cannot be applied: {' '.join(str(error).split())}.") from error
    if text.count(_SLOT) != 1:
        raise ModelError(
            f"The chat template of {name} shows a user's text {text.count(_SLOT)} times; it must show it once."
        )
    before, _, after = text.partition(_SLOT)
    return PromptForm(
        before=before, after=after, space=False, special_tokens=False, end=_end_of_answer(tokenizer, turns)
    )


def _end_of_answer(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """The special token that the template puts behind an assistant's answer; empty if there is none."""
    from jinja2 import TemplateError

    answered = [*turns, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(answered, tokenize=False, enable_thinking=False)
    except (TemplateError, ValueError, KeyError, TypeError):  # a template that takes questions alone
        return ""
    behind = text.partition(_ANSWER)[2].lstrip()
    special = [token for token in tokenizer.all_special_tokens if behind.startswith(token)]
    return max(special, key=len, default="")
