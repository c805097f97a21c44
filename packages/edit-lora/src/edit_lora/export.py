"""A run's edits as a standard adapter folder, or as a whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from editcore import FactoredDelta, HParamsError, LanguageModel, Plugins, Progress, RunError
from editcore.interfaces import LedgerEntry, silent
from editcore.ledger import Ledger, write_ledger
from editcore.runs import RUN_NAME, RunRecord, json_text, making, open_run, statistics_of, write_text
from editcore.second_moments import Metric
from editcore.settings import build

from edit_lora.adapter import WEIGHTS_NAME, Adapter
from edit_lora.card import model_card
from edit_lora.factors import factored
from edit_lora.hparams import LoraHParams
from edit_lora.reduction import Reduction, reduce

__all__ = ["EDITS_FOLDER", "VLLM_RANKS", "Exported", "export_adapter", "export_merged"]

EDITS_FOLDER = "edits"
"""Inside an adapter folder: the run directory that it came from, with the active batches only. peft ignores it."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``, but for 1 (``vllm.config.lora.MaxLoRARanks``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote."""

    rank: int
    """Rank in the files."""
    modules: Mapping[str, Reduction]
    """By weight name: what its adapter keeps."""
    edits: int
    """Facts in it."""


def export_adapter(
    run: Path,
    out: Path,
    *,
    rank: int | None = None,
    criterion: str | None = None,
    pad_for: str | None = None,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write a folder that ``PeftModel.from_pretrained(base, out)`` loads, from the run's active edits, whatever backend
    they were made with.

    Args:
        rank: bound the rank; left out, as the run's own ``lora`` settings say, and exact without them.
        criterion: what a bounded rank keeps, as ``lora_criterion``.
        pad_for: zeros up to a rank that this engine serves.

    Raises:
        RunError: there is no run, or it has no active edits.
        HParamsError: no rank that the engine serves is large enough.
        StorageError: ``out`` is there already, or cannot be written.
    """
    record, ledger = RunRecord.read(run), Ledger.read(run)
    entries = ledger.history()
    if not any(entry.changes for entry in entries):
        raise RunError(f"{run} has no active edits; there is nothing to export.")
    hparams = _hparams(record, rank=rank, criterion=criterion)
    modules = _reduce_all(entries, hparams, _Moments(record, plugins, progress))
    adapter = Adapter(
        factors={
            name.removesuffix(".weight"): FactoredDelta(one.delta.left * hparams.lora_scale, one.delta.right)
            for name, one in modules.items()
        },
        base_model=record.source,
        base_fingerprint=record.model["fingerprint"],
        in_out=record.model["layout"]["orientation"] == "in_out",
    )
    written_rank = _served_rank(adapter.rank) if pad_for == "vllm" else adapter.rank
    with making(out) as folder:
        adapter.write(folder, rank=written_rank)
        _write_edits(folder, run, record, ledger, hparams)
        card = model_card(record, entries, modules, rank=written_rank, evidence=_evidence(run), title=out.name)
        write_text(folder / "README.md", card)
    return Exported(rank=written_rank, modules=modules, edits=sum(entry.num_new for entry in entries))


def export_merged(run: Path, out: Path, *, plugins: Plugins | None = None, progress: Progress = silent) -> None:
    """Write the run's edited model, edits in its weights, as a folder that ``from_pretrained`` loads.

    Raises:
        RunError: there is no run, or its model is not the one at hand.
        StorageError: ``out`` is there already, or cannot be written.
    """
    with making(out) as folder:
        edited, _ = open_run(run, plugins=plugins, progress=progress)
        edited.check_all_in_weights("merged")
        edited.save(folder)


def _hparams(record: RunRecord, *, rank: int | None = None, criterion: str | None = None) -> LoraHParams:
    """The settings that a run's adapter is made with: its own if its backend is this one, with what is given over them.

    A run that fell back to raw somewhere is exported with those projections exact.
    """
    own = dict(record.settings.get("lora", {})) if record.config.backend == "lora" else {}
    if rank is not None:
        own["lora_rank"] = rank
    if criterion is not None:
        own["lora_criterion"] = criterion
    return build(LoraHParams, [own], owner="lora")


class _Moments:
    """Second moments of the run's unedited model, which is loaded only if one is asked for."""

    def __init__(self, record: RunRecord, plugins: Plugins | None, progress: Progress) -> None:
        self._record, self._plugins, self._progress = record, plugins, progress
        self._model: LanguageModel | None = None

    def metric(self, name: str) -> Metric:
        """Of the inputs of a weight's module.

        Raises:
            RunError: the model is not the run's any more.
        """
        record, config = self._record, self._record.config
        if self._model is None:
            self._model = LanguageModel.load(
                record.source,
                device=config.device,
                dtype=config.dtype,
                families=(self._plugins or Plugins.load()).family_paths(),
                progress=self._progress,
            )
            record.check(self._model)
        layer = self._model.layout.layer_of(name)
        store = statistics_of(config, self._model, progress=self._progress)
        return store.metrics([layer])[layer]


def _reduce_all(entries: Sequence[LedgerEntry], hparams: LoraHParams, moments: _Moments) -> dict[str, Reduction]:
    names = sorted({name for entry in entries for name in entry.changes})
    return {
        name: reduce(
            [factored(entry.changes[name]) for entry in entries if name in entry.changes],
            hparams,
            partial(moments.metric, name),
            name=name,
        )
        for name in names
    }


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
    """The run directory inside the adapter's folder: what it takes to go on from the edits."""
    inside = folder / EDITS_FOLDER
    entries = ledger.history()
    assert ledger.header is not None
    write_ledger(inside, entries, ledger.header)
    active = {entry.batch: {request.id for request in entry.requests} for entry in entries}
    known = set().union(*active.values())
    records = [line for line in _lines(run / "requests.jsonl") if line["request"]["id"] in known]
    batches = [
        {**line, "evidence": [one for one in line["evidence"] if one["request_id"] in active[line["batch"]]]}
        for line in _lines(run / "batches.jsonl")
        if line["batch"] in active
    ]
    for name, lines in (("requests.jsonl", records), ("batches.jsonl", batches)):
        write_text(inside / name, "".join(f"{json_text(line)}\n" for line in lines))
    raw = json.loads((run / RUN_NAME).read_text(encoding="utf-8"))
    raw["config"]["backend"] = "lora"
    raw["settings"] = {**record.settings, "lora": hparams.model_dump(mode="json")}
    raw["exported"] = {"adapter_sha256": hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()}
    write_text(inside / RUN_NAME, json_text(raw, indent=2) + "\n")


def _evidence(run: Path) -> dict[str, dict[str, Any]]:
    """What was measured while each fact was written, by request id: the last one, of a fact edited twice."""
    lines = [line for line in _lines(run / "batches.jsonl") if line["applied"]]
    return {one["request_id"]: one for line in lines for one in line["evidence"] if not one["replayed"]}


def _lines(path: Path) -> list[dict[str, Any]]:
    """A log of a run; empty for a run that has none."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}.") from error
