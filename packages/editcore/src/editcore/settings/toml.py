"""Reads a run's options from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editcore.interfaces.errors import HParamsError

__all__ = ["parse_toml", "read_toml", "run_values"]


def read_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        HParamsError: the file cannot be read, or is not TOML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise HParamsError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise HParamsError(f"{path} is not a TOML file: {error}.") from error
    return parse_toml(text, origin=str(path))


def parse_toml(text: str, *, origin: str) -> dict[str, Any]:
    """The tables of a text; ``origin`` says where it is from, for messages.

    Raises:
        HParamsError: the text is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HParamsError(f"{origin} is not a TOML file: {error}.") from error
    except (RecursionError, ValueError) as error:  # a number or a date that Python does not have
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise HParamsError(f"{origin} is not a configuration: {what}.") from error


def run_values(table: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of :class:`RunConfig`'s fields, with the tables of plugins as ``settings``."""
    tables = {name: value for name, value in table.items() if isinstance(value, dict)}
    options = {name.replace("-", "_"): value for name, value in table.items() if name not in tables}
    for name in ("plugin", "evaluator"):  # names of the options
        if name in options:
            options.setdefault(f"{name}s", options.pop(name))
    return options | ({"settings": tables} if tables else {})
