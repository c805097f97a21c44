"""How a question is put to the model: its contexts, with or without a random text in front.

* ``prompt``: the data set's prompt in the form of the session: plain text, or the chat of ``--chat-template``.
* ``question``: a question alone, as plain text.
* ``instruction``: a question with an instruction to answer it, as plain text.
* ``chat``: a question, or else the prompt, as the user's turn of the model's chat template, with thinking switched off.
* ``thinking``: the same with thinking switched on. The answer is what follows the thought.

"The Mirage of Model Editing" (arXiv 2502.11177) asks in the middle three. Departures: the wording of the instruction
is ours, and a chat has the system line of the model's own template.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editcore.interfaces.errors import ModelError
from editcore.interfaces.values import FactRecord
from editcore.models.options import Sampling
from editcore.models.prompt_form import PLAIN, PromptForm, chat_form

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "Context",
    "Way",
    "after_thought",
    "as_question",
    "in_form",
    "possible_forms",
    "prefix_texts",
    "ways_of",
]

Context = Literal["prompt", "question", "instruction", "chat", "thinking"]

_HOW: Mapping[Context, str] = {
    "prompt": "",
    "question": "asked as a question alone",
    "instruction": "asked as a question with an instruction to answer it",
    "chat": "asked in the model's chat template, with thinking off",
    "thinking": "asked in the model's chat template, with thinking on: what follows the thought",
}
_NEEDS: Mapping[Context, str] = {
    "prompt": "",
    "question": "questions (prompts that are some, or records that have one)",
    "instruction": "questions (prompts that are some, or records that have one)",
    "chat": "a model with a chat template",
    "thinking": "a chat template that knows enable_thinking",
}


@dataclass(frozen=True, slots=True)
class Way:
    """A context, and the length of the random text in front."""

    context: Context = "prompt"
    prefix: int = 0
    """Tokens of the text; 0 for none."""

    @property
    def suffix(self) -> str:
        """What the names of its metrics end with: ``_chat_after_10``; empty for the bare prompt."""
        own = "" if self.context == "prompt" else f"_{self.context}"
        return own + (f"_after_{self.prefix}" if self.prefix else "")

    @property
    def label(self) -> str:
        """The same for labels: ``chat, after 10 tokens``."""
        parts = ([] if self.context == "prompt" else [self.context]) + (
            [f"after {self.prefix} tokens"] if self.prefix else []
        )
        return ", ".join(parts)

    @property
    def how(self) -> str:
        """How the model is asked, in words; empty for the bare prompt."""
        text = f"behind a random text of {self.prefix} tokens" if self.prefix else ""
        return ", ".join(filter(None, (_HOW[self.context], text)))

    @property
    def needs(self) -> str:
        """What must be there to ask so; empty for nothing."""
        return _NEEDS[self.context]


def ways_of(contexts: Iterable[Context], prefixes: Iterable[int]) -> tuple[Way, ...]:
    """Every context with every prefix. The bare prompt comes first, if it is among them."""
    found = [Way(context, prefix) for context in contexts for prefix in dict.fromkeys(prefixes)]
    return tuple(sorted(dict.fromkeys(found), key=lambda way: way != Way()))


def possible_forms(model: LanguageModel, contexts: Iterable[Context]) -> dict[Context, PromptForm]:
    """The form of the prompts of each context. A context that the model's tokenizer does not have is left out.

    Raises:
        ModelError: there is none that it has.
    """
    forms: dict[Context, PromptForm] = {}
    reasons: list[ModelError] = []
    for context in contexts:
        try:
            forms[context] = _form(model, context)
        except ModelError as error:
            reasons.append(error)
    if reasons and not forms:
        raise reasons[0]
    return forms


def _form(model: LanguageModel, context: Context) -> PromptForm:
    if context == "prompt":
        return model.prompt_form
    if context in ("question", "instruction"):
        return PLAIN
    return chat_form(model.tokenizer, name=model.name, thinking=context == "thinking")


@contextmanager
def in_form(model: LanguageModel, form: PromptForm) -> Iterator[None]:
    """Inside the block, the model reads prompts in that form."""
    usual, model.prompt_form = model.prompt_form, form
    try:
        yield
    finally:
        model.prompt_form = usual


def as_question(record: FactRecord, prompt: str) -> str | None:
    """A prompt of the record as a question; ``None`` if it is none, and the record has none for it.

    A record has questions in two places. ``extra["question"]`` is the edited prompt's template as a question, with
    ``{}`` for the subject; it serves all prompts that have the edited prompt's words. A probe of the kind
    ``paraphrase.question`` is the edited fact as a question.
    """
    if prompt.rstrip().endswith(_QUESTION_MARKS):
        return prompt
    template = record.extra.get("question")
    before, slot, after = record.request.prompt.partition("{}")
    subject = prompt[len(before) : len(prompt) - len(after)]
    if isinstance(template, str) and slot and subject and prompt == before + subject + after:
        return template.replace("{}", subject)
    if prompt == record.request.text:
        return next((probe.prompt for probe in record.of_kind("paraphrase.question")), None)
    return None


_QUESTION_MARKS = ("?", "？", "؟")


def prefix_texts(model: LanguageModel, records: Sequence[FactRecord], tokens: int, *, seed: int) -> dict[str, str]:
    """By request id, a text of about ``tokens`` tokens that the model writes, to stand before a prompt.

    Ask the unedited model, and keep the texts: another model writes others.
    """
    openings = [_OPENINGS[number % len(_OPENINGS)] for number in range(len(records))]
    if tokens == 1 or not records:
        texts = openings
    else:
        sampling = Sampling(seed=seed, top_k=_TOP_K)
        written = model.generate(openings, max_new_tokens=tokens - 1, sampling=sampling, raw=True)
        texts = [opening + text for opening, text in zip(openings, written, strict=True)]
    # A character that ends in the middle of its bytes is no text.
    sentences = (" ".join(text.replace("\ufffd", "").split()).rstrip(".") + ". " for text in texts)
    return {record.request.id: sentence for record, sentence in zip(records, sentences, strict=True)}


_TOP_K = 5
"""As in the context templates of MEMIT, section 5 of its reference implementation."""
_OPENINGS = ("The", "In", "When", "It", "She", "After", "Some", "We")
"""First words of the random texts."""


def after_thought(text: str, form: PromptForm) -> str:
    """What follows a thought; empty while it has not ended. A text without a thought is all answer."""
    _, ended, answer = text.rpartition(_THOUGHT_ENDS)
    if ended:
        return answer
    begun = _THOUGHT_BEGINS in text or form.after.rstrip().endswith(_THOUGHT_BEGINS)
    return "" if begun else text


_THOUGHT_BEGINS, _THOUGHT_ENDS = "<think>", "</think>"
