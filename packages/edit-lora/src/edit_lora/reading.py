"""Reads an adapter folder for ``editctl evaluate``: what it adds to the weights of its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from editcore import FactoredDelta, LanguageModel

from edit_lora.adapter import Adapter
from edit_lora.targets import Targets

__all__ = ["ReadAdapter", "edits_of", "read_adapter"]


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """An adapter, whoever made it."""

    adapter: Adapter

    @property
    def source(self) -> str:
        """The base model that it names; empty if it names none."""
        return self.adapter.source

    def changes(self, model: LanguageModel, *, force: bool = False) -> Mapping[str, FactoredDelta]:
        """Its factors by weight name, once for a weight that several modules share.

        Raises:
            ModelError: it was made for another base, or does not fit this one.
        """
        self.adapter.check_base(model.name, model.base_fingerprint, force=force)
        return edits_of(self.adapter, model)


def read_adapter(folder: Path) -> ReadAdapter:
    """The adapter in a folder.

    Raises:
        ModelError: a file is missing or damaged, or the adapter is more than a plain LoRA.
    """
    return ReadAdapter(Adapter.read(folder))


def edits_of(adapter: Adapter, model: LanguageModel) -> dict[str, FactoredDelta]:
    """The adapter's factors by weight name, once for a weight that several modules share.

    Raises:
        ModelError: the model lacks one of the modules or has it in another shape, or modules that share a weight are
            changed differently.
    """
    targets = Targets(model.hf)
    adapter.check_modules(targets)
    return {f"{path}.weight": delta for path, delta in targets.one_per_weight(adapter.factors).items()}
