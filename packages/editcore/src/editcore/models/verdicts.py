"""Tests of a model whose outcome is kept: a long test need not be made again in the next process.

A verdict belongs to the weights, to their type and device, and to the versions of what computes with them. Only models
that were loaded from files have kept verdicts: what stands around a model in memory may be anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from editcore._util.files import write_text
from editcore._util.paths import cache_dir
from editcore._util.versions import version_of
from editcore.interfaces.errors import StorageError

if TYPE_CHECKING:
    import torch

__all__ = ["kept_verdict"]

_COMPUTES = ("editcore", "torch", "transformers")


class _Model(Protocol):
    """What of a language model a verdict belongs to."""

    hf: Any

    @property
    def base_fingerprint(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def compute_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def kept_verdict(model: _Model, question: str, find: Callable[[], bool]) -> bool:
    """Whether something holds for a model. ``find`` is called if the answer is not in the cache.

    Args:
        question: names the test, and everything that changes its outcome beside the model and the versions.
    """
    if not getattr(model.hf, "name_or_path", ""):  # it was made in memory
        return find()
    about: dict[str, Any] = {
        "question": question,
        "model": model.base_fingerprint,
        "class": f"{type(model.hf).__module__}.{type(model.hf).__qualname__}",
        "types": [str(model.dtype), str(model.compute_dtype)],
        "device": model.device.type,
        "versions": {name: version_of(name) for name in _COMPUTES},
    }
    text = json.dumps(about, sort_keys=True)
    path = cache_dir() / "verdicts" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        kept = json.loads(path.read_bytes())
        if isinstance(kept, dict) and kept.get("about") == about and isinstance(kept.get("holds"), bool):
            return bool(kept["holds"])
    except (OSError, ValueError):
        pass  # not kept yet, or damaged: found again
    holds = find()
    with contextlib.suppress(StorageError):  # a cache that cannot be written costs time alone
        write_text(path, json.dumps({"about": about, "holds": holds}, indent=2) + "\n")
    return holds
