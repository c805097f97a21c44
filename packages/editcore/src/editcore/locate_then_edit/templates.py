"""Context templates: texts that are put before a prompt, so that a fact holds in more than one context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editcore.models.options import Sampling

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["OPENINGS", "sample_context_templates"]

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""First words of the sampled contexts (MEMIT, section 5 of its reference implementation)."""


def sample_context_templates(
    model: LanguageModel, *, seed: int, count: int = 5, length: int | Sequence[int] = 10, top_k: int = 5
) -> tuple[str, ...]:
    """``("{}", "The ... . {}", ...)``: the bare prompt, then ``count`` openings continued by the model itself.

    The reference code samples without a seed and keeps the result for the life of the process, even for other models.
    Here the seed is an argument, and the caller records the templates with the run. If ``count`` exceeds the number of
    openings, they repeat with other continuations.

    Args:
        length: tokens of a continuation. With several lengths, the contexts use them in turn.
    """
    if count == 0:
        return ("{}",)
    lengths = [length] if isinstance(length, int) else list(length)
    openings = [OPENINGS[index % len(OPENINGS)] for index in range(count)]
    wanted = [lengths[index % len(lengths)] for index in range(count)]
    continued = model.generate(openings, max_new_tokens=wanted, sampling=Sampling(seed=seed, top_k=top_k), raw=True)
    texts = (opening + text for opening, text in zip(openings, continued, strict=True))
    # A brace in the sample would be a second place for the prompt; a line end would split the context in two.
    clean = (" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts)
    return ("{}", *(text.rstrip(".") + ". {}" for text in clean))
