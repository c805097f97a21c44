"""The data sets that others publish, as ``published.toml`` lists them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from editcore._util.paths import cache_dir
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import UnknownNameError

__all__ = ["Published", "find_published", "published_files", "published_path"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """An official file."""

    name: str
    """The word that users type."""
    url: str
    """Its address."""
    summary: str
    """One line for listings."""
    licence: str
    """As its authors state it; ``not stated`` if they do not."""
    size: int | None = None
    """Its size in bytes; ``None`` if it is not recorded."""
    sha256: str | None = None
    """Its SHA-256 in hexadecimal; ``None`` if it is not recorded."""

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2]


@cache
def published_files() -> Mapping[str, Published]:
    """The official files that are known, by name."""
    text = resources.files("editcore.datasets").joinpath("published.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: Published(name=name, **fields) for name, fields in tomllib.loads(text).items()})


def find_published(name: str) -> Published:
    """The published data set of that name.

    Raises:
        UnknownNameError: none is known by that name.
    """
    known = published_files()
    if name not in known:
        raise UnknownNameError("published data set", name, known)
    return known[name]


def published_path(entry: Published) -> Path:
    """Where a pulled file is kept. It may not be there."""
    return cache_dir() / "data" / entry.name / entry.file
