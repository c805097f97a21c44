"""Scores of lm-eval, EleutherAI's harness, of a model in memory. lm-eval is imported here, only if it is asked for."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.files import file_sha256
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, ModelError
from editcore.models.prompt_form import PLAIN
from editcore.plugins.calls import boundary
from editcore.runs.evaluation_record import HarnessScore

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["HarnessPlan", "harness_identity", "harness_scores"]

_ROWS = 8
"""Questions that go through the model together."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessPlan:
    """Tasks of lm-eval."""

    tasks: tuple[str, ...]
    """Names of tasks, and folders with files of tasks (all tasks in them)."""
    limit: int | None = None
    """Questions of each task, from the front; ``None`` for all."""

    @classmethod
    def create(cls, tasks: str, limit: int | None = None) -> HarnessPlan:
        """The plan that an option asks for: names and folders with commas between them.

        Raises:
            HParamsError: there is no name, no such folder, or lm-eval is not installed.
        """
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        if not names:
            raise HParamsError("--lm-eval needs the names of tasks, with commas between them.")
        for name in names:
            if "/" in name and not Path(name).is_dir():
                raise HParamsError(f"--lm-eval: there is no folder {name}.")
        if importlib.util.find_spec("lm_eval") is None:
            raise HParamsError(
                "--lm-eval needs the package lm-eval, which is not installed. Install with: pip install "
                "'editcore[lm-eval]'"
            )
        return cls(tasks=names, limit=limit)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders among the tasks."""
        return tuple(Path(name) for name in self.tasks if Path(name).is_dir())


def harness_identity(plan: HarnessPlan) -> object:
    """Everything but the model that decides the scores, as JSON has it."""
    files = [
        [path.name, file_sha256(path)]
        for folder in plan.folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return [plan.tasks, plan.limit, files, version("lm_eval")]


def harness_scores(model: LanguageModel, plan: HarnessPlan) -> tuple[HarnessScore, ...]:
    """The scores of a model as it is now, task by task.

    Raises:
        ModelError: edits of the model rewrite prompts, of which lm-eval knows nothing.
        PluginError: lm-eval failed, such as for an unknown task or data that cannot be fetched.
    """
    if model.rewrites_prompts:
        raise ModelError(
            f"lm-eval asks the model alone, and edits of {model.name} put text in front of prompts, so its scores "
            "would be those of the unedited model. Leave --lm-eval out."
        )
    with boundary("lm-eval failed: "):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        folders = [str(folder) for folder in plan.folders]
        own = TaskManager(include_path=folders, include_defaults=False).all_tasks if folders else []
        named = [name for name in plan.tasks if not Path(name).is_dir()]
        found = simple_evaluate(
            model=HFLM(pretrained=model.hf, tokenizer=model.tokenizer, backend="causal", batch_size=_ROWS),
            tasks=[*named, *own],
            task_manager=TaskManager(include_path=folders or None, include_defaults=bool(named)),
            limit=plan.limit,
            log_samples=False,
            apply_chat_template=model.prompt_form != PLAIN,
        )
    return tuple(result for task, values in found["results"].items() for result in _scores(task, values, found))


def _scores(task: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> Sequence[HarnessScore]:
    """The scores of one task. Its standard errors stand under ``METRIC_stderr,FILTER``."""
    asked = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
    higher = found.get("higher_is_better", {}).get(task, {})
    scores = []
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{chosen}")
        scores.append(
            HarnessScore(
                task=task,
                metric=key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else math.nan,
                questions=asked,
                better="lower" if higher.get(name) is False else "higher",
            )
        )
    return scores
