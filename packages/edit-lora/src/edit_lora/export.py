"""A run's edits as a standard adapter folder, or as a whole model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from editcore import (
    FactoredDelta,
    FactRecord,
    HParamsError,
    LanguageModel,
    LedgerEntry,
    LoadOptions,
    ModelError,
    Plugins,
    Progress,
    RunError,
)
from editcore.interfaces import silent
from editcore.ledger import Ledger, write_ledger
from editcore.models import attached_reason
from editcore.runs import (
    REQUESTS_NAME,
    RunRecord,
    new_folder,
    open_run,
    read_batches,
    read_requests,
    record_text,
    refuse_existing,
    statistics_of,
    write_batches,
    write_text,
)
from editcore.second_moments import Metric
from editcore.settings import build
from pydantic import BaseModel

from edit_lora.adapter import WEIGHTS_NAME, Adapter
from edit_lora.card import VLLM_RANKS, AdapterCard, Check
from edit_lora.factors import check_factors, factored, rounding
from edit_lora.hparams import LoraHParams
from edit_lora.reduction import Reduction, reduce, without_moment
from edit_lora.targets import Target, Targets, seen_from

__all__ = [
    "EDITS_FOLDER",
    "AdapterSize",
    "BuiltAdapter",
    "Exported",
    "ExportedRecord",
    "LazyBase",
    "build_adapter",
    "export_adapter",
    "export_merged",
    "recorded_facts",
]

EDITS_FOLDER = "edits"
"""Inside an adapter folder: the run directory that it came from, with the active batches only. peft ignores it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """How large an exported adapter may be."""

    rank: int | None = None
    """Largest rank. ``None``: as in the run's own ``lora`` settings, and exact if it has none."""
    criterion: str | None = None
    """What a bounded rank keeps (``lora_criterion``). ``None``: as in the run's settings."""
    pad_for: str | None = None
    """The engine that will serve the adapter: zeros fill it up to a rank that the engine takes."""


AS_THE_RUN_SAYS = AdapterSize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote."""

    rank: int
    """Rank in the files."""
    modules: Mapping[str, Reduction]
    """What the adapter keeps at each weight, by weight name."""
    edits: int
    """Number of facts in the adapter."""
    rounding: Mapping[str, float]
    """By module, ‖written − edit‖ / ‖edit‖: what the type of the factors loses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltAdapter:
    """The adapter of a run's active edits, and what it was made from."""

    record: RunRecord
    ledger: Ledger
    hparams: LoraHParams
    """The settings of the adapter."""
    base: LazyBase
    """The run's unedited model."""
    modules: Mapping[str, Reduction]
    """What the adapter keeps at each weight, by weight name."""
    ends: Mapping[str, Sequence[Target]]
    """By weight name, the modules that have that weight."""
    adapter: Adapter

    @property
    def entries(self) -> Sequence[LedgerEntry]:
        """The active batches."""
        return self.ledger.history()

    @property
    def edits(self) -> int:
        """Number of facts in the adapter."""
        return sum(entry.num_new for entry in self.entries)

    @property
    def shared(self) -> list[str]:
        """Paths of modules that share a weight: each has factors of its own."""
        return [end.path for targets in self.ends.values() if len(targets) > 1 for end in targets]


