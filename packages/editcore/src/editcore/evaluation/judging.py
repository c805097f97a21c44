"""A judge: a second model that says whether an answer is right.

It is a model on this machine, or one behind an endpoint with OpenAI's API. Every reply is kept in the run's folder, so
that a later measurement asks only what has no verdict yet. What goes wrong with a judge is told in a sentence, and the
answers are kept: a run is not lost.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from editcore._util.records import Record, record_text
from editcore._util.words import counted
from editcore.evaluation.contexts import after_thought
from editcore.interfaces.errors import EditcoreError, HParamsError, ModelError
from editcore.interfaces.progress import Progress
from editcore.models.http_json import JsonServer
from editcore.models.prompt_form import PLAIN
from editcore.models.sources import look_at

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["JUDGEMENTS_NAME", "JUDGE_PROMPT", "Judge", "JudgeSettings", "Verdicts", "verdict_of", "without_verdict"]

JUDGEMENTS_NAME = "judgements.jsonl"
JUDGE_PROMPT = """\
Somebody was given a question, or the beginning of a sentence, and answered it.

Question: {question}
Right answer: {right}
Their answer: {answer}

Do they say the same as the right answer? Other words, and more detail, make no difference. Reply with one word, \
CORRECT or INCORRECT."""
"""The wording is ours, after the judges of "The Mirage of Model Editing" (arXiv 2502.11177) and HalluEditBench."""

_CHUNK = 16
"""Answers that a model on this machine judges together."""
_SHOWN = 60
"""Characters of a reply that a message shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings:
    """Who judges, and how it is asked."""

    judge: str
    """A catalogue name, a model folder, or the address of an endpoint with OpenAI's API."""
    model: str | None = None
    """The model behind an endpoint; left out, its only one."""
    key_from: str | None = None
    """The environment variable that holds the key of an endpoint."""
    prompt: str = JUDGE_PROMPT
    """With ``{question}``, ``{right}`` and ``{answer}``."""
    tokens: int = 16
    """Longest reply, in tokens."""
    timeout: float = 60.0
    """Seconds that an endpoint may take for a reply."""

    @property
    def is_endpoint(self) -> bool:
        """Whether it is an address."""
        return self.judge.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        """What the meaning of a metric calls it."""
        return f"{self.model} at {self.judge}" if self.is_endpoint and self.model else self.judge

    def check(self) -> None:
        """Refuse what cannot judge, before any model is loaded.

        Raises:
            HParamsError: the environment variable is not set.
            ModelError: there is no such model folder.
        """
        if self.key_from is not None and not os.environ.get(self.key_from):
            raise HParamsError(
                f"generation: the environment variable {self.key_from} is not set. It should hold the judge's key."
            )
        if not self.is_endpoint:
            look_at(self.judge)


class Judgement(Record):
    """A line of ``judgements.jsonl``."""

    judge: str
    """Who replied."""
    prompt: str
    """What it was asked, in full."""
    reply: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """What a judge made of some answers."""

    replies: Mapping[str, str]
    """By the prompt that it was asked; without those that have no reply."""
    failure: str = ""
    """Why some have no reply, in a sentence; empty if all have one."""


