"""The settings of free generation. This module imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from editcore.evaluation.contexts import Context, Way, ways_of
from editcore.evaluation.generation_metrics import further_metrics
from editcore.evaluation.judging import JUDGE_PROMPT, JudgeSettings
from editcore.interfaces.metrics import MetricSpec
from editcore.settings.hparams import HParams

__all__ = ["GenerationHParams", "metrics_of"]


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} comes twice")
    return values


def _with(*names: str) -> Callable[[str], str]:
    """Checks that a text has places for some values."""

    def check(text: str) -> str:
        if missing := [name for name in names if f"{{{name}}}" not in text]:
            raise ValueError(f"it has no {{{missing[0]}}}, where that goes")
        return text

    return check


def _judge_address(judge: str) -> str:
    if judge.startswith(("http://", "https://")) and set(judge) & set("@?#"):
        raise ValueError("the address of a judge is recorded, so it has no name, key or query in it: judge_key_from")
    return judge


class GenerationHParams(HParams):
    """Which questions the model is asked, and how long its answers may be."""

    sample: Annotated[int, Field(ge=1)] | None = 40
    """Facts whose edited prompt is asked, the same ones before and after the edits; none for all."""
    further: Annotated[int, Field(ge=0)] | None = 8
    """Facts of the sample whose other questions are asked too; none for all."""
    paraphrases: Annotated[int, Field(ge=0)] = 1
    """Paraphrases per such fact, chosen evenly from its list."""
    consequences: Annotated[int, Field(ge=0)] = 2
    """Questions per such fact that follow from it (portability, multi-hop)."""
    elsewhere: Annotated[int, Field(ge=0)] = 1
    """Questions per such fact about other things (neighbourhood, locality)."""
    answer_tokens: Annotated[int, Field(ge=1)] = 8
    """Longest answer, in tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = (".", "\n")
    """Texts at which an answer ends. They are ignored inside the wanted object and before the first word."""
    continuations: Annotated[int, Field(ge=0)] = 1
    """Facts of the sample with a long continuation, in which distinct word pairs are counted."""
    continuation_tokens: Annotated[int, Field(ge=2)] = 60
    """Length of a long continuation, in tokens."""
    contexts: Annotated[tuple[Context, ...], Field(min_length=1), AfterValidator(_each_once)] = ("prompt",)
    """How the questions are put; each context has metrics of its own. `prompt`: as they are. `question`: as a question
    alone. `instruction`: as a question with an instruction. `chat`: in the model's chat template. `thinking`: the same
    with thinking on."""
    prefixes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_each_once)] = (0,)
    """Tokens of a random text of the unedited model in front of each question, 0 for none; each length has metrics of
    its own."""
    question_tokens: Annotated[int, Field(ge=1)] = 32
    """Longest answer in the contexts other than `prompt`, in tokens: an answer to a question often repeats it first."""
    instruction: Annotated[str, AfterValidator(_with("question"))] = "Answer the question.\n\nQ: {question}\nA:"
    """The text of the context `instruction`, with {question} in its place."""
    thinking_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest thought in the context `thinking`, in tokens. The answer comes on top."""
    judge: Annotated[str, Field(min_length=1), AfterValidator(_judge_address)] | None = None
    """Who also judges the answers: a model (catalogue name, folder or hub id), or the address (http://...) of an
    endpoint with OpenAI's API; none for nobody."""
    judge_model: Annotated[str, Field(min_length=1)] | None = None
    """The model behind an endpoint; none for its only one."""
    judge_key_from: Annotated[str, Field(min_length=1)] | None = None
    """The environment variable with the key of an endpoint. The key is recorded nowhere."""
    judge_prompt: Annotated[str, AfterValidator(_with("question", "right", "answer"))] | None = None
    """What the judge is asked, with {question}, {right} and {answer} in their places; none for a question of editcore's
    own."""
    judge_tokens: Annotated[int, Field(ge=1)] = 16
    """Longest reply of the judge, in tokens. A judge that thinks needs more."""
    judge_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that an endpoint may take for a reply."""

    @property
    def ways(self) -> tuple[Way, ...]:
        """Every context with every prefix."""
        return ways_of(self.contexts, self.prefixes)

    def limit(self, way: Way) -> int:
        """The most tokens of an answer, a thought included."""
        if way.context == "prompt":
            return self.answer_tokens
        return self.question_tokens + (self.thinking_tokens if way.context == "thinking" else 0)

    @property
    def judging(self) -> JudgeSettings | None:
        """Who judges; ``None`` for nobody."""
        if self.judge is None:
            return None
        return JudgeSettings(
            judge=self.judge, model=self.judge_model, key_from=self.judge_key_from,
            prompt=self.judge_prompt or JUDGE_PROMPT, tokens=self.judge_tokens, timeout=self.judge_timeout,
        )  # fmt: skip


def metrics_of(hparams: GenerationHParams) -> list[MetricSpec]:
    """The metrics of contexts, prefixes and a judge that are asked for.

    Raises:
        HParamsError, ModelError: there is no such judge, or its key is missing.
    """
    if (judge := hparams.judging) is not None:
        judge.check()
    return further_metrics(hparams.ways, None if judge is None else judge.name)
