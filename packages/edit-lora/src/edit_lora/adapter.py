"""A LoRA adapter as a value: read from and written to the folder that peft reads and writes.

What an adapter adds to a module is kept as one product of two factors, oriented (out, in), with its scaling multiplied
in. Ranks, alphas and padding exist in the files only. So do the other names that peft gives to the factors of an
embedding, ``B [d_model, rank]`` and ``A [rank, vocab]``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from editcore import FactoredDelta, HParamsError, ModelError
from editcore.models import dtype_of
from editcore.runs import json_text, write_tensors, write_text
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from edit_lora.additive import check_additive, check_targets
from edit_lora.config_file import read_config
from edit_lora.factors import balanced, join, padded

if TYPE_CHECKING:
    from torch import Tensor

    from edit_lora.targets import Targets

__all__ = ["EDITS", "ORIGIN_NAME", "WEIGHTS_NAME", "Adapter", "check_name", "combine"]

EDITS = "edits"
"""Name of the adapter that holds a session's edits."""
WEIGHTS_NAME = "adapter_model.safetensors"
ORIGIN_NAME = "base.json"
"""A file next to peft's two, with the fingerprint of the base: peft has no field for it."""
_PREFIX = "base_model.model."  # of every module, in peft's files
_FACTOR = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<row_side>[AB]))")
_COPY = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.base_layer\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What an adapter adds to a base model."""

    factors: Mapping[str, FactoredDelta]
    """The change of each module's weight by module path: float64 and (out, in), however the module stores it."""
    base_model: str
    """Name, folder or hub id of the base, as editcore loads it."""
    base_hub: str | None = None
    """Hub id of the base if ``base_model`` is another name. peft's files hold this one, since everybody can load it."""
    base_revision: str | None = None
    """Commit of the base on the hub, where it is known."""
    base_fingerprint: str | None = None
    """Fingerprint of the base's weights; ``None`` if the adapter's files do not give it."""
    in_out: bool = False
    """True if any of the modules stores its weight (in, out), as ``Conv1D`` does; peft's ``fan_in_fan_out``."""
    embeddings: frozenset[str] = frozenset()
    """Paths of those modules that are embeddings: their factors are ``[d_model, rank]`` and ``[rank, vocab]``."""
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the base by module path, as peft saves them along with the factors of embeddings and heads. They are
    compared with the base's and never replace them."""

    @property
    def rank(self) -> int:
        """The largest rank at any module."""
        return max(delta.rank for delta in self.factors.values())

    @property
    def source(self) -> str:
        """Where the base is loaded from. For a folder that does not exist here it is the hub id, if that is known."""
        gone = Path(self.base_model).is_absolute() and not Path(self.base_model).is_dir()
        return self.base_hub if gone and self.base_hub is not None else self.base_model

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        """The adapter in a folder.

        Raises:
            ModelError: a file is missing or damaged, or the adapter is more than a plain LoRA.
        """
        config = read_config(directory)
        check_additive(config, where=directory)
        tensors = _read_tensors(directory / WEIGHTS_NAME)
        pairs: dict[str, dict[str, Tensor]] = {}
        copies: dict[str, Tensor] = {}
        embeddings = set()
        for key, tensor in tensors.items():
            if (match := _FACTOR.fullmatch(key)) is not None:
                pairs.setdefault(match["path"], {})[match["side"] or match["row_side"]] = tensor
                if match["row_side"]:
                    embeddings.add(match["path"])
            elif (match := _COPY.fullmatch(key)) is not None:
                copies[match["path"]] = tensor
            else:
                raise ModelError(
                    f"{directory} is not a plain LoRA adapter of linear modules and embeddings: it holds '{key}'."
                )
        factors = {}
        for path, pair in sorted(pairs.items()):
            down, up = pair.get("A"), pair.get("B")
            if down is None or up is None or down.ndim != 2 or up.shape[1:] != down.shape[:1]:
                raise ModelError(f"{directory / WEIGHTS_NAME} is damaged: the factors of '{path}' do not fit together.")
            factors[path] = FactoredDelta(up.double() * _scaling(config, path, len(down)), down.double())
        if not factors:
            raise ModelError(f"{directory / WEIGHTS_NAME} holds no factors.")
        check_targets(config, list(factors), where=directory)
        named, origin = str(config.get("base_model_name_or_path") or ""), _read_origin(directory / ORIGIN_NAME)
        base_model = origin.get("base_model") or named
        return cls(
            factors=factors,
            base_model=base_model,
            base_hub=named if named != base_model else None,
            base_revision=config.get("revision"),
            base_fingerprint=origin.get("base_fingerprint"),
            in_out=bool(config.get("fan_in_fan_out")),
            embeddings=frozenset(embeddings),
            copies=copies,
        )

    def write(self, directory: Path, *, rank: int | None = None, dtype: str = "float32") -> None:
        """Write configuration and weights into an existing folder, as ``PeftModel.save_pretrained`` does: one rank for
        all modules (the largest, or ``rank``), α equal to that rank, modules named by their full path.

        Args:
            dtype: of the factors: float32, or a type to which engines with 16 bits round them.

        Raises:
            HParamsError: a factor is too large for the type.
        """
        kind = dtype_of(dtype)
        rank = self.rank if rank is None else rank
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(self.factors),
            fan_in_fan_out=self.in_out,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base_hub or self.base_model,
            revision=self.base_revision,
            inference_mode=True,
        )
        config.target_modules = sorted(self.factors)  # peft makes a set of them, whose order varies
        config.save_pretrained(str(directory))
        tensors = {}
        for path, delta in self.factors.items():
            even = padded(balanced(delta), rank)
            name = f"{_PREFIX}{path}.lora_{{}}.weight"
            if path in self.embeddings:
                name = f"{_PREFIX}{path}.lora_embedding_{{}}"
            tensors[name.format("A")] = even.right.to(kind).contiguous()
            tensors[name.format("B")] = even.left.to(kind).contiguous()
            if not all(tensors[name.format(side)].isfinite().all() for side in "AB"):
                raise HParamsError(f"The edits of '{path}' are too large for {dtype}; take another --dtype.")
        tensors |= {f"{_PREFIX}{path}.base_layer.weight": copy for path, copy in self.copies.items()}
        write_tensors(directory / WEIGHTS_NAME, tensors, {"format": "pt"})
        if self.base_fingerprint is not None:
            origin = {"base_model": self.base_model, "base_fingerprint": self.base_fingerprint}
            write_text(directory / ORIGIN_NAME, json_text(origin, indent=2) + "\n")

    def scaled(self, factor: float) -> Adapter:
        """The same adapter, ``factor`` times as strong."""
        factors = {path: FactoredDelta(delta.left * factor, delta.right) for path, delta in self.factors.items()}
        return replace(self, factors=factors)

    def check_base(self, name: str, fingerprint: str, *, force: bool = False) -> None:
        """Refuse a base that the adapter was not made for. An adapter without a fingerprint fits every base.

        Raises:
            ModelError: the fingerprints differ.
        """
        if force or self.base_fingerprint in (None, fingerprint):
            return
        raise ModelError(
            f"The adapter was made for {self.base_model} with the fingerprint {str(self.base_fingerprint)[:12]}; "
            f"{name} has {fingerprint[:12]}. An adapter is a difference to one set of weights, in one type. Take that "
            "base, or use --force to put the adapter onto this one."
        )

    def check_modules(self, targets: Targets) -> None:
        """Refuse a model whose modules the factors do not fit.

        Raises:
            ModelError: a module is missing, is of a class that takes no adapter, or has another shape; or the adapter
                brings a copy of its weight that differs from the model's.
        """
        for path, delta in self.factors.items():
            target = targets.find(path)
            found, expected = delta.shape, target.shape
            if found != expected:
                raise ModelError(
                    f"The adapter changes '{path}' as if it were {found[0]} by {found[1]}; it is {expected[0]} by "
                    f"{expected[1]} (out, in). The adapter belongs to another model."
                )
            if (path in self.embeddings) != (target.kind == "embedding"):
                theirs, ours = ("an", "no") if path in self.embeddings else ("no", "an")
                raise ModelError(
                    f"The adapter changes '{path}' as {theirs} embedding; it is {ours} embedding. The adapter belongs "
                    "to another model."
                )
        for path, copy in self.copies.items():
            weight = targets.module(targets.find(path).path).weight
            if weight.shape != copy.shape or not torch.equal(weight.detach().to(copy), copy):
                raise ModelError(
                    f"The adapter brings a weight of its own for '{path}', and it is not that of the base: it was "
                    "trained or resized with the adapter. Such an adapter changes more than its factors say."
                )


