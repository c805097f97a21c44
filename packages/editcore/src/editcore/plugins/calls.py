"""Calls into a plugin's code. Whatever goes wrong there becomes one sentence with the plugin's name."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pluggy

from editcore._util.words import with_full_stop
from editcore.interfaces.errors import EditcoreError, PluginError
from editcore.interfaces.hookspecs import PROJECT

__all__ = ["boundary", "hooks_of", "resolve"]

logger = logging.getLogger(__name__)


@contextmanager
def boundary(prefix: str) -> Iterator[None]:
    """Run a plugin's code. An exception becomes a :class:`PluginError`; an :class:`EditcoreError` stays as it is.

    Args:
        prefix: the beginning of the error's message. If it is empty, the message is the reason alone, for a listing.
    """
    try:
        yield
    except EditcoreError:
        raise
    except Exception as error:  # the one place that catches the errors of foreign code
        logger.debug("%s", prefix, exc_info=True)
        raise PluginError(with_full_stop(prefix + _reason(error)) if prefix else _reason(error)) from error


def resolve(target: str) -> Any:
    """Import the object that a spec names as ``"module:attribute"``.

    Raises:
        PluginError: the module cannot be imported, or has no such attribute.
    """
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise PluginError(f"The target '{target}' of a plugin is not of the form 'module:attribute'.")
    with boundary(f"Cannot load '{target}': "):
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    return value


def hooks_of(plugin: object, name: str, *, specifications: type) -> pluggy.HookRelay:
    """The hooks of one plugin.

    Each plugin has a manager of its own, so that an answer or an exception is known to be this plugin's.

    Args:
        plugin: the module or object that implements the hooks.
        specifications: the class with the hook specifications.

    Raises:
        pluggy.PluginValidationError: the plugin implements a hook that is not specified.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specifications)
    manager.register(plugin, name)
    manager.check_pending()
    return manager.hook


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, pluggy.PluginValidationError):
        return re.sub(r" in plugin <.*>$", "", text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
