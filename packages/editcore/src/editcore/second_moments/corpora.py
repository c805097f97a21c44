"""Text behind the second moments: the model's own, Python's documentation, a file, or a hub data set."""

from __future__ import annotations

import gzip
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from editcore.interfaces.errors import StatisticsError
from editcore.interfaces.progress import Progress, silent
from editcore.models.options import Sampling
from editcore.second_moments.stored import is_stored, stored_text

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.models import LanguageModel

__all__ = ["Corpus", "open_corpus"]

_TIMED_ROWS = 128
"""Rows that are generated together to estimate the time of sampling."""


class Corpus(Protocol):
    """A source of token sequences."""

    content_hash: str | None
    """sha256 of the tokens, once they have been made."""

    def identity(self) -> str:
        """Everything that decides the text, short enough for a cache key."""
        ...

    def expected_seconds(self, model: LanguageModel, tokens: int, length: int) -> float:
        """Estimated time that the model needs to write the text for :meth:`sequences`; 0 for a text that exists
        already."""
        ...

    def sequences(self, model: LanguageModel, tokens: int, length: int, *, progress: Progress = silent) -> Tensor:
        """About ``tokens`` tokens as ``[n, length]`` without padding; fewer if the source is smaller.

        Raises:
            StatisticsError: the source cannot be read or holds less than one sequence.
        """
        ...


