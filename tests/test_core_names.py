"""Core names no method and no metric: a stranger's are as much at home in it as ours.

Docstrings and comments may; identifiers and strings may not. A metric is named by the module of its evaluator alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import editcore
import pytest
from editcore import Plugins

CORE = Path(editcore.__file__).parent
FIELD = {"grace", "ike", "memoir", "mend", "pmet", "r-rome", "serac", "simie", "ultraedit", "wise"}
"""Methods that are not among the packages here."""
ORDINARY = {"memory"}
"""Names of editors that are words which core needs for other things, too."""
_WORD = r"(?<![\w-]){}(?![\w-])"


def offered(kind: str) -> dict[str, str]:
    """The module of what other packages than core offer, by name."""
    specs = getattr(Plugins.load(), kind)()
    return {name: spec.target.partition(":")[0] for name, spec in specs.items()}


@cache
def methods() -> set[str]:
    names = {**offered("editors"), **offered("backends"), **offered("extensions")}
    return FIELD | {name for name, module in names.items() if not module.startswith("editcore.")} - ORDINARY


@cache
def metrics() -> dict[str, Path]:
    """Every metric of core's evaluators, with the module that may name it."""
    found = {}
    for spec in Plugins.load().evaluators().values():
        module = spec.target.partition(":")[0]
        assert module.startswith("editcore."), "the packages here bring no evaluator"
        for metric in spec.metrics:
            found[metric.name] = CORE.parent / f"{module.replace('.', '/')}.py"
    return found


def said(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line and text of every identifier, and of every string that is no docstring (then with ``True``)."""
    documentation = {
        id(statement.value)
        for node in ast.walk(tree)
        for statement in (getattr(node, "body", None) if isinstance(getattr(node, "body", None), list) else []) or []
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value, True
        for name in ("id", "attr", "arg", "name", "asname", "module"):
            text = getattr(node, name, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text, False


def names(text: str, word: str, *, is_string: bool) -> bool:
    """Whether a text names a method or a metric. A word of the language (``score``) is one in a string only if it is
    all of it."""
    ordinary = word.isalpha() and word.islower()
    if not is_string or ordinary:
        return text == word
    return re.search(_WORD.format(re.escape(word)), text) is not None


def _belongs(path: Path, home: Path) -> bool:
    """Whether a module is an evaluator's own, or a part of it: ``generation_metrics`` of ``generation``."""
    return path.parent == home.parent and (path.stem == home.stem or path.stem.startswith(f"{home.stem}_"))


@cache
def method_in(text: str, *, is_string: bool) -> str | None:
    spellings = {spelling for word in methods() for spelling in (word, word.upper())}
    if not is_string:
        return text if text in spellings else None
    found = re.search(_WORD.format(f"(?:{'|'.join(map(re.escape, sorted(spellings)))})"), text)
    return found[0] if found else None


@cache
def metrics_in(text: str, *, is_string: bool) -> list[str]:
    return [word for word in metrics() if names(text, word, is_string=is_string)]


def offences(path: Path, tree: ast.Module) -> list[str]:
    found = []
    for line, text, is_string in said(tree):
        if method := method_in(text, is_string=is_string):
            found.append(f"{path}:{line} names the method {method}: {text!r:.80}")
        found += [
            f"{path}:{line} names the metric {metric}: {text!r:.80}"
            for metric in metrics_in(text, is_string=is_string)
            if not _belongs(path, metrics()[metric])
        ]
    return found


def test_there_is_something_to_look_for() -> None:
    assert {"rome", "memit", "emmet", "lora", "replay", "trust"} <= methods()
    assert {"ES", "PS", "NS", "score", "facts_said"} <= set(metrics())


@pytest.mark.parametrize("room", sorted({path.relative_to(CORE).parts[0] for path in CORE.rglob("*.py")}))
def test_core_names_no_method_and_no_metric(room: str) -> None:
    paths = [path for path in CORE.rglob("*.py") if path.relative_to(CORE).parts[0] == room]
    assert [offence for path in paths for offence in offences(path, ast.parse(path.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize(
    "text",
    [
        "summary.ES",
        'print("ES, PS")',
        'names = ["score"]',
        'x = "editor = emmet"',
        "def lora(): pass",
        '"facts_said (%)"',
    ],
)
def test_it_would_be_seen(text: str) -> None:
    source = f'"""ES and emmet may be named here."""\nvalue = {text}\n' if not text.startswith("def") else text
    assert offences(CORE / "some.py", ast.parse(source)) != []


def test_documentation_may_name_them() -> None:
    source = '"""ES and emmet."""\n\n\ndef run():\n    """As ROME, measured by NS."""\n    "PS"\n'
    assert offences(CORE / "some.py", ast.parse(source)) == []
