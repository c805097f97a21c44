"""The README of an adapter: which base, which edits, and how well they were written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from editcore import EditRequest, LedgerEntry
from editcore.models import CATALOGUE
from editcore.runs import RunRecord

from edit_lora.reduction import Reduction

__all__ = ["model_card"]

_ROWS = 200
"""Facts listed; a card is for reading."""


def model_card(
    record: RunRecord,
    entries: Sequence[LedgerEntry],
    modules: Mapping[str, Reduction],
    *,
    rank: int,
    shared: Sequence[str] = (),
    begun: Collection[str],
    title: str,
) -> str:
    """Markdown with the front matter that hubs read.

    Args:
        modules: by weight name.
        shared: paths of modules that have one weight between them and an adapter each.
        begun: ids of what the run was asked to edit; what is active beside it was added by sessions.
    """
    hub, folder = record.model.hub, record.model.folder
    base = hub.id if hub is not None else Path(folder).name if folder is not None else record.config.model
    revision = hub.revision if hub is not None else None
    where = f'"{base}"' + (f', revision="{revision}"' if revision else "")
    of_catalogue = folder is None and record.config.model in CATALOGUE
    facts = [(request, entry) for entry in entries for request in entry.new_requests]
    rows = [
        f"| {_cell(one.text)} | {_cell(one.target_new)} | {_probability(entry, one)} |" for one, entry in facts[:_ROWS]
    ]
    own = sum(one.id in begun for one, _ in facts)
    more = f" and {len(facts) - own} more" if own < len(facts) else ""
    unlisted = [f"\n{len(facts) - _ROWS} more are in `edits/ledger.jsonl`."] if len(facts) > _ROWS else []
    return "\n".join(
        [
            "---",
            *([f"base_model: {base}"] if hub is not None else []),
            "library_name: peft",
            "pipeline_tag: text-generation",
            "tags:",
            *([f"- base_model:adapter:{base}"] if hub is not None else []),
            "- lora",
            "- knowledge-editing",
            "---",
            "",
            f"# {title}",
            "",
            f"{len(facts)} edited facts for {base}, as a LoRA adapter.",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({where})",
            f'model = PeftModel.from_pretrained(base, "{title}")',
            "```",
            "",
            "| | |",
            "|---|---|",
            f"| base model | {base} |",
            *([f"| its revision | {revision} |"] if revision else []),
            *([f"| its name in editcore | {record.config.model} |"] if of_catalogue else []),
            f"| its fingerprint | `{record.model.fingerprint}` |",
            f"| its type | {record.config.dtype} |",
            f"| editor | {record.config.editor} |",
            f"| facts | {own} of {_cell(record.data)}{more} |",
            f"| batches | {len(entries)} |",
            f"| rank | {rank} |",
            f"| edited weights | {', '.join(f'`{name}`' for name in modules)} |",
            f"| kept of the edits | {_kept(modules)} |",
            f"| made with | {_versions()} |",
            "",
            "The adapter is a difference to exactly those weights; on other ones, a quantised copy included, it does",
            "less. `edits/` holds the edits one by one, for `editctl import`; peft does not read it.",
            "",
            *(_on_catalogue(record.config.model, base) if of_catalogue else []),
            *_on_shared(shared),
            "## Edits",
            "",
            "Probability: of the target's tokens while the fact was solved, in the mean over contexts.",
            "",
            "| prompt | answer | probability |",
            "|---|---|---|",
            *(rows or ["| (unknown) | | |"]),
            *unlisted,
            "",
        ]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _probability(entry: LedgerEntry, request: EditRequest) -> str:
    found = (one.figures for one in entry.evidence if one.request_id == request.id)
    value = next(found, {}).get("target_probability")
    return "-" if value is None else f"{value:.2f}"


def _on_shared(paths: Sequence[str]) -> list[str]:
    if not paths:
        return []
    return [
        f"In the base, {' and '.join(f'`{path}`' for path in paths)} are one weight. The adapter changes each of them,",
        "so peft must not merge it: `merge_and_unload` would write the change once for each. `editctl export --format",
        "merged` and `editctl adapters merge` write it once.",
        "",
    ]


def _on_catalogue(name: str, base: str) -> list[str]:
    return [
        f"It was made on `{name}`, whose weights are a quantised copy of {base}, widened again. `editctl models pull",
        f"{name}` gives the folder with exactly those weights.",
        "",
    ]


def _kept(modules: Mapping[str, Reduction]) -> str:
    if all(one.whole for one in modules.values()):
        return "all: exact to float32 rounding"
    if any(one.kept_weighted is None for one in modules.values()):
        worst = min(modules.values(), key=lambda one: one.kept_frobenius)
    else:
        worst = min(modules.values(), key=lambda one: one.kept_weighted or 0.0)
    shares = (
        (worst.kept_weighted, "on ordinary text"),
        (worst.kept_keys, "at the edited keys"),
        (worst.kept_frobenius, "of ‖Δ‖²"),
    )
    told = ", ".join(f"{share:.1%} {where}" for share, where in shares if share is not None)
    return f"rank {worst.delta.rank} of {worst.exact_rank}: {told}"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("editcore", "edit-lora", "peft", "transformers"))
