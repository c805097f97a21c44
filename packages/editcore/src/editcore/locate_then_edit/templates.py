"""Context templates: openings before which a fact is looked up, so that it holds in more than one context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["OPENINGS", "sample_context_templates"]

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""First words of the sampled contexts (MEMIT, section 5 of its reference implementation)."""


def sample_context_templates(
    model: LanguageModel, *, seed: int, count: int = 5, length: int | Sequence[int] = 10, top_k: int = 5
) -> tuple[str, ...]:
    """``("{}", "The ... . {}", ...)``: the bare prompt, then ``count`` openings continued by the model itself.

    Departure from the reference code, which samples without a seed and keeps the result for the life of the process
    whatever model comes next: here the seed is an argument, and the caller records the templates with the run.
    Openings repeat with other continuations when ``count`` exceeds their number.

    Args:
        length: tokens of a continuation; of several, context i takes the one at i modulo their number.
    """
    if count == 0:
        return ("{}",)
    lengths = [length] if isinstance(length, int) else list(length)
    openings = [OPENINGS[index % len(OPENINGS)] for index in range(count)]
    wanted = [lengths[index % len(lengths)] for index in range(count)]
    continued = model.generate(openings, max_new_tokens=wanted, seed=seed, top_k=top_k, raw=True)
    texts = (opening + text for opening, text in zip(openings, continued, strict=True))
    # A brace in the sample would be a second place for the prompt; line ends would split the context in two.
    clean = (" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts)
    return ("{}", *(text.rstrip(".") + ". {}" for text in clean))
