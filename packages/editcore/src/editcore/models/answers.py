"""What a model in one state was asked, and its answers, in a file: nothing is asked twice, however a process ended.

A state is a model with certain edits. Whoever opens a store says which state it is of; nothing here checks it. Only
answers that are the same each time are kept: greedy text, losses, and what is computed from them.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._util.files import json_text
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import StorageError

if TYPE_CHECKING:
    from editcore.models.generating import StopRule

__all__ = ["AnswerStore", "continued"]

_TEXT = "greedy text"
_AT_ONCE = 500
"""Questions of one query; SQLite has a limit."""
_PATIENCE = 60.0
"""Seconds to wait for another process that writes to the same file."""


@documented
class AnswerStore:
    """Answers by question, in a file of SQLite. Every :meth:`keep` is durable when it returns.

    Raises:
        StorageError: the file cannot be made, or is none of these.
    """

    path: Path
    """The file."""
    asked: int
    """Questions that had no answer here when they were looked up."""
    found: int
    """Questions that had one."""

    def __init__(self, path: Path) -> None:
        self.path, self.asked, self.found = path, 0, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, answer TEXT)")
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error

    def known(self, kind: str, questions: Sequence[object]) -> list[Any]:
        """The answer to each question; ``None`` where there is none.

        Args:
            kind: what is asked, such as ``score``. It is a part of the question.
            questions: values that JSON has.
        """
        keys = [_key(kind, question) for question in questions]
        answers: dict[bytes, str] = {}
        distinct = list(dict.fromkeys(keys))
        with self._open() as connection:
            for start in range(0, len(distinct), _AT_ONCE):
                part = distinct[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                answers |= connection.execute(
                    f"SELECT question, answer FROM answers WHERE question IN ({marks})",
                    part,
                ).fetchall()
        return [json.loads(answers[key]) if key in answers else None for key in keys]

    def keep(self, kind: str, answers: Iterable[tuple[object, object]]) -> None:
        """Keep answers, in place of those that are there.

        Args:
            answers: pairs of a question and its answer, which JSON has and which is not ``None``.
        """
        rows = [(_key(kind, question), json_text(answer)) for question, answer in answers]
        with self._open() as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def count(self, *, asked: int, found: int) -> None:
        """Count questions for :attr:`asked` and :attr:`found`."""
        self.asked += asked
        self.found += found

    def _open(self) -> _Connection:
        return _Connection(self.path)


class _Connection(closing[sqlite3.Connection]):
    """A connection that is closed when its block ends. Errors of SQLite become errors of storage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            super().__init__(sqlite3.connect(path, timeout=_PATIENCE))
        except sqlite3.Error as error:
            raise self._error(error) from error

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        error = raised[1]
        if isinstance(error, sqlite3.Error):
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> StorageError:
        return StorageError(f"The answers in {self._path} cannot be read or written ({error}). Remove the file.")


def _key(kind: str, question: object) -> bytes:
    return hashlib.sha256(json_text([kind, question]).encode()).digest()


def continued(
    store: AnswerStore,
    rows: Sequence[Sequence[int]],
    stop: StopRule,
    write: Callable[[Sequence[Sequence[int]], StopRule], list[list[int]]],
) -> list[list[int]]:
    """The greedy continuations of rows of token ids. Only rows are written whose kept text does not reach as far as is
    asked for now.

    Args:
        stop: when each row ends.
        write: writes rows until their own ends.
    """
    from editcore.models.generating import StopRule

    kept = store.known(_TEXT, [list(row) for row in rows])
    answers = {
        index: answer
        for index, text in enumerate(kept)
        if text is not None and (answer := _as_far_as_asked(text["ids"], stop, index, ended=text["ended"])) is not None
    }
    missing = [index for index in range(len(rows)) if index not in answers]
    store.count(asked=len(missing), found=len(answers))
    if not missing:
        return [answers[index] for index in range(len(rows))]
    enough = stop.enough
    of_missing = StopRule(
        limits=[stop.limits[index] for index in missing],
        at_end_token=stop.at_end_token,
        enough=None if enough is None else lambda place, new: enough(missing[place], new),
    )
    longest: dict[tuple[int, ...], dict[str, object]] = {}
    for index, new in zip(missing, write([rows[index] for index in missing], of_missing), strict=True):
        answers[index] = new
        row = tuple(rows[index])
        if row not in longest or len(longest[row]["ids"]) <= len(new):  # type: ignore[arg-type]
            longest[row] = {"ids": new, "ended": not stop.is_complete(index, new)}
    store.keep(_TEXT, [(list(row), text) for row, text in longest.items()])
    return [answers[index] for index in range(len(rows))]


def _as_far_as_asked(ids: Sequence[int], stop: StopRule, index: int, *, ended: bool) -> list[int] | None:
    """The beginning of a kept text at which a row ends; ``None`` if the text is too short.

    Args:
        ended: whether an end token follows the text.
    """
    for length in range(1, len(ids) + 1):
        if stop.is_complete(index, ids[:length]):
            return list(ids[:length])
    return list(ids) if ended else None
