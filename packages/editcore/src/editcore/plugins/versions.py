"""The versions of the code that a run's result depends on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError

from editcore._util.versions import version_of
from editcore.plugins.registry import Plugins

__all__ = ["code_versions"]

_ALWAYS = ("editcore", "torch", "transformers", "tokenizers", "numpy")


def code_versions(plugins: Plugins, names: Collection[str] | None = None) -> Mapping[str, str]:
    """Versions (:func:`version_of`) by package: editcore, torch and other libraries, and the packages of plugins.

    Args:
        names: names of editors, extensions, ...; only packages that offer these, or components for them, are included.
            Left out, the packages of all plugins are.
    """
    if names is None:
        offering = {plugin.distribution for plugin in plugins.listing()}
    else:
        offering = plugins.distributions_of(names)
    found = {}
    for package in sorted({*_ALWAYS, *offering}):
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            continue
    return found
