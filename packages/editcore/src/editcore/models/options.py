"""How a model is loaded, and how it writes. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from editcore.interfaces.documented import documented

__all__ = ["LoadOptions", "Sampling"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    device: str = "cpu"
    """As torch names it; or ``auto``: all accelerators, block by block, as the ``device_map`` of transformers spreads
    them."""
    dtype: str = "float32"
    """Type of the weights, one of :data:`DTYPE_NAMES`. With one that the processor computes slowly in, the
    model computes in float32, and a warning says so."""
    chat_template: bool = False
    """Whether prompts are the user's turns of a chat; see ``LanguageModel.use_chat_template``."""
    trust_remote_code: bool = False
    """Run the Python code that the model brings along."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Tokens are drawn at random instead of taking the likeliest one.

    The same seed, rows and weights give the same tokens on the CPU. Nothing global is seeded.
    """

    seed: int
    """Of a private random generator. It draws on the CPU, so that a seed means the same on every device."""
    top_k: int | None = None
    """Draw among this many likeliest tokens; ``None`` for all."""
    temperature: float = 1.0
    """Logits are divided by it. Less than 1 prefers likely tokens."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {self.top_k}")
