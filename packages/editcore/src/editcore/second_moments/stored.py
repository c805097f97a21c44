"""Text that models of the catalogue wrote, stored as token ids. Sampling it anew takes minutes and gives the same text.

The text of ``smollm2-135m`` is under that model's licence, Apache-2.0.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from editcore.interfaces.errors import StatisticsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TEXTS", "StoredText", "is_stored", "stored_text"]

_AGAIN = "Install editcore again."


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredText:
    """One sampled text, and everything that decides it."""

    model: str
    """Name in the catalogue of models."""
    fingerprint: str
    """Fingerprint of the weights of the model that wrote it."""
    seed: int
    rows: int
    """Number of sequences."""
    length: int
    """Tokens in each sequence."""
    sha256: str
    """SHA-256 of the ids as int64, row after row, as in the ``content_hash`` of a sampled text."""

    def read(self) -> Tensor:
        """The ids, ``[rows, length]`` int64.

        Raises:
            StatisticsError: the file is not there, is damaged, or holds other ids.
        """
        import torch  # imported here, so that stored texts can be found without torch

        file = resources.files("editcore.second_moments") / "texts" / f"{self.model}.u16.gz"
        try:
            raw = gzip.decompress(file.read_bytes())
            numbers = struct.unpack(f"<{self.rows * self.length}H", raw)
        except (OSError, EOFError, struct.error, zlib.error) as error:
            raise StatisticsError(f"{file}, which editcore brings along, is damaged ({error}). {_AGAIN}") from error
        ids = torch.tensor(numbers, dtype=torch.long).reshape(self.rows, self.length)
        if hashlib.sha256(ids.numpy().tobytes()).hexdigest() != self.sha256:
            raise StatisticsError(f"{file}, which editcore brings along, holds another text than it should. {_AGAIN}")
        return ids


TEXTS = (
    StoredText(
        model="smollm2-135m",
        fingerprint="04cbbf96e674b120897cb1dd5166b0556d29e71a6181e361781486450f59c1f7",
        seed=0,
        rows=120,
        length=128,
        sha256="2b474641de85bb948044042a718f8772289d0ff18a8823127e196e55a3e7b552",
    ),
)
"""All stored texts. Each is what :class:`editcore.second_moments.corpora.SelfCorpus` would sample."""


def stored_text(fingerprint: str, *, seed: int, rows: int, length: int) -> Tensor | None:
    """The text that a model would write with that seed, ``[rows, length]`` int64; ``None`` if it is not stored.

    Raises:
        StatisticsError: the stored text is damaged.
    """
    found = _find(fingerprint, seed, rows, length)
    return None if found is None else found.read()


def is_stored(fingerprint: str, *, seed: int, rows: int, length: int) -> bool:
    """Whether :func:`stored_text` has that text."""
    return _find(fingerprint, seed, rows, length) is not None


def _find(*wanted: object) -> StoredText | None:
    return next((text for text in TEXTS if (text.fingerprint, text.seed, text.rows, text.length) == wanted), None)
