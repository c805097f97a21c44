"""Results of causal tracing of a model, kept in the cache, and the layer that they point to.

``editctl trace`` makes a :class:`Tracing` (:mod:`editcore.onboarding.causal_tracing`); an editor whose
``layer_selection`` is ``"traced"`` reads it here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from editcore._util.files import json_text, write_text
from editcore._util.paths import cache_dir
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, StatisticsError

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "KINDS",
    "LAST",
    "LAST_SUBJECT",
    "ROLES",
    "Tracing",
    "store_tracing",
    "stored_tracing",
    "traced_layer",
    "tracing_path",
]

KINDS = ("hidden", "mlp", "attention")
"""What a tracing restores: the output of one block, or the outputs of the MLPs or attentions of a window of blocks."""

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""Roles of the tokens from the subject on; earlier tokens are the same in every run. A token has one role. If two fit,
the later one counts: the only token of a subject is the last subject token, and the only token after it is the last
token. The exception is a subject that ends the statement: its last token stays the last subject token."""

LAST_SUBJECT, LAST = ROLES.index("last subject token"), ROLES.index("last token")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """Average indirect effects of one model, and how they were measured."""

    model: str
    """Name of the model."""
    fingerprint: str
    """Fingerprint of the model's unedited weights."""
    effects: Mapping[str, np.ndarray]
    """By kind, ``[roles, layers]`` float64, in probability; NaN for a role that no token has. ``attention`` is missing
    if the attention's output projection cannot be identified."""
    counts: tuple[int, ...]
    """Facts that have a token of each role."""
    asked: int
    """Facts that the model was asked."""
    used: int
    """Facts among them that the model knows: every token of the attribute is its first choice."""
    clean: float
    """Mean probability p of the attribute in the clean run, over the facts used."""
    corrupted: float
    """Mean probability p* in the corrupted run."""
    noise: float
    """Standard deviation of the noise, as a multiple of the standard deviation of the subjects' embeddings."""
    draws: int
    """Draws of noise per fact."""
    window: int
    """Number of layers restored together for ``mlp`` and ``attention``."""
    seed: int
    """Seed of the noise."""

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return int(self.effects["hidden"].shape[1])

    def ranked_layers(self, layers: Sequence[int] | None = None) -> list[int]:
        """``layers`` (left out: all) by the effect of the MLPs around them at the subject's last token, greatest first.
        The methods write at that token."""
        among = range(self.num_layers) if layers is None else layers
        effect = self.effects["mlp"][LAST_SUBJECT]
        return sorted(among, key=lambda layer: (-effect[layer], layer))

    def rows(self) -> Iterator[dict[str, object]]:
        """The table, one row per kind, role and layer."""
        for kind, effects in self.effects.items():
            for number, role in enumerate(ROLES):
                for layer in range(self.num_layers):
                    yield {
                        "kind": kind,
                        "role": role,
                        "layer": layer,
                        "effect": float(effects[number, layer]),
                        "facts": self.counts[number],
                    }


def tracing_path(fingerprint: str) -> Path:
    """The file of a model's last tracing, in editcore's cache folder."""
    return cache_dir() / "tracing" / f"{fingerprint[:16]}.json"


def store_tracing(tracing: Tracing) -> Path:
    """Keep a tracing for ``layer_selection = "traced"``. It replaces an earlier tracing of the model.

    Raises:
        StorageError: the file cannot be written.
    """
    record = {
        **{name: value for name, value in asdict(tracing).items() if name != "effects"},
        "effects": {kind: effects.tolist() for kind, effects in tracing.effects.items()},
    }
    path = tracing_path(tracing.fingerprint)
    write_text(path, json_text(record) + "\n")
    return path


def stored_tracing(model: LanguageModel) -> Tracing | None:
    """The last tracing of the model, found by the fingerprint of its base weights; ``None`` if there is none.

    Raises:
        StatisticsError: the file is damaged.
    """
    path = tracing_path(model.base_fingerprint)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        effects = {kind: np.array(effects, dtype=float) for kind, effects in record.pop("effects").items()}
        tracing = Tracing(**{**record, "counts": tuple(record["counts"]), "effects": effects})
        shape = (len(ROLES), model.layout.num_layers)
        if tracing.fingerprint != model.base_fingerprint or {effect.shape for effect in effects.values()} != {shape}:
            raise ValueError("it is not of this model")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StatisticsError(f"Cannot read the tracing in {path} ({error}); delete it and trace anew.") from error
    return tracing


def traced_layer(model: LanguageModel, layers: Sequence[int], *, owner: str) -> int:
    """The one of ``layers`` whose MLPs have the greatest indirect effect at the subject's last token.

    Raises:
        HParamsError: the model has not been traced.
    """
    tracing = stored_tracing(model)
    if tracing is None or tracing.used == 0:
        raise HParamsError(
            f'{owner}: layer_selection is "traced", but there is no tracing of {model.name} yet. '
            f"Run: editctl trace {model.name}"
        )
    return tracing.ranked_layers(layers)[0]
