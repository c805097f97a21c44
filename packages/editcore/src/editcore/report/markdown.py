"""A report as a Markdown summary, with its figures in a folder beside it."""

from __future__ import annotations

import re

from editcore.report.document import Block, Cell, Code, Document, Notice, Paragraph, Picture, Table, Tiles

__all__ = ["summary"]


def summary(document: Document) -> str:
    """The Markdown text. Characters that would be markup are escaped."""
    parts = [f"# {_text(document.title)}", _text(document.lead)]
    for section in document.sections:
        blocks = [text for block in section.blocks if (text := _block(block))]
        if blocks:
            parts += [f"## {_text(section.title)}", *blocks]
    return "\n\n".join([*parts, f"Written by {_text(document.writer)}."]) + "\n"


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _text(text)
        case Notice(text):
            return f"> **{_text(text)}**"
        case Code(text):
            longest = max(map(len, re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{text}\n{fence}"
        case Tiles():
            return ""  # the table has the same numbers
        case Picture():
            return f"![{_text(block.alt)}](figures/{block.name}.png)"
        case Table():
            return "" if block.page_only else _table(block)


def _table(table: Table) -> str:
    heads = [_text(column.name) or " " for column in table.columns]
    rules = ["---:" if column.number else "---" for column in table.columns]
    rows = [[_cell(Cell(cell) if isinstance(cell, str) else cell) for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(row)} |" for row in (heads, rules, *rows)]
    return f"{_text(table.caption)}\n\n" + "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = _text(cell.text)
    if cell.link:
        target = re.sub(r"[<>\\\n]", "", cell.link)
        text = f"[{text}](<{target}>)"
    return text


def _text(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
