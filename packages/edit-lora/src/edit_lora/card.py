"""The README of an adapter: which base, which edits, and how well they were written.

Its text is in ``card.md.jinja``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path

from editcore import EditRequest, LedgerEntry
from editcore.evaluation import shown
from editcore.models import CATALOGUE, CatalogueEntry
from editcore.runs import RunRecord, RunSummary, is_finished
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from edit_lora.reduction import Reduction

__all__ = ["VLLM_RANKS", "AdapterCard", "Check"]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``--max-lora-rank``, except 1 (``vllm.config.lora.MaxLoRARanks``)."""
_MAX_ROWS = 200
"""The most facts that a card lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One metric of the run."""

    label: str
    meaning: str
    unit: str
    before: float | None
    """Of the unedited model."""
    after: float | None
    """Of the edited one."""

    @classmethod
    def all_of(cls, run: Path, edits: int) -> list[Check]:
        """The metrics that a run shows; none if it was not measured with the facts that are active now.

        Args:
            edits: how many these are.
        """
        if not is_finished(run):
            return []
        summary = RunSummary.read(run)
        if summary.edits != edits:
            return []
        known = [key for key, value in summary.after.items() if value is not None]
        return [
            cls(
                label=measure.label,
                meaning=measure.meaning,
                unit=measure.unit,
                before=summary.before.get(measure.key),
                after=summary.after[measure.key],
            )
            for measure in shown(summary.metrics, known)
            if measure.key in known
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """What an adapter's README says."""

    title: str
    record: RunRecord
    """The record of the run whose edits the adapter has."""
    entries: Sequence[LedgerEntry]
    """The active batches."""
    begun: Collection[str]
    """Ids of the facts that the run was asked to edit. Other active facts were added by sessions."""
    modules: Mapping[str, Reduction]
    """What the adapter keeps at each weight, by weight name."""
    rank: int
    """The rank in the files."""
    shared: Sequence[str] = ()
    """Paths of modules that share a weight: each has an adapter of its own."""
    checks: Sequence[Check] = ()
    """What the run measured."""

    def text(self) -> str:
        """Markdown, with the front matter that hubs read."""
        record, config = self.record, self.record.config
        hub, folder = record.model.hub, record.model.folder
        base = hub.id if hub is not None else Path(folder).name if folder is not None else config.model
        entry = CATALOGUE.get(config.model) if folder is None else None
        facts = [(request, entry) for entry in self.entries for request in entry.new_requests]
        return _template().render(
            front_matter=_front_matter(base if hub is not None else None, entry),
            title=self.title,
            base=base,
            on_hub=hub is not None,
            revision=hub.revision if hub is not None else None,
            entry=entry,
            checks=self.checks,
            fingerprint=record.model.fingerprint,
            dtype=config.dtype,
            editor=config.editor,
            data=record.data,
            num_facts=len(facts),
            num_own=sum(request.id in self.begun for request, _ in facts),
            num_batches=len(self.entries),
            rank=self.rank,
            vllm_rank=next((served for served in VLLM_RANKS if served >= self.rank), None),
            in_out=record.model.layout is not None and record.model.layout.orientation == "in_out",
            weights=list(self.modules),
            kept=_kept(self.modules),
            versions=", ".join(f"{name} {version(name)}" for name in _PACKAGES),
            shared=self.shared,
            rows=[_row(request, entry) for request, entry in facts[:_MAX_ROWS]],
            num_unlisted=max(0, len(facts) - _MAX_ROWS),
        )


_PACKAGES = ("editcore", "edit-lora", "peft", "transformers")


def _template() -> Template:
    text = resources.files("edit_lora").joinpath("card.md.jinja").read_text(encoding="utf-8")
    # Markdown, no HTML: nothing is escaped but what would end a cell of a table.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters["cell"] = _cell
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.1f}"
    return environment.from_string(text)


_LICENCES = {"Apache-2.0": "apache-2.0", "Gemma Terms of Use": "gemma"}
"""By the name in the catalogue: what hubs call the licence."""


def _front_matter(hub_id: str | None, entry: CatalogueEntry | None) -> str:
    """The front matter in YAML.

    Args:
        hub_id: the base's name on the hub; ``None`` for one that is not there.
        entry: the base in the catalogue.
    """
    tags = [*([f"base_model:adapter:{hub_id}"] if hub_id else []), "lora", "knowledge-editing"]
    data = ModelCardData(
        base_model=hub_id,
        license=None if entry is None else _LICENCES.get(entry.licence),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return str(data.to_yaml())


def _row(request: EditRequest, entry: LedgerEntry) -> Mapping[str, str]:
    figures = next((evidence.figures for evidence in entry.evidence if evidence.request_id == request.id), {})
    probability = figures.get("target_probability")
    return {
        "prompt": request.text,
        "answer": request.target_new,
        "probability": "-" if probability is None else f"{probability:.2f}",
    }


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _kept(modules: Mapping[str, Reduction]) -> str:
    """How much of the edits the adapter keeps, at the weight where it keeps least."""
    if all(reduction.whole for reduction in modules.values()):
        return "all: exact to float32 rounding"
    if any(reduction.kept_weighted is None for reduction in modules.values()):
        worst = min(modules.values(), key=lambda reduction: reduction.kept_frobenius)
    else:
        worst = min(modules.values(), key=lambda reduction: reduction.kept_weighted or 0.0)
    shares = (
        (worst.kept_weighted, "on ordinary text"),
        (worst.kept_keys, "at the edited keys"),
        (worst.kept_frobenius, "of ‖Δ‖²"),
    )
    kept = ", ".join(f"{share:.1%} {where}" for share, where in shares if share is not None)
    return f"rank {worst.delta.rank} of {worst.exact_rank}: {kept}"
