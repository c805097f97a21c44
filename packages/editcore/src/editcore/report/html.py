"""A report as one page: no file beside it, no network, and plain tables where scripts do not run."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import re
from string import Template

from editcore.report.document import (
    Block,
    Cell,
    Code,
    Document,
    Notice,
    Paragraph,
    Picture,
    Row,
    Section,
    Table,
    Tile,
    Tiles,
)

__all__ = ["page"]


def page(document: Document) -> str:
    """The page. Everything that is not ours is escaped, and a policy in it lets no script but its own run."""
    template = importlib.resources.files("editcore.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=_text(document.title),
        lead=_text(document.lead),
        writer=_text(document.writer),
        style_hash=_hash_of("style", template),
        script_hash=_hash_of("script", template),
        contents="\n".join(f'<li><a href="#{one.anchor}">{_text(one.title)}</a></li>' for one in document.sections),
        sections="\n".join(_section(one) for one in document.sections),
    )


def _hash_of(tag: str, template: str) -> str:
    """What a Content-Security-Policy calls the one element of that name."""
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block, f"{section.anchor}-{number}") for number, block in enumerate(section.blocks))
    return (
        f'<section aria-labelledby="{section.anchor}">\n<h2 id="{section.anchor}">{_text(section.title)}</h2>\n'
        f"{blocks}\n</section>"
    )


def _block(block: Block, name: str) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Notice(text):
            return f'<p class="notice" role="note">{_text(text)}</p>'
        case Code(text):
            return f'<pre tabindex="0"><code>{_text(text)}</code></pre>'
        case Tiles(tiles):
            return '<dl class="tiles">\n' + "\n".join(map(_tile, tiles)) + "\n</dl>"
        case Picture():
            return _picture(block)
        case Table():
            return _table(block, name)


def _tile(tile: Tile) -> str:
    value = f"<strong>{_text(tile.value)}</strong> <small>{_text(tile.note)}</small>"
    return f"<div><dt>{_text(tile.name)}</dt><dd>{value}</dd></div>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(picture.alt)}" width="{_width(picture.png)}">'
    return f"<figure>{image}</figure>"


def _width(png: bytes) -> int:
    """Half of the image's own width, which is then shown at twice the density of the page."""
    return int.from_bytes(png[16:20], "big") // 2


def _table(table: Table, name: str) -> str:
    heads = "".join(f'<th scope="col"{_kind(column.number)}>{_text(column.name)}</th>' for column in table.columns)
    rows = "\n".join(_row(row, table) for row in table.rows)
    search = ""
    kind = "wide long" if table.search else "wide narrow" if len(table.columns) <= _NARROW else "wide"
    if table.search:
        search = (
            f'<p class="search" hidden><label>Search <input type="search" aria-controls="{name}"></label> '
            f'<output aria-live="polite"></output></p>\n'
        )
    return (
        f'{search}<div class="{kind}" role="region" tabindex="0" '
        f'aria-labelledby="{name}-caption">\n<table id="{name}">\n'
        f'<caption><span id="{name}-caption">{_text(table.caption)}</span></caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


_NARROW = 6
"""Columns of a table that fits half of a broad page."""


def _row(row: Row, table: Table) -> str:
    cells = []
    for number, (given, column) in enumerate(zip(row, table.columns, strict=True)):
        cell = Cell(given) if isinstance(given, str) else given
        opened = 'th scope="row"' if number == 0 else "td"
        order = "" if cell.order is None else f' data-order="{cell.order:.10g}"'
        text = f"<span>{_text(cell.text)}</span>" if cell.tone else _text(cell.text)
        if cell.link:
            text = f'<a href="{_text(cell.link)}">{text}</a>'
        cells.append(f"<{opened}{_kind(column.number, cell.tone)}{order}>{text}</{opened[:2]}>")
    return f"<tr>{''.join(cells)}</tr>"


def _kind(number: bool, tone: str = "") -> str:
    names = " ".join(filter(None, ("number" if number else "", tone)))
    return f' class="{names}"' if names else ""


_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127])


def _text(text: str) -> str:
    """Escaped for content and for attributes in double quotes, without what no document may hold."""
    return html.escape(text.translate(_CONTROLS))
