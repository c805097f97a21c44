"""Fetches the official file of a published data set: resumed after an interruption, checked by size and SHA-256."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import editcore
from editcore._util.files import file_sha256, make_readable, sync_directory, write_text
from editcore._util.lock import locked
from editcore.datasets.published import Published
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import DatasetError, StorageError
from editcore.interfaces.progress import Progress, silent

__all__ = ["Pulled", "pull_file"]

_CHUNK = 1 << 16
_MEGABYTE = 1_000_000
_SECONDS = 60.0
"""How long a server may be silent."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A file that is here."""

    path: Path
    """Where it is."""
    verified: bool
    """Whether its size and SHA-256 are recorded, and were compared."""
    sha256: str
    """Its SHA-256 in hexadecimal."""
    fetched: bool
    """False if it was here already."""


def pull_file(entry: Published, path: Path | str, *, url: str | None = None, progress: Progress = silent) -> Pulled:
    """Fetch a file to ``path``, unless it is there.

    What was fetched before an interruption stays beside ``path`` (``.NAME.part``), and is continued if the server still
    has the same file (``ETag`` or ``Last-Modified``).

    Args:
        url: another address, such as of a mirror.

    Raises:
        DatasetError: it cannot be fetched whole, or is not the official file.
        RunError: another process fetches it.
        StorageError: it cannot be written.
    """
    path = Path(path)
    if path.exists():
        return _checked(entry, path, there=path, fetched=False)
    address = url or entry.url
    if not re.match(r"https?://", address):
        raise DatasetError(f"{entry.name} cannot be fetched from '{address}'; give an address with http or https.")
    part = path.with_name(f".{path.name}.part")
    with locked(path.parent):
        try:
            _fetch(entry, address, part, progress)
            pulled = _checked(entry, part, there=path, fetched=True)
            make_readable(part)
            part.replace(path)
            _tag_of(part).unlink(missing_ok=True)
            sync_directory(path.parent)
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error
    return pulled


def _checked(entry: Published, file: Path, *, there: Path, fetched: bool) -> Pulled:
    """Compare a file with what is recorded. A fetched file that differs is removed."""
    found = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    for name, what in (("size", "size is {} bytes"), ("sha256", "SHA-256 is {}")):
        expected = getattr(entry, name)
        if expected is not None and expected != found[name]:
            if fetched:
                file.unlink()
                _tag_of(file).unlink(missing_ok=True)
            way_out = "It was removed." if fetched else "Delete it and pull it again."
            raise DatasetError(
                f"{there} is not the official file of {entry.name}: its {what.format(found[name])}, recorded is "
                f"{expected}. {way_out}"
            )
    verified = entry.size is not None and entry.sha256 is not None
    return Pulled(path=there, verified=verified, sha256=str(found["sha256"]), fetched=fetched)


def _tag_of(part: Path) -> Path:
    """The file beside a part that says which version of the file it is from."""
    return part.with_name(f"{part.name}.version")


def _fetch(entry: Published, url: str, part: Path, progress: Progress) -> None:
    """Fetch what is missing of ``part``."""
    tag = _tag_of(part)
    done = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"User-Agent": f"editcore/{editcore.__version__}", "Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": tag.read_text(encoding="utf-8")}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_SECONDS) as answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                done = 0
            _remember_version(tag, answer.headers)
            _append(answer, part, done, progress.task(f"Fetching {entry.name} (MB)", _megabytes(answer, done)))
    except urllib.error.HTTPError as error:
        if done and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the file is shorter, or complete
            part.unlink()
            _fetch(entry, url, part, progress)
            return
        raise DatasetError(
            f"{entry.name} cannot be fetched from {url}: the server says {error.code} {error.reason}."
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        kept = f" {part.stat().st_size / 1e6:.1f} MB are here; the same command goes on with them." if done else ""
        raise DatasetError(f"{entry.name} cannot be fetched from {url}: {reason}.{kept}") from error


def _remember_version(tag: Path, headers: Mapping[str, Any]) -> None:
    """Keep what identifies the version of the file. Weak tags do not identify bytes."""
    version = str(headers.get("ETag") or "")
    if not version or version.startswith("W/"):
        version = str(headers.get("Last-Modified") or "")
    if version:
        write_text(tag, version)
    else:
        tag.unlink(missing_ok=True)


def _megabytes(answer: Any, done: int) -> int:
    return max(1, round((done + int(answer.headers.get("Content-Length") or 0)) / _MEGABYTE))


def _append(answer: Any, part: Path, done: int, task: Any) -> None:
    """Write the rest of the file behind its first ``done`` bytes.

    Raises:
        IncompleteRead: the connection ended early.
    """
    expected = answer.headers.get("Content-Length")
    received = shown = 0
    with part.open("ab" if done else "wb") as file, task as advance:
        advance(shown := done // _MEGABYTE)
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            if (now := (done + received) // _MEGABYTE) > shown:
                advance(now - shown)
                shown = now
    if expected is not None and received < int(expected):
        raise http.client.IncompleteRead(b"", int(expected) - received)