def combine(adapters: Sequence[Adapter], weights: Sequence[float], *, force: bool = False) -> Adapter:
    """One adapter with the effect of all the given ones, each times its weight: peft's ``cat``.

    Its rank is the sum of their ranks, at most the width of the module.

    Raises:
        ModelError: the adapters were made for different bases (``force`` overrides), or for other shapes.
    """
    made_for = {
        adapter.base_fingerprint: adapter.base_model for adapter in adapters if adapter.base_fingerprint is not None
    }
    if len(made_for) > 1 and not force:
        bases = " and ".join(f"{name} ({fingerprint[:12]})" for fingerprint, name in made_for.items())
        raise ModelError(f"The adapters were made for different bases, {bases}. --force combines them anyway.")
    scaled = [adapter.scaled(weight) for adapter, weight in zip(adapters, weights, strict=True)]
    parts: dict[str, list[FactoredDelta]] = {}
    for adapter in scaled:
        for path, delta in adapter.factors.items():
            parts.setdefault(path, []).append(delta)
    for path, deltas in parts.items():
        kinds = {path in adapter.embeddings for adapter in adapters if path in adapter.factors}
        if len({delta.shape for delta in deltas}) > 1 or len(kinds) > 1:
            raise ModelError(f"The adapters differ in the shape of '{path}'; they belong to different models.")
    copies: dict[str, Tensor] = {}
    for path, copy in ((path, copy) for adapter in adapters for path, copy in adapter.copies.items()):
        if path in copies and not torch.equal(copies[path], copy):
            raise ModelError(f"The adapters bring different weights for '{path}'; they belong to different models.")
        copies[path] = copy
    [fingerprint] = made_for if len(made_for) == 1 else [None]
    factors = {path: join(deltas) for path, deltas in sorted(parts.items())}
    return replace(
        adapters[0],
        factors=factors,
        base_fingerprint=fingerprint,
        in_out=any(adapter.in_out for adapter in adapters),
        embeddings=frozenset().union(*(adapter.embeddings for adapter in adapters)),
        copies=copies,
    )


