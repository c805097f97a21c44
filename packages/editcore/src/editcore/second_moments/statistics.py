"""Second moments C = E[k kᵀ] of the edited projections' inputs over a text, cached under everything that changes them.

One pass computes all layers. It ends where the deepest of these projections would run: no logits are computed. Products
are float32, sums float64.

Shapes: ``d_in`` the width of a projection's input, ``tokens`` the tokens counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from editcore._util.files import write_tensors
from editcore._util.memory import in_halves
from editcore._util.paths import cache_dir
from editcore._util.words import roughly
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import StatisticsError
from editcore.interfaces.progress import Progress, silent
from editcore.models.module_hooks import hooks
from editcore.models.passes import stop_before
from editcore.models.planning import PassBudget
from editcore.second_moments.corpora import Corpus, open_corpus
from editcore.second_moments.linalg import Metric
from editcore.second_moments.output_gradients import gradient_moments

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["CorpusOptions", "MomentKey", "StatisticsStore", "cached_moments", "second_moments"]

_log = logging.getLogger(__name__)

_VERSION = 2
"""It is increased when moments are computed in another way, so that old cache files are not used."""
_FACTOR = "factor"
"""Name of the Cholesky factor among the derived tensors."""
SEQUENCE_LENGTH = 128
_LONG = 10.0
"""Work that takes at least this many seconds is announced."""
TOKENS_PER_WIDTH = 10
"""Default number of tokens per input unit. It is the smallest that works (FastMEMIT, arXiv 2506.04226); 40 works
better."""

GRADIENTS_PER_WIDTH = 6
"""Tokens per output unit in a moment of gradients. A damped inverse needs few: F has no large eigenvalues."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class MomentKey:
    """Everything that changes a second moment."""

    model: str
    """Fingerprint of the unedited weights."""
    weight: str
    """Name of the projection's weight."""
    corpus: str
    """Name and parameters of the corpus, with the hash of its content if it has one."""
    tokens: int
    """Number of tokens in the average."""
    sequence_length: int
    """Tokens of one sequence."""
    dtype: str
    """Type in which the model ran."""
    version: int = _VERSION
    """Version of the computation, which is increased when its numbers change."""

    def digest(self) -> str:
        """Name of the cache file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@torch.inference_mode()
def second_moments(
    model: LanguageModel, sequences: Tensor, layers: Sequence[int], *, progress: Progress = silent
) -> dict[int, Tensor]:
    """C of each layer, ``[d_in, d_in]`` float64, over all tokens of ``sequences [n, seq]`` (no padding)."""
    width = model.layout.d_ff
    totals = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers}
    products: dict[int, Tensor] = {}

    def multiply(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            keys = args[0].reshape(-1, width).float()  # [tokens, d_in]
            products[layer] = keys.T @ keys

        return hook

    def run(rows: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        with stop_before(model.projection(max(layers))):
            model.hf.base_model(input_ids=torch.stack(list(rows)).to(model.device), use_cache=False)
        return [dict(products)]

    with progress.task("second moments", sequences.numel()) as advance, hooks() as handles:
        for layer in layers:
            handles.append(model.projection(layer).register_forward_pre_hook(multiply(layer)))
        for rows in torch.split(sequences, PassBudget.forward(model).rows(sequences.shape[1])):
            for found in in_halves(run, list(rows)):
                for layer, product in found.items():
                    totals[layer] += product.to(totals[layer])
            advance(rows.numel())
    return {layer: total / sequences.numel() for layer, total in totals.items()}


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusOptions:
    """The text that second moments are computed over."""

    name: str = "self"
    """``self``, ``docs``, ``hf:NAME`` or a file; see :func:`editcore.second_moments.open_corpus`."""
    tokens: int | None = None
    """How many tokens of it; ``None`` for ten times the width of the projection's input."""
    seed: int = 0
    """Of a text that is sampled from the model."""


