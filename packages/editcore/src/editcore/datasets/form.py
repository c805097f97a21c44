"""What a format of published facts is: how its records are recognised, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from editcore.datasets.fields import Fields
from editcore.interfaces.documented import documented
from editcore.interfaces.values import FactRecord

__all__ = ["Format"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format in which facts are published, recognised by the fields of a record."""

    title: str
    """What readers call it, such as ``MQuAKE``."""
    claims: Callable[[Fields], bool]
    """Whether a record has this format. It reads ``fields.raw`` only, because fields that are read count as used."""
    read: Callable[[Fields], list[FactRecord]]
    """The facts of a record; raises :class:`editcore.RequestError` if it cannot be used."""
    caution: str = ""
    """A sentence for the user of such records, about a convention of the field; empty for none."""
