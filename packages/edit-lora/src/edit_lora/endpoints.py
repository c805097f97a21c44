"""Servers that answer over HTTP: llama-server, and those with the completions of OpenAI's API (vLLM and others).

Prompts are sent as token ids where the server takes them, so that its tokenizer makes no difference. All answers are
greedy. A server that says which tokens it wrote is compared by tokens, any other by text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from editcore import LanguageModel, ModelError
from editcore.models import JsonServer, RefusedError

from edit_lora.answers import LIKELIEST, Answer, before_special
from edit_lora.llama_adapters import find_adapter, loaded_adapters

__all__ = ["LlamaServer", "OpenAIServer", "open_endpoint"]

_BAD_REQUEST = (400, 422)


def open_endpoint(
    server: JsonServer,
    model: LanguageModel,
    *,
    name: str | None = None,
    base: str | None = None,
    merged: bool = False,
) -> LlamaServer | OpenAIServer:
    """The server at an address, whichever it is.

    Args:
        model: the run's; its tokenizer reads texts where the server knows no ids.
        name: the adapter, as the server calls it; for a model with the edits in its weights, the model.
        base: the model without the edits, as the server calls it.
        merged: the served model has the edits in its weights.

    Raises:
        ModelError: the server does not answer, or has no such adapter or model.
    """
    adapters = loaded_adapters(server)
    if adapters is not None:
        own = None if merged else find_adapter(adapters, name, url=server.url)
        return LlamaServer(server=server, model=model, adapters=adapters, own=own)
    return OpenAIServer.choose(server, model, name=name, base=base)


@dataclass(slots=True, kw_only=True)
class LlamaServer:
    """llama.cpp's server. The strength of its adapters is set for each request, so that other users notice nothing."""

    server: JsonServer
    model: LanguageModel
    adapters: Sequence[Mapping[str, Any]]
    own: Mapping[str, Any] | None
    """The run's adapter; ``None`` for a model with the edits in its weights."""

    @property
    def has_base(self) -> bool:
        """See :class:`edit_lora.answers.Served`."""
        return self.own is not None

    def answers(self, rows: Sequence[Sequence[int]], *, tokens: int, edited: bool) -> list[Answer]:
        """See :class:`edit_lora.answers.Served`. An adapter that is switched off is asked at the strength 1."""
        lora = [{"id": adapter["id"], "scale": self._scale(adapter, edited=edited)} for adapter in self.adapters]
        # cache_prompt: llama-server keeps prompts that it has read, and takes them for an adapter of another strength.
        body = {
            "n_predict": tokens, "temperature": 0, "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
            "n_probs": LIKELIEST, "return_tokens": True, "cache_prompt": False, "lora": lora,
        }  # fmt: skip
        return [self._read(self.server.post("/completion", {**body, "prompt": list(row)})) for row in rows]

    def _scale(self, adapter: Mapping[str, Any], *, edited: bool) -> float:
        if not edited or self.own is None or adapter["id"] != self.own["id"]:
            return 0.0
        return float(adapter.get("scale") or 1.0)

    def _read(self, answer: Any) -> Answer:
        if not isinstance(answer, Mapping) or "tokens" not in answer:
            raise ModelError(f"{self.server.url} does not say which tokens it wrote; it is too old a llama-server.")
        ids = [int(token) for token in answer["tokens"]]
        steps = answer.get("completion_probabilities") or []
        # A token that ends within a character has no step of its own.
        told = bool(steps) and [step["id"] for step in steps] == ids[: len(steps)]
        kept = before_special(ids, frozenset(self.model.tokenizer.all_special_ids))
        return Answer(
            tokens=kept,
            text=str(self.model.tokenizer.decode(kept)),
            likeliest={top["id"]: top["logprob"] for top in steps[0]["top_logprobs"]} if told else None,
        )


@dataclass(frozen=True, slots=True)
class _Form:
    """What a request asks for. Servers refuse what they do not know."""

    ids: bool
    """Prompts as token ids, not as text."""
    extra: bool
    """With vLLM's fields for token ids in the answer."""
    logprobs: int | None