def open_corpus(name: str | Path, *, seed: int = 0) -> Corpus:
    """Open the text ``self``, ``docs``, ``hf:NAME`` or a text file (also ``.gz``).

    Raises:
        StatisticsError: the file does not exist; the message lists what would work.
    """
    name = str(name)
    if name == "self":
        return SelfCorpus(seed)
    if name == "docs":
        return TextCorpus("docs", _python_documentation())
    if name.startswith("hf:"):
        return HubCorpus(name.removeprefix("hf:"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise StatisticsError(
            f"Corpus '{name}' is neither 'self', 'docs', 'hf:NAME' nor a text file that exists ({path} was not found)."
        )
    return TextCorpus(path.name, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise StatisticsError(f"Cannot read the corpus {path}: {error}.") from error


def _python_documentation() -> str:
    """The prose of Python's language reference, which every CPython carries for ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


class SelfCorpus:
    """Text sampled from the unedited model, token by token from its own distribution, with a fixed seed.

    It has the model's own distribution, and needs no data and no network. The same seed gives the same tokens on one
    machine and one build of torch. The moments' file records their hash. The text of the default model comes with
    editcore.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.content_hash: str | None = None
        self._sampled: tuple[tuple[str, int, int], Tensor] | None = None

    def identity(self) -> str:
        """Name, way of sampling and seed."""
        return f"self:ancestral:{self.seed}"

    def expected_seconds(self, model: LanguageModel, tokens: int, length: int) -> float:
        """An estimate from the time between the first tokens; 0 for a text that need not be sampled."""
        count = -(-tokens // length)
        if self._at_hand(model, tokens, length):
            return 0.0
        opening, rows = list(model.opening_ids), min(count, _TIMED_ROWS)
        times: list[float] = []
        model.generate_ids(
            [opening] * rows,
            max_new_tokens=min(3, length - len(opening)),
            sampling=Sampling(seed=self.seed),
            stop_at_end=False,
            advance=lambda _tokens: times.append(time.perf_counter()),
        )
        return (times[-1] - times[0]) / max(1, len(times) - 1) * (length - len(opening)) * count / rows

    def sequences(self, model: LanguageModel, tokens: int, length: int, *, progress: Progress = silent) -> Tensor:
        """Sequences sampled at temperature 1 from the model's start token, which stays if the tokenizer adds one.

        The last sample is kept for the next request.

        Raises:
            StatisticsError: the text that comes with editcore is damaged.
        """
        key = (model.base_fingerprint, tokens, length)
        if self._sampled is None or self._sampled[0] != key:
            _refuse_too_long(model, length)
            count = -(-tokens // length)
            rows = stored_text(model.base_fingerprint, seed=self.seed, rows=count, length=length)
            self._sampled = (key, _hashed(self, self._sample(model, count, length, progress) if rows is None else rows))
        return self._sampled[1]

    def _at_hand(self, model: LanguageModel, tokens: int, length: int) -> bool:
        sampled = self._sampled is not None and self._sampled[0] == (model.base_fingerprint, tokens, length)
        return sampled or is_stored(model.base_fingerprint, seed=self.seed, rows=-(-tokens // length), length=length)

    def _sample(self, model: LanguageModel, count: int, length: int, progress: Progress) -> Tensor:
        opening = list(model.opening_ids)
        body = length - len(opening)
        with progress.task("sampling the model's own text", count * body) as advance:
            rows = model.generate_ids(
                [opening] * count,
                max_new_tokens=body,
                sampling=Sampling(seed=self.seed),
                stop_at_end=False,
                advance=advance,
            )
        return _tensor([opening + row for row in rows])


class TextCorpus:
    """A text, cut into sequences of equal length."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.content_hash: str | None = None

    def identity(self) -> str:
        """Name and hash of the text."""
        return f"{self.name}:{hashlib.sha256(self.text.encode()).hexdigest()[:16]}"

    def expected_seconds(self, model: LanguageModel, tokens: int, length: int) -> float:
        """0, because the text exists already."""
        return 0.0

    def sequences(self, model: LanguageModel, tokens: int, length: int, *, progress: Progress = silent) -> Tensor:
        """Sequences from the start of the text, each opened by the start token if the tokenizer adds one."""
        opening = model.opening_ids
        body = length - len(opening)
        ids: list[int] = []
        for piece in _pieces(self.text):
            ids += model.read_text(piece)
            if len(ids) >= tokens:
                break
        count = min(-(-tokens // length), len(ids) // body)
        if count == 0:
            raise StatisticsError(f"The corpus {self.name} has {len(ids)} tokens; at least {body} are needed.")
        return _hashed(self, _tensor([[*opening, *ids[row * body : (row + 1) * body]] for row in range(count)]))


def _refuse_too_long(model: LanguageModel, length: int) -> None:
    if model.positions is not None and length > model.positions:
        raise StatisticsError(
            f"Text of {length} tokens in a row is asked for, and {model.name} reads at most {model.positions}."
        )


def _pieces(text: str, size: int = 20_000) -> Iterator[str]:
    """The text in parts that end at a line's end, so that only the needed start of a long text is tokenised."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


class HubCorpus:
    """The ``text`` column of a hub data set's training split, streamed."""

    def __init__(self, name: str) -> None:
        self.name, _, self.config = name.partition(":")
        self.content_hash: str | None = None

    def identity(self) -> str:
        """Name and configuration; a hub data set has no hash before it is read."""
        return f"hf:{self.name}:{self.config}"

    def expected_seconds(self, model: LanguageModel, tokens: int, length: int) -> float:
        """0, because the model does not write the text."""
        return 0.0

    def sequences(self, model: LanguageModel, tokens: int, length: int, *, progress: Progress = silent) -> Tensor:
        """Sequences from the start of the split."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise StatisticsError(
                f"Corpus 'hf:{self.name}' needs the package datasets: pip install datasets."
            ) from error
        try:
            stream = load_dataset(self.name, self.config or None, split="train", streaming=True)
            texts, characters = [], 0
            for row in stream:
                texts.append(row["text"])
                characters += len(row["text"])
                if characters > 8 * tokens:  # generous: a token rarely spans eight characters
                    break
        except KeyError as error:
            raise StatisticsError(f"The data set {self.name} has no column 'text'.") from error
        except (OSError, ValueError) as error:
            raise StatisticsError(f"Cannot read the data set {self.name}: {error}") from error
        corpus = TextCorpus(self.name, "\n".join(texts))
        sequences = corpus.sequences(model, tokens, length, progress=progress)
        self.content_hash = corpus.content_hash
        return sequences


def _tensor(rows: list[list[int]]) -> Tensor:
    import torch  # imported here, so that texts can be checked without torch

    return torch.tensor(rows, dtype=torch.long)


def _hashed(corpus: Corpus, sequences: Tensor) -> Tensor:
    corpus.content_hash = hashlib.sha256(sequences.cpu().numpy().tobytes()).hexdigest()
    return sequences
