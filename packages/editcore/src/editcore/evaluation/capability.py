"""Capability: which of the simple tasks that the unedited model solves does the edited one still solve?

Generation tasks react to damage before perplexity does. The built-in tasks are arithmetic, copying, following an
instruction, and facts that no data set of editcore edits; ``tools/make_capability.py`` makes them. Each has one right
answer, and shows three solved tasks of its kind first. A task is solved if the first line of the greedy answer, without
white space and a full stop at its ends, is exactly that answer.

What counts is what is lost of the tasks that the unedited model solves: a small model solves a part of them only. Tasks
that name the subject of an edit are not asked.

A task belongs to no fact. Its observation is entered under one of the facts in turn, which means nothing: averages and
intervals are over tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from editcore.datasets.subjects import mentions
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import DatasetError
from editcore.interfaces.metrics import EvaluationContext, MetricSpec, Observation
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import FactRecord, first_problem
from editcore.settings.hparams import HParams

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["CAPABILITY", "CapabilityEvaluator", "CapabilityHParams", "CapabilityItem", "capability_items"]

_KINDS = {"arithmetic": "arithmetic", "copying": "copying", "instructions": "following instructions", "facts": "facts"}
_KEPT, _SOLVED = "capability_kept", "capability_solved"


def _metrics() -> Iterator[MetricSpec]:
    yield MetricSpec(
        name=_KEPT,
        label="Tasks still solved",
        meaning="The share of the tasks that the unedited model solves which the model still solves.",
        about="model",
        checklist="capability",
        average="prompts",
        needs="tasks that the unedited model solves",
    )
    for kind, what in _KINDS.items():
        yield MetricSpec(
            name=f"{kind}_kept",
            label=f"Still solved: {what}",
            meaning=f"The same of {what} alone.",
            about="model",
            average="prompts",
            needs=f"tasks of {what} that the unedited model solves",
        )
    yield MetricSpec(
        name=_SOLVED,
        label="Tasks solved",
        meaning="The share of all tasks that the model solves.",
        about="model",
        checklist="capability",
        average="prompts",
        keep=True,
        show="report",
    )


CAPABILITY = EvaluatorSpec(
    "capability",
    target="editcore.evaluation.capability:CapabilityEvaluator",
    hparams="editcore.evaluation.capability:CapabilityHParams",
    summary="Damage: which simple tasks (arithmetic, copying, instructions, other facts) does the model still solve?",
    compares=True,
    metrics=tuple(_metrics()),
)


@documented
class CapabilityItem(BaseModel):
    """A task with its one right answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """What it tests, such as ``arithmetic``."""
    prompt: Annotated[str, Field(min_length=1)]
    """The text that the model continues, solved tasks included."""
    answer: Annotated[str, Field(min_length=1)]
    """The right answer, compared letter by letter."""


def capability_items(path: Path | str | None = None) -> list[CapabilityItem]:
    """The tasks of a file, or those that come with editcore.

    Raises:
        DatasetError: the file cannot be read, has no task, or a line is no task; the message names the line.
    """
    if path is None:
        text, name = resources.files("editcore.evaluation").joinpath("capability.jsonl").read_text("utf-8"), ""
    else:
        try:
            text, name = Path(path).expanduser().read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    items = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            items.append(CapabilityItem.model_validate(json.loads(line)))
        except ValidationError as error:
            raise DatasetError(f"{name}, line {number}: this is no task. {first_problem(error)}.") from error
        except ValueError as error:
            raise DatasetError(f"{name}, line {number}: this is not JSON ({error}).") from error
    if not items:
        raise DatasetError(f"{name}: there are no tasks in it.")
    return items


def _has_tasks(path: str | None) -> str | None:
    """The path, whose file has tasks; so that a wrong one is told before a model is loaded."""
    try:
        capability_items(path)
    except DatasetError as error:
        raise ValueError(str(error).removesuffix(".")) from error
    return path


class CapabilityHParams(HParams):
    """Which tasks are asked."""

    items: Annotated[str | None, AfterValidator(_has_tasks)] = None
    """A file with tasks of your own: JSON lines with ``kind``, ``prompt`` and ``answer``; left out, those that come
    with editcore."""
    sample: Annotated[int, Field(ge=1)] | None = None
    """Tasks that are asked, evenly spread over the file; none for all."""
    answer_tokens: Annotated[int, Field(ge=1)] = 12
    """Longest answer, in tokens."""


class CapabilityEvaluator:
    """Lets the model solve the tasks."""

    def __init__(self, hparams: CapabilityHParams | None = None) -> None:
        self.hparams = hparams or CapabilityHParams()
        self._items = capability_items(self.hparams.items)

    def evaluate(
        self, model: LanguageModel, records: Sequence[FactRecord], context: EvaluationContext
    ) -> list[Observation]:
        """For each task in order, whether it is solved, and whether that is kept."""
        items = self._asked(records)
        prompts = [item.prompt for item in items]
        solved_before = {
            observation.prompt
            for observation in context.unedited or ()
            if observation.metric == _SOLVED and observation.value == 1
        }
        texts: list[str] = []
        with context.progress.task("Solving tasks", len(prompts)) as advance:
            for first in range(0, len(prompts), _CHUNK):
                part = prompts[first : first + _CHUNK]
                texts += model.generate(
                    part,
                    max_new_tokens=self.hparams.answer_tokens,
                    raw=True,
                    enough=lambda _, text: _line(text) != text,
                )
                advance(len(part))
        found = []
        for number, (item, text) in enumerate(zip(items, texts, strict=True)):
            solved = float(_line(text).strip().removesuffix(".").strip() == item.answer)
            metrics = [_SOLVED]
            if item.prompt in solved_before:
                metrics += [_KEPT, *([f"{item.kind}_kept"] if item.kind in _KINDS else [])]
            found += [
                Observation(
                    request_id=records[number % len(records)].request.id, metric=metric, value=solved,
                    kind=f"capability.{item.kind}", prompt=item.prompt, text=_line(text),
                )
                for metric in metrics
            ]  # fmt: skip
        return found

    def _asked(self, records: Sequence[FactRecord]) -> list[CapabilityItem]:
        """The tasks that name no subject of an edit; none without records."""
        items, count = self._items, self.hparams.sample
        if not records:
            return []
        if count is not None and count < len(items):
            items = [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]
        subjects = {record.request.subject for record in records} - {""}
        return [
            item for item in items if not any(mentions(f"{item.prompt} {item.answer}", subject) for subject in subjects)
        ]


_CHUNK = 64
"""Tasks between two reports of progress."""


def _line(text: str) -> str:
    """The first line with something in it."""
    start = len(text) - len(text.lstrip())
    end = text.find("\n", start)
    return text if end < 0 else text[:end]
