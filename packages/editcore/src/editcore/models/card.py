"""The README of a model folder that editcore wrote: its base, the versions that wrote it, and what can read it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from editcore.models.sources import HubModel

__all__ = ["model_card"]


def model_card(title: str, *, base: str, hub: HubModel | None, fingerprint: str | None, dtype: torch.dtype) -> str:
    """The README of a model folder, with the front matter that hubs read.

    Args:
        base: the name by which the model was loaded.
        fingerprint: of the unedited weights; ``None`` where it was not computed.
    """
    made_with = ", ".join(f"{name} {version(name)}" for name in ("editcore", "transformers", "torch", "safetensors"))
    rows = [("base model", hub.id if hub is not None else Path(base).name)]
    rows += [("its revision", hub.revision)] if hub is not None and hub.revision else []
    rows += [("its name in editcore", base)] if hub is not None and base != hub.id and "/" not in base else []
    rows += [("its fingerprint", f"`{fingerprint}`")] if fingerprint is not None else []
    rows += [("type", str(dtype).removeprefix("torch.")), ("made with", made_with)]
    rows += [("read by", "transformers 5, and transformers 4 from 4.51 on where it knows the architecture")]
    return "\n".join(
        [
            "---",
            *([f"base_model: {hub.id}"] if hub is not None else []),
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- knowledge-editing",
            "---",
            "",
            f"# {title}",
            "",
            "A language model whose weights hold edits that editcore made.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        ]
    )