def check_name(name: str) -> None:
    """Refuse a name that peft's module dictionaries or a folder would not take, and the name of the edits' own adapter.

    Raises:
        HParamsError: it is ``edits``, or has other characters than letters, digits, hyphens and underscores.
    """
    if name == EDITS:
        raise HParamsError(f"The name '{EDITS}' is taken: the run's own edits have it. Give another.")
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        raise HParamsError(f"An adapter's name has only letters, digits, '-' and '_'; found '{name}'.")


def _read_origin(path: Path) -> dict[str, str]:
    """What :meth:`Adapter.write` recorded of the base; empty for an adapter that something else wrote."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(found[name]) for name in ("base_model", "base_fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {' '.join(str(error).split())}.") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        hint = " (a .bin file is a pickle, which is not read)" if path.with_suffix(".bin").exists() else ""
        raise ModelError(f"{path.parent} is no adapter: it has no {WEIGHTS_NAME}{hint}.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if bad := next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None):
        raise ModelError(f"{path} holds NaN or Inf in '{bad}'.")
    return tensors


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """α/r of a module, or α/√r (rank-stabilised), with its own α where the configuration gives one."""
    own = config.get("alpha_pattern") or {}
    alpha = float(own.get(get_pattern_key(list(own), path), config.get("lora_alpha", LoraConfig.lora_alpha)))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)