class StatisticsStore:
    """Second moments of one unedited model over one corpus. They are taken from memory, else from disk, else computed.

    Ask for the layers before the model is edited: their second moments stay in memory.

    Args:
        text: what they are computed over; left out, text that the model writes.
        directory: where they are cached; left out, the usual cache.
        compute: called as :func:`second_moments`; another one may compute elsewhere.
    """

    def __init__(
        self,
        model: LanguageModel,
        text: CorpusOptions | None = None,
        *,
        directory: Path | str | None = None,
        progress: Progress = silent,
        compute: Callable[..., dict[int, Tensor]] = second_moments,
    ) -> None:
        directory = None if directory is None else Path(directory)
        text = text or CorpusOptions()
        self.model = model
        self._compute = compute
        self.corpus: Corpus = open_corpus(text.name, seed=text.seed)
        self.tokens = text.tokens or TOKENS_PER_WIDTH * model.layout.d_ff
        self.directory = (directory or cache_dir() / "statistics") / model.base_fingerprint[:16]
        self.progress = progress
        self._moments: dict[int, Tensor] = {}
        self._metrics: dict[int, Metric] = {}

    @property
    def _sequence_length(self) -> int:
        return SEQUENCE_LENGTH if self.model.positions is None else min(SEQUENCE_LENGTH, self.model.positions)

    def key(self, layer: int) -> MomentKey:
        """The cache key of a layer."""
        return MomentKey(
            model=self.model.base_fingerprint,
            weight=self.model.layout.weight_name(layer),
            corpus=self.corpus.identity(),
            tokens=self.tokens,
            sequence_length=self._sequence_length,
            dtype=str(self.model.compute_dtype).removeprefix("torch."),
        )

    def path(self, layer: int) -> Path:
        """The cache file of a layer."""
        return self.directory / f"{self.key(layer).digest()}.safetensors"

    def moments(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """C of each layer, ``[d_in, d_in]`` float64, on the device of the layer.

        Raises:
            StatisticsError: the corpus cannot be read, is empty, or a cache file is damaged.
        """
        missing = [layer for layer in layers if layer not in self._moments]
        unread = [layer for layer in missing if not self.path(layer).exists()]
        for layer in missing:
            if layer not in unread:
                self._moments[layer] = self._read(layer)
        if unread:
            self._announce(unread)
            sequences = self.corpus.sequences(self.model, self.tokens, self._sequence_length, progress=self.progress)
            for layer, moment in self._compute(self.model, sequences, unread, progress=self.progress).items():
                self._write(layer, moment, sequences.numel())
                self._moments[layer] = moment
        return {layer: self._moments[layer].to(self.model.place(layer)) for layer in layers}

    def _announce(self, layers: Sequence[int]) -> None:
        """Log how long the computation will take, if it is long."""
        text = self.corpus.expected_seconds(self.model, self.tokens, self._sequence_length)
        seconds = 0.0
        if self._compute is second_moments:  # the time of another computation is not known
            row = torch.full((1, self._sequence_length), self.model.pad_id)
            start = time.perf_counter()
            second_moments(self.model, row, layers)
            seconds = (time.perf_counter() - start) * -(-self.tokens // self._sequence_length)
        if text + seconds < _LONG:
            return
        written = f", and sampling that text about {roughly(text)} before that" if text else ""
        _log.warning(
            "The second moments of %s in %s are not in the cache yet. Computing them over %s tokens takes about %s%s; "
            "they are kept.",
            f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}",
            self.model.name,
            f"{self.tokens:,}",
            roughly(seconds),
            written,
        )

    def metrics(self, layers: Sequence[int]) -> dict[int, Metric]:
        """C of each layer with its Cholesky factor, which is kept in memory and beside the moment on disk.

        Raises:
            StatisticsError: as :meth:`moments`.
            NumericalError: a moment has no factor.
        """
        moments = self.moments(layers)
        for layer in layers:
            if layer not in self._metrics:
                self._metrics[layer] = self._factorised(layer, moments[layer])
        return {layer: self._metrics[layer] for layer in layers}

    def derived(self, layer: int, name: str, compute: Callable[[Metric], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that follow from a layer's second moment, such as an eigenbasis or a projector. They are computed
        once, and kept beside the moment on disk under the same key.

        Args:
            name: a name in ``lower-case`` words, such as ``eigenvectors`` or ``null-space-0.02``. It must name
                everything that changes the tensors, apart from the moment.
            compute: called with the layer's metric; returns tensors by name.

        Returns:
            The tensors by name, on the device of the layer.

        Raises:
            StatisticsError: as :meth:`moments`, or the name cannot be that of a file.
        """
        if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) is None:
            raise StatisticsError(f"'{name}' cannot name derived tensors: lower case, digits, '-' and '.' alone.")
        if name == _FACTOR:
            raise StatisticsError(f"'{name}' is the name of the moment's own factor; give derived tensors another.")
        place = self.model.place(layer)
        return {key: tensor.to(place) for key, tensor in self._derived(layer, name, compute).items()}

    def gradient_moment(self, layer: int) -> Tensor:
        """F of a layer (:mod:`editcore.second_moments.output_gradients`) over the beginning of the text, six tokens per
        output unit: ``[d_out, d_out]`` float64 on the layer's device. It is kept beside the second moment of the keys.

        Ask for it before the model is edited.

        Raises:
            StatisticsError: as :meth:`moments`.
        """

        def compute(_metric: Metric) -> dict[str, Tensor]:
            length = self._sequence_length
            text = self.corpus.sequences(self.model, self.tokens, length, progress=self.progress)
            rows = -(-GRADIENTS_PER_WIDTH * self.model.layout.d_model // length)
            return {"moment": gradient_moments(self.model, text[:rows], [layer], progress=self.progress)[layer]}

        return self.derived(layer, f"output-gradients-{GRADIENTS_PER_WIDTH}", compute)["moment"]

    def _derived(
        self, layer: int, name: str, compute: Callable[[Metric], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        path = self._derived_path(layer, name)
        if not path.exists():
            metric = self.metrics([layer])[layer]
            made = {key: tensor.detach().cpu().contiguous() for key, tensor in compute(metric).items()}
            write_tensors(path, made, {})
        return self._read_tensors(path, f"derived tensors '{name}'")

    def _derived_path(self, layer: int, name: str) -> Path:
        return self.path(layer).with_suffix(f".{name}.safetensors")

    def _factorised(self, layer: int, moment: Tensor) -> Metric:
        path = self._derived_path(layer, _FACTOR)
        if not path.exists():
            factor, jitter = Metric(moment).factor
            write_tensors(path, {"factor": factor.cpu(), "jitter": torch.tensor([jitter], dtype=torch.float64)}, {})
        found = self._read_tensors(path, "factor")
        if set(found) != {"factor", "jitter"} or found["factor"].shape != moment.shape:
            raise StatisticsError(f"{path} does not hold the factor of a second moment; delete it.")
        return Metric(moment, factor=(found["factor"].to(moment), float(found["jitter"])))

    def _read(self, layer: int) -> Tensor:
        path, width = self.path(layer), self.model.layout.d_ff
        moment = self._read_tensors(path, "second moment").get("moment")
        if moment is None or moment.shape != (width, width):
            found = "no second moment" if moment is None else f"a matrix of shape {list(moment.shape)}"
            raise StatisticsError(f"{path} holds {found}, not a matrix of shape {[width, width]}; delete it.")
        return moment

    def _read_tensors(self, path: Path, what: str) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                # Copied, because solves over memory that maps the file may round differently than over allocated
                # memory.
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a mapping
        except (SafetensorError, OSError) as error:
            raise StatisticsError(
                f"Cannot read the {what} in {path} ({error}); delete it to compute it anew."
            ) from error

    def _write(self, layer: int, moment: Tensor, counted: int) -> None:
        key = self.key(layer)
        metadata = {
            **{name: str(value) for name, value in asdict(key).items()},
            "counted_tokens": str(counted),
            "model_name": self.model.name,
            "layer": str(layer),
            "text": self.corpus.content_hash or "",
        }
        for stale in self.directory.glob(
            f"{key.digest()}.*.safetensors"
        ):  # derived from an earlier file under this key
            stale.unlink(missing_ok=True)
        write_tensors(self.path(layer), {"moment": moment}, metadata)


def cached_moments(directory: Path | str | None = None) -> Iterator[tuple[Path, dict[str, str]]]:
    """Every cache file with its metadata; unreadable ones are skipped with a warning in the log."""
    directory = None if directory is None else Path(directory)
    for path in sorted((directory or cache_dir() / "statistics").glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            _log.warning("cannot read %s: %s", path, error)
            continue
        if "weight" in metadata:
            yield path, metadata
