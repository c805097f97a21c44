"""What a report says, before it is a page or a text. Strings are plain: whoever renders them escapes them."""

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
    """Sentences that nobody should miss."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Commands, or a file, as they are typed."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number that a reader wants first."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Numbers side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of a table."""

    text: str
    order: float | None = None
    """What the column is sorted by; left out, the text. NaN stands last, whichever the direction."""
    tone: Literal["", "bad", "quiet"] = ""
    """What deserves attention, and what does not. Never the only sign: the text says the same."""
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
    """Whether the page has a field that filters the rows, and keeps the table within the height of the window."""
    page_only: bool = False
    """Whether the summary leaves it out, for its length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure: on the page as it is, beside the summary as ``figures/NAME.png``."""

    name: str
    png: bytes
    alt: str
    """What it shows, for those who do not see it."""


Block = Paragraph | Notice | Code | Tiles | Table | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter."""

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
    """What the title means, in a sentence or two."""
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