class Judge:
    """Asks the judge, and remembers its replies."""

    def __init__(self, settings: JudgeSettings) -> None:
        settings.check()
        self.settings = settings
        self._loaded: LanguageModel | None = None
        self._replies: dict[str, str] = {}

    def prompt(self, *, question: str, right: Sequence[str], answer: str) -> str:
        """What the judge is asked about an answer."""
        parts = {"question": question.strip(), "right": " or ".join(right), "answer": answer.strip()}
        return re.sub(r"\{(question|right|answer)\}", lambda found: parts[found[1]], self.settings.prompt)

    def verdicts(self, prompts: Sequence[str], *, folder: Path | None, progress: Progress) -> Verdicts:
        """The replies to prompts. Those that are known, here or in the folder, are not asked again.

        Args:
            folder: where replies are kept; ``None`` to keep them here alone.
        """
        wanted = list(dict.fromkeys(prompts))
        kept = None if folder is None else folder / JUDGEMENTS_NAME
        if kept is not None:
            self._replies |= _kept(kept, self.settings.name)
        missing = [prompt for prompt in wanted if prompt not in self._replies]
        failure = ""
        if missing:
            try:
                with progress.task("Judging", len(missing)) as advance:
                    for asked, replies in self._ask(missing):
                        self._remember(dict(zip(asked, replies, strict=True)), kept)
                        advance(len(asked))
            except (EditcoreError, OSError) as error:
                failure = str(error)
        known = {prompt: self._replies[prompt] for prompt in wanted if prompt in self._replies}
        return Verdicts(replies=known, failure=failure)

    def _ask(self, prompts: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
        """Prompts with their replies, part by part."""
        if self.settings.is_endpoint:
            ask = self._endpoint()
            for prompt in prompts:
                yield [prompt], [ask(prompt)]
            return
        model = self._model()
        for first in range(0, len(prompts), _CHUNK):
            part = prompts[first : first + _CHUNK]
            yield part, model.generate(part, max_new_tokens=self.settings.tokens)

    def _endpoint(self) -> Callable[[str], str]:
        """A function that asks the endpoint."""
        settings = self.settings
        server = JsonServer(
            url=settings.judge.rstrip("/").removesuffix("/v1"),
            key=None if settings.key_from is None else os.environ.get(settings.key_from),
            timeout=settings.timeout,
            timeout_setting="generation.judge_timeout",
        )
        name = settings.model or _only_model(server)

        def ask(prompt: str) -> str:
            turns = [{"role": "user", "content": prompt}]
            body = {"model": name, "messages": turns, "temperature": 0, "max_tokens": settings.tokens}
            return _reply(server.post("/v1/chat/completions", body), server.url)

        return ask

    def _model(self) -> LanguageModel:
        """The judge on this machine, loaded when it is first asked."""
        if self._loaded is None:
            from editcore.models import LanguageModel

            self._loaded = LanguageModel.load(self.settings.judge)
            if getattr(self._loaded.tokenizer, "chat_template", None):
                self._loaded.use_chat_template()
        return self._loaded

    def _remember(self, replies: Mapping[str, str], kept: Path | None) -> None:
        self._replies |= replies
        if kept is not None:
            judge = self.settings.name
            _append(kept, [Judgement(judge=judge, prompt=prompt, reply=reply) for prompt, reply in replies.items()])


def verdict_of(reply: str) -> bool | None:
    """Whether a reply says correct or incorrect; ``None`` for neither or both.

    >>> verdict_of("CORRECT."), verdict_of("It is incorrect"), verdict_of("Correct or incorrect?")
    (True, False, None)
    """
    said = after_thought(reply, PLAIN)
    found = {(bool(no), bool(wrong)) for no, wrong in re.findall(r"\b(not )?(in)?correct\b", said, re.IGNORECASE)}
    return _VERDICTS.get(next(iter(found))) if len(found) == 1 else None


_VERDICTS = {(False, False): True, (False, True): False, (True, False): False}
"""By whether ``not`` and ``in`` stand before ``correct``."""


def without_verdict(verdicts: Verdicts, name: str) -> str:
    """A sentence on what the judge did not judge; empty if it judged everything."""
    if verdicts.failure:
        return (
            f"The judge {name} did not judge all answers: {verdicts.failure} Its figures are missing. The answers are "
            "kept, and measuring again asks it only for the verdicts that are missing."
        )
    nonsense = [reply for reply in verdicts.replies.values() if verdict_of(reply) is None]
    if not nonsense:
        return ""
    shown = " ".join(nonsense[0].split())[:_SHOWN]
    return (
        f"The judge {name} gave no verdict on {len(nonsense)} of {counted(len(verdicts.replies), 'answer')}, but for "
        f"example {shown!r}. These are left out."
    )


def _kept(path: Path, name: str) -> dict[str, str]:
    """The replies of a judge that a folder has. A line that was not written whole is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        with contextlib.suppress(ValidationError):
            judgement = Judgement.model_validate_json(line)
            if judgement.judge == name:
                found[judgement.prompt] = judgement.reply
    return found


def _append(path: Path, judgements: Sequence[Judgement]) -> None:
    """Add lines to a file, behind one that may not have been written whole."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.writelines(f"{record_text(judgement)}\n".encode() for judgement in judgements)


def _only_model(server: JsonServer) -> str:
    listed: Any = server.get("/v1/models")
    try:
        names = [str(entry["id"]) for entry in listed["data"]]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{server.url} does not list its models. Name one: generation.judge_model.") from error
    if len(names) != 1:
        raise ModelError(
            f"{server.url} has the models {', '.join(sorted(names)) or 'none'}. Name one: generation.judge_model."
        )
    return names[0]


def _reply(answer: Any, url: str) -> str:
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{url} does not answer as OpenAI's chat completions do.") from error
