"""Checks of names, settings and files before torch is imported and a model is loaded.

Sessions and runs check the same things again. These checks tell the user of a terminal some seconds earlier.
"""

from __future__ import annotations

from editcore.datasets import is_path
from editcore.models.sources import check_dtype, look_at
from editcore.plugins.registry import Plugins
from editcore.runs.config import RunConfig, SessionConfig
from editcore.runs.facts import records_of
from editcore.runs.resolved import resolve_session
from editcore.second_moments.corpora import open_corpus

__all__ = ["check_run", "check_session"]


def check_run(config: RunConfig, plugins: Plugins) -> None:
    """Refuse a new run that cannot start.

    Raises:
        EditcoreError: a name or a setting is wrong, or a file cannot be read.
    """
    check_session(plugins, config.model, config, dataset=config.dataset)
    if config.eval_text is not None:
        open_corpus(config.eval_text)
    if is_path(config.dataset, plugins):
        records_of(config, plugins)


def check_session(
    registry: Plugins, model: str, config: SessionConfig | RunConfig, *, dataset: str | None = None
) -> None:
    """Refuse a session that cannot be opened.

    Raises:
        EditcoreError: there is no such model, plugin or text, or a setting is wrong.
    """
    look_at(model)
    # Notes are given when the session is opened.
    resolve_session(registry, model, config, dataset=dataset, note=lambda _text: None)
    check_dtype(config.dtype)
    open_corpus(config.corpus)