def export_adapter(
    run: Path,
    out: Path,
    *,
    size: AdapterSize = AS_THE_RUN_SAYS,
    dtype: str = "float32",
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write a folder that ``PeftModel.from_pretrained(base, out)`` loads, from the run's active edits.

    The run may have had any backend.

    Args:
        dtype: of the factors.

    Raises:
        RunError: there is no run, or it has no active edits.
        ModelError: some of its edits cannot be in an adapter; nothing is written.
        HParamsError: no rank that the engine serves is large enough, or a factor is too large for ``dtype``.
        StorageError: ``out`` is there already, or cannot be written.
    """
    refuse_existing(out)
    built = build_adapter(run, size=size, plugins=plugins, progress=progress)
    rank = _served_rank(built.adapter.rank) if size.pad_for == "vllm" else built.adapter.rank
    with new_folder(out) as folder:
        built.adapter.write(folder, rank=rank, dtype=dtype)
        written = Adapter.read(folder).factors
        _write_edits(folder, run, built.record, built.ledger, built.hparams)
        card = AdapterCard(
            title=out.name,
            record=built.record,
            entries=built.entries,
            begun={fact.request.id for fact in recorded_facts(run)},
            modules=built.modules,
            rank=rank,
            shared=built.shared,
            checks=Check.all_of(run, built.edits),
        )
        write_text(folder / "README.md", card.text())
    lost = {path: rounding(delta, written[path]) for path, delta in built.adapter.factors.items()}
    return Exported(rank=rank, modules=built.modules, edits=built.edits, rounding=lost)


def build_adapter(
    run: Path, *, size: AdapterSize = AS_THE_RUN_SAYS, plugins: Plugins | None = None, progress: Progress = silent
) -> BuiltAdapter:
    """The adapter of a run's active edits, in memory.

    Raises:
        RunError: there is no run, or it has no active edits.
        ModelError: some of its edits cannot be in an adapter.
    """
    record, ledger = RunRecord.read(run), Ledger.read(run)
    entries = ledger.history()
    _refuse_attachments(record, entries, "exported")
    if not any(entry.changes for entry in entries):
        raise RunError(f"{run} has no active edits; there is nothing to export.")
    for entry in entries:
        check_factors(entry.changes, whose=f"The edits of {run}")
    base = LazyBase(record, plugins, progress)
    ends = {name: base.ends(name) for name in sorted({name for entry in entries for name in entry.changes})}
    hparams = _hparams(record, size)
    modules = _reduce_all(entries, list(ends), hparams, base)
    return BuiltAdapter(
        record=record,
        ledger=ledger,
        hparams=hparams,
        base=base,
        modules=modules,
        ends=ends,
        adapter=_adapter(record, modules, ends, scale=hparams.lora_scale),
    )


def export_merged(
    run: Path,
    out: Path,
    *,
    dtype: str | None = None,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> None:
    """Write the run's edited model, edits in its weights, as a folder that ``from_pretrained`` loads.

    Args:
        dtype: type of the weights in the folder; ``None``: as in the folder of the base.

    Raises:
        RunError: there is no run, or its model is not the one at hand.
        ModelError: some of its edits are kept beside the weights; nothing is written.
        StorageError: ``out`` is there already, or cannot be written.
    """
    refuse_existing(out)
    _refuse_attachments(RunRecord.read(run), Ledger.read(run).history(), "merged")
    edited, _ = open_run(run, plugins=plugins, progress=progress)
    edited.check_all_in_weights("merged")
    edited.save(out, dtype=dtype)


def _refuse_attachments(record: RunRecord, entries: Sequence[LedgerEntry], what: str) -> None:
    if kinds := sorted({entry.attachment.kind for entry in entries if entry.attachment is not None}):
        raise ModelError(attached_reason(record.model.name, kinds, what))


def _hparams(record: RunRecord, size: AdapterSize) -> LoraHParams:
    """The settings for a run's adapter: the run's own if its backend is ``lora``, overridden by ``size``.

    Weights at which the run fell back to raw are exported exactly.
    """
    own = dict(record.settings.get("lora", {})) if record.config.backend == "lora" else {}
    if size.rank is not None:
        own["lora_rank"] = size.rank
    if size.criterion is not None:
        own["lora_criterion"] = size.criterion
    return build(LoraHParams, [own], owner="lora")


class ExportedAs(BaseModel):
    """The adapter that the edits of a run were exported as."""

    adapter_sha256: str
    """SHA-256 of the adapter's file of weights."""


class ExportedRecord(RunRecord):
    """``run.json`` inside the folder of an adapter."""

    exported: ExportedAs | None = None
    """The adapter in the same folder."""


class LazyBase:
    """The run's unedited model, loaded when it is first needed.

    The record names the MLP output projections, so an adapter that changes only these does not load the model.
    """

    def __init__(self, record: RunRecord, plugins: Plugins | None, progress: Progress) -> None:
        self._record, self._plugins, self._progress = record, plugins, progress
        layout = record.model.layout
        if layout is None:
            raise RunError(f"The record of the run does not say how {record.model.name or 'its model'} is laid out.")
        self._projections = {layout.projection.format(layer): layer for layer in range(layout.num_layers)}
        self._shape = (layout.d_model, layout.d_ff)
        self._in_out = layout.orientation == "in_out"

    def layer(self, name: str) -> int | None:
        """The index of the block whose MLP output projection has that weight; ``None`` for any other weight."""
        return self._projections.get(name.removesuffix(".weight"))

    def ends(self, name: str) -> tuple[Target, ...]:
        """The modules that need an adapter if a weight changes; the module that names the weight comes first.

        Raises:
            RunError: the model is not the run's any more.
            ModelError: an adapter cannot change that weight.
        """
        if self.layer(name) is not None:
            kind: Literal["conv1d", "linear"] = "conv1d" if self._in_out else "linear"
            return (Target(path=name.removesuffix(".weight"), shape=self._shape, kind=kind),)
        self.model.weight(name)  # refuses what is not there
        return self._targets.of_weight(name)

    def metric(self, layer: int) -> Metric:
        """Second moment of the inputs of a block's MLP output projection.

        Raises:
            RunError: the model is not the run's any more.
        """
        store = statistics_of(self._record.config, self.model, progress=self._progress)
        return store.metrics([layer])[layer]

    @cached_property
    def model(self) -> LanguageModel:
        """The model itself.

        Raises:
            RunError: the model is not the run's any more.
        """
        config = self._record.config
        model = LanguageModel.load(
            self._record.source,
            LoadOptions(device=config.device, dtype=config.dtype),
            families=(self._plugins or Plugins.load()).family_paths(),
            progress=self._progress,
        )
        self._record.check(model)
        return model

    @cached_property
    def _targets(self) -> Targets:
        return Targets(self.model.hf)


def _reduce_all(
    entries: Sequence[LedgerEntry], names: Sequence[str], hparams: LoraHParams, base: LazyBase
) -> dict[str, Reduction]:
    """What the adapter keeps at each weight, by name."""
    modules = {}
    for name in names:
        layer = base.layer(name)
        modules[name] = reduce(
            [factored(entry.changes[name]) for entry in entries if name in entry.changes],
            hparams,
            None if layer is None else partial(base.metric, layer),
            name=name,
        )
    unpriced = [name for name, reduction in modules.items() if reduction.kept_weighted is None]
    if unpriced and (warning := without_moment(hparams, unpriced[0])):
        _log.warning("lora: %s", warning)
    return modules


def _adapter(
    record: RunRecord, modules: Mapping[str, Reduction], ends: Mapping[str, Sequence[Target]], *, scale: float
) -> Adapter:
    """The adapter that makes the given changes of weights, each at all modules that have the weight.

    Args:
        ends: by weight name, the modules that have that weight.
    """
    factors, embeddings = {}, set()
    for name, reduction in modules.items():
        delta = FactoredDelta(reduction.delta.left * scale, reduction.delta.right)
        for end in ends[name]:
            factors[end.path] = seen_from(delta, ends[name][0], end)
            if end.kind == "embedding":
                embeddings.add(end.path)
    hub = record.model.hub
    return Adapter(
        factors=factors,
        base_model=record.source,
        base_hub=None if hub is None else hub.id,
        base_revision=None if hub is None else hub.revision,
        base_fingerprint=record.model.fingerprint,
        in_out=any(end.kind == "conv1d" for targets in ends.values() for end in targets),
        embeddings=frozenset(embeddings),
    )


def _served_rank(rank: int) -> int:
    found = next((served for served in VLLM_RANKS if served >= rank), None)
    if found is None:
        raise HParamsError(
            f"The edits need rank {rank}, and vLLM serves {VLLM_RANKS[-1]} at the most. Bound it with --rank "
            f"{VLLM_RANKS[-1]}, which keeps what matters most on ordinary text, or write the whole model with --format "
            "merged."
        )
    return found


def _write_edits(folder: Path, run: Path, record: RunRecord, ledger: Ledger, hparams: LoraHParams) -> None:
    """Write the run directory inside the adapter's folder, from which 'editctl import' takes the edits."""
    inside = folder / EDITS_FOLDER
    entries = ledger.history()
    assert ledger.header is not None
    write_ledger(inside, entries, ledger.header)
    active = {entry.batch: {request.id for request in entry.requests} for entry in entries}
    known = set().union(*active.values())
    facts = [record_text(fact) for fact in recorded_facts(run) if fact.request.id in known]
    write_text(inside / REQUESTS_NAME, "".join(f"{line}\n" for line in facts))
    write_batches(
        inside,
        [
            line.model_copy(
                update={
                    "evidence": tuple(
                        evidence for evidence in line.evidence if evidence.request_id in active[line.batch]
                    )
                }
            )
            for line in read_batches(run)
            if line.batch in active
        ],
    )
    exported = ExportedRecord(
        **{name: getattr(record, name) for name in record.model_fields_set},
        exported=ExportedAs(adapter_sha256=hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()),
    )
    exported.model_copy(
        update={
            "config": record.config.model_copy(update={"backend": "lora"}),
            "settings": {**record.settings, "lora": hparams.model_dump(mode="json")},
        }
    ).write(inside)


def recorded_facts(run: Path) -> list[FactRecord]:
    """The facts that the run was asked to edit; empty for a run of an imported adapter, whose facts are not known."""
    return read_requests(run) if (run / REQUESTS_NAME).exists() else []
