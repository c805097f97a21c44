"""Fields in ``help()``: the docstring below a field becomes part of the docstring of its class."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import TypeVar

from pydantic import BaseModel

__all__ = ["documented"]

T = TypeVar("T")


def documented(cls: type[T]) -> type[T]:
    """Let ``help(cls)`` show each field, also those of base classes, with its type and the docstring below it.

    For a dataclass (put this above ``@dataclass``) and for a plain class with attributes, the docstrings are read from
    the source when ``help`` asks for them. So importing the class costs nothing. Without a source, ``help`` shows the
    docstring of the class alone. A pydantic model has its field docstrings already, with ``use_attribute_docstrings``.
    """
    own = inspect.cleandoc(cls.__doc__ or cls.__name__)
    if issubclass(cls, BaseModel):
        # Now, because help() does not call a descriptor if the class has a metaclass.
        cls.__doc__ = _joined(own, cls, {name: field.description or "" for name, field in cls.model_fields.items()})
    else:
        cls.__doc__ = _FieldDocs(own, cls)  # type: ignore[assignment]  # type.__doc__ asks a descriptor
    return cls


class _FieldDocs:
    """The docstring of a class, with its fields."""

    def __init__(self, own: str, cls: type) -> None:
        self._own, self._cls = own, cls

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return self._whole

    @cached_property
    def _whole(self) -> str:
        cls = self._cls
        annotated = dict.fromkeys(name for base in reversed(cls.__mro__) for name in inspect.get_annotations(base))
        declared = [field.name for field in fields(cls)] if is_dataclass(cls) else list(annotated)
        docstrings: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            if inspect.get_annotations(base).keys() & set(declared):
                docstrings |= _below_fields(base)
        return _joined(self._own, cls, {name: docstrings[name] for name in declared if name in docstrings})


def _below_fields(cls: type) -> dict[str, str]:
    """The docstrings below the attributes of one class, by name, from its source; empty if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    [declaration] = tree.body
    assert isinstance(declaration, ast.ClassDef)
    docstrings: dict[str, str] = {}
    name = ""
    for line in declaration.body:
        match line:
            case ast.AnnAssign(target=ast.Name(id=name)):
                docstrings[name] = ""
            case ast.Expr(value=ast.Constant(value=str(docstring))) if name:
                docstrings[name], name = inspect.cleandoc(docstring), ""
            case _:
                name = ""
    return docstrings


def _joined(own: str, cls: type, docstrings: Mapping[str, str]) -> str:
    lines = []
    for name, meaning in docstrings.items():
        annotation = next(found[name] for base in cls.__mro__ if name in (found := inspect.get_annotations(base)))
        kind = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        lines.append(f"    {name}: {kind}")
        if meaning:
            lines.append(textwrap.indent(meaning, " " * 8))
    return "\n".join([own, "", "Fields:", *lines]) if lines else own
