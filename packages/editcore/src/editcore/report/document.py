"""The content of a report, from which the page and the Markdown summary are made. Strings are plain, and escaped when
rendered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Block",
    "Cell",
    "Code",
    "Column",
    "Document",
    "Notice",
    "Paragraph",
    "Picture",
    "Row",
    "Section",
    "Table",
    "Tile",
    "Tiles",
    "one_line",
]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Sentences."""

    text: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Sentences that the reader must not miss."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Commands, or the text of a file."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """An important number, shown at the top."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Numbers side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    text: str
    order: float | None = None
    """The number by which the column is sorted; left out, the text is used. NaN comes last in both directions."""
    tone: Literal["", "bad", "quiet"] = ""
    """``bad`` is highlighted, ``quiet`` is pale. The text always says the same, because colour must not be the only
    sign."""
    link: str = ""
    """A relative address."""


Row = Sequence[Cell | str]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading of a table."""

    name: str
    number: bool = False
    """Whether it is aligned to the right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under headings; the first column names the row."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    search: bool = False
    """Whether the page has a field that filters the rows. Such a table scrolls within the window."""
    page_only: bool = False
    """Whether the Markdown summary leaves it out, because it is long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure. It is embedded in the page, and is ``figures/NAME.png`` beside the Markdown summary."""

    name: str
    png: bytes
    alt: str
    """A description, for readers who cannot see it."""


Block = Paragraph | Notice | Code | Tiles | Table | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a report."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The title as an address within the page."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A report."""

    title: str
    lead: str
    """One or two sentences that explain the title."""
    sections: Sequence[Section]
    writer: str
    """Program and version."""

    @property
    def pictures(self) -> list[Picture]:
        """Every figure, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]


def one_line(text: object) -> str:
    """A value or a text without line breaks, for a cell."""
    if isinstance(text, float):
        return f"{text:.6g}" if math.isfinite(text) else str(text)
    return " ".join(str(text).split())
