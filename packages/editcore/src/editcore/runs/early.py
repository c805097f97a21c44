"""What can be wrong with a command's names, settings and files, found before torch is imported and a model is loaded.

Sessions and runs find the same themselves; whoever waits at a terminal is told seconds earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editcore.datasets import is_path
from editcore.evaluation.measures import DEFAULT_EVALUATORS
from editcore.models.sources import check_dtype, look_at
from editcore.plugins.registry import Plugins
from editcore.runs.config import RunConfig
from editcore.runs.fit import completed
from editcore.runs.job import records_of
from editcore.runs.parts import resolve_settings
from editcore.second_moments.corpora import open_corpus

__all__ = ["check_run", "check_session"]


def check_run(config: RunConfig, plugins: Plugins) -> None:
    """Refuse a new run that cannot be begun.

    Raises:
        EditcoreError: a name or a setting is wrong, or a file cannot be read.
    """
    check_session(
        plugins,
        config.model,
        editor=config.editor,
        extensions=config.plugins,
        backend=config.backend,
        evaluators=config.evaluators,
        preset=config.preset,
        settings=config.settings,
        dataset=config.dataset,
        dtype=config.dtype,
        corpus=config.corpus,
    )
    if config.eval_text is not None:
        open_corpus(config.eval_text)
    if is_path(config.dataset, plugins):
        records_of(config, plugins)


def check_session(
    registry: Plugins,
    model: str,
    *,
    editor: str,
    extensions: Sequence[str] = (),
    backend: str | None = None,
    evaluators: Sequence[str] = DEFAULT_EVALUATORS,
    preset: str | None,
    settings: Mapping[str, Mapping[str, Any]],
    dataset: str | None = None,
    dtype: str,
    corpus: str,
) -> None:
    """Refuse a session that cannot be opened.

    Raises:
        EditcoreError: there is no such model, plugin or text, or a setting is wrong.
    """
    look_at(model)
    plugins, chosen = completed(registry, editor, extensions, backend)
    resolve_settings(
        registry,
        model,
        editor=editor,
        plugins=plugins,
        backend=chosen,
        evaluators=evaluators,
        preset=preset,
        settings=settings,
        dataset=dataset,
        note=lambda _text: None,  # said when the session is opened
    )
    check_dtype(dtype)
    open_corpus(corpus)