_FORMS = (
    _Form(ids=True, extra=True, logprobs=LIKELIEST),
    _Form(ids=True, extra=False, logprobs=LIKELIEST),
    _Form(ids=True, extra=False, logprobs=5),
    _Form(ids=False, extra=False, logprobs=5),
    _Form(ids=False, extra=False, logprobs=None),
)
"""From the most that is asked for to the least."""


@dataclass(slots=True, kw_only=True)
class OpenAIServer:
    """A server with ``/v1/completions``; each adapter is a model of its own."""

    server: JsonServer
    model: LanguageModel
    name: str
    """The model with the edits."""
    base: str | None
    """The model without; ``None`` where the server has none."""
    _forms: list[_Form] = field(default_factory=lambda: list(_FORMS))

    @classmethod
    def choose(
        cls, server: JsonServer, model: LanguageModel, *, name: str | None = None, base: str | None = None
    ) -> OpenAIServer:
        """The server with the models of these names. Without names, with its only adapter and that adapter's base.

        Raises:
            ModelError: the server does not list its models, or has none of such a name.
        """
        try:
            listed = server.get("/v1/models")
            models = {str(found["id"]): found for found in listed["data"]}
        except (RefusedError, TypeError, KeyError) as error:
            raise ModelError(
                f"{server.url} does not have OpenAI's API: it does not list its models ({error})."
            ) from error
        adapters = [known for known, found in models.items() if found.get("parent")]
        if name is None and len(adapters) == 1:
            [name] = adapters
        for asked in (name, base):
            if asked is not None and asked not in models:
                raise ModelError(f"{server.url} has no model '{asked}'; it has {', '.join(models) or 'none'}.")
        if name is None:
            raise ModelError(
                f"{server.url} has the models {', '.join(models) or 'none'}. Say which has the edits: --name NAME."
            )
        parent = models[name].get("parent")
        if base is None and parent:
            base = str(parent) if parent in models else next((known for known in models if known not in adapters), None)
        return cls(server=server, model=model, name=name, base=base)

    @property
    def has_base(self) -> bool:
        """See :class:`edit_lora.answers.Served`."""
        return self.base is not None

    def answers(self, rows: Sequence[Sequence[int]], *, tokens: int, edited: bool) -> list[Answer]:
        """See :class:`edit_lora.answers.Served`."""
        return [self._ask(row, tokens, self.name if edited else str(self.base)) for row in rows]

    def _ask(self, row: Sequence[int], tokens: int, name: str) -> Answer:
        while True:
            form = self._forms[0]
            body: dict[str, Any] = {"model": name, "max_tokens": tokens, "temperature": 0}
            body["prompt"] = list(row) if form.ids else self._text(row)
            if form.logprobs is not None:
                body["logprobs"] = form.logprobs
            if form.extra:
                body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
            try:
                return self._read(self.server.post("/v1/completions", body))
            except RefusedError as error:
                if error.status not in _BAD_REQUEST or len(self._forms) == 1:
                    raise
                self._forms.pop(0)

    def _text(self, row: Sequence[int]) -> str:
        """A prompt as text. The server puts the opening token in front by itself."""
        opening = len(self.model.opening_ids)
        return str(self.model.tokenizer.decode(list(row)[opening:]))

    def _read(self, answer: Any) -> Answer:
        try:
            choice = answer["choices"][0]
            text, told = str(choice["text"]), choice.get("logprobs") or {}
        except (TypeError, KeyError, IndexError) as error:
            raise ModelError(f"{self.server.url} gives no completion: {str(answer)[:200]}") from error
        ids = choice.get("token_ids")
        if ids is None and told.get("tokens"):
            ids = [self._id(token) for token in told["tokens"]]
        tokens = None
        if ids is not None and None not in ids:
            tokens = before_special(ids, frozenset(self.model.tokenizer.all_special_ids))
            text = str(self.model.tokenizer.decode(tokens))
        first = (told.get("top_logprobs") or [None])[0]
        likeliest = None
        if first:
            likeliest = {i: float(value) for token, value in first.items() if (i := self._id(token)) is not None}
        return Answer(tokens=tokens, text=text, likeliest=likeliest or None)

    def _id(self, token: str) -> int | None:
        """The id of a token as an answer names it; ``None`` where that is not clear."""
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        ids = self.model.read_text(token)
        return ids[0] if len(ids) == 1 else None
