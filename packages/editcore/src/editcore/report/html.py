"""A report as one HTML page. It needs no other file and no network, and has plain tables if scripts do not run.

Its markup is in ``page.html.jinja``, its look in ``page.css``, its sorting and searching in ``page.js``.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from editcore.report import document as documents
from editcore.report.document import Cell, Document, Table

__all__ = ["page"]


def page(document: Document) -> str:
    """The page. All text of the document is escaped, and a policy in the page allows only the page's own script."""
    style, script = _resource("page.css"), _resource("page.js")
    return (
        _environment()
        .from_string(_resource("page.html.jinja"))
        .render(
            document=document,
            style=style,
            script=script,
            style_hash=_policy_hash(style),
            script_hash=_policy_hash(script),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=_without_controls,
    )
    environment.filters |= {
        "as_cell": lambda given: Cell(given) if isinstance(given, str) else given,
        "base64": lambda content: base64.b64encode(content).decode(),
        "half_width": _half_width,
        "table_class": _table_class,
    }
    environment.tests["instance_of"] = lambda block, name: isinstance(block, getattr(documents, name))
    return environment


def _resource(name: str) -> str:
    return resources.files("editcore.report").joinpath(name).read_text(encoding="utf-8")


def _policy_hash(content: str) -> Markup:
    """The name of an element in a Content-Security-Policy. Its ``content`` is on lines of its own."""
    digest = hashlib.sha256(f"\n{content}".encode()).digest()
    return Markup("'sha256-{}'").format(base64.b64encode(digest).decode())


def _half_width(png: bytes) -> int:
    """Half of the image's width in pixels, so that it is shown at twice the density of the page."""
    return int.from_bytes(png[16:20], "big") // 2


_NARROW = 4
"""Columns of a table that fits half of a broad page."""


def _table_class(table: Table) -> str:
    return "wide long" if table.search else "wide narrow" if len(table.columns) <= _NARROW else "wide"


_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127])


def _without_controls(value: object) -> object:
    """A text without the characters that are not allowed in HTML."""
    return value.translate(_CONTROLS) if type(value) is str else value
