"""What a report says of a run, in the order in which a reader asks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore.evaluation import Summary, summarize_frame
from editcore.figures.scores import per_relation_figure, summary_figure
from editcore.figures.style import png
from editcore.interfaces.values import FactRecord, RejectedRequest
from editcore.report.cells import between, change, counted, number, records_table, seconds
from editcore.report.document import (
    Block,
    Cell,
    Code,
    Column,
    Document,
    Notice,
    Paragraph,
    Picture,
    Row,
    Section,
    Table,
    Tile,
    Tiles,
    one_line,
)
from editcore.report.results import RunResults
from editcore.runs.results import FIGURES_NAME
from editcore.settings.hparams import toml_lines

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["run_report", "saved_pictures"]

_SHARES: Mapping[str, str] = {
    "ES": "Efficacy (ES)",
    "PS": "Paraphrase (PS)",
    "NS": "Neighbourhood (NS)",
    "score": "Score",
}
_METRICS: Mapping[str, str] = {
    **_SHARES,
    "EM": "Efficacy magnitude (EM)",
    "PM": "Paraphrase magnitude (PM)",
    "NM": "Neighbourhood magnitude (NM)",
    "rewrite_acc": "Rewrite accuracy",
    "paraphrase_acc": "Paraphrase accuracy",
    "neighborhood_acc": "Neighbourhood accuracy",
}
_MEANING = (
    "Efficacy (ES) and paraphrase (PS) are the share of prompts after which the new object is likelier than the true "
    "one, neighbourhood (NS) the share of prompts about other subjects after which their true object is still the "
    "likelier one. The score is the harmonic mean of the three. Magnitudes are by how much, as a difference of "
    "probabilities per token; accuracies say how often the wanted object is what the model says. All are in percent, "
    "higher is better, averaged within each fact first; intervals are 95 % over facts."
)
_KINDS = ("rewrite", "paraphrase", "neighborhood")
_CHECKPOINT: Mapping[str, str] = {
    "num_edits": "facts edited",
    "facts": "facts measured",
    "ES": "ES (%)",
    "PS": "PS (%)",
    "NS": "NS (%)",
    "score": "score (%)",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity, times the unedited model's",
    "relative_change": "‖ΔW‖/‖W‖",
    "seconds": "seconds",
}
_AGES: Mapping[str, str] = {
    "first": "age from",
    "last": "to",
    "age": "mean age",
    "facts": "facts",
    "retention": "retention (%)",
    "interval": "95 % interval",
}
_CURVE = "forgetting_curve"
_PLACED = ("summary", "relations_ES", "relations_PS", "relations_NS", _CURVE)
"""Figures that have their place in another section."""


def run_report(directory: Path, *, writer: str) -> Document:
    """The report of a finished run.

    Raises:
        RunError: the run is not finished, or a file is missing or damaged.
    """
    run = RunResults.read(directory)
    before, after = (summarize_frame(run.phase(name)) for name in ("before", "after"))
    title = run.record.config.title(run.summary.edits)
    saved = {one.name: one for one in saved_pictures(directory / FIGURES_NAME)}
    sections = [
        Section("Summary", [*_notices(run), *_headline(run, before, after, title)]),
        Section("Relations", list(_relations(run))),
        Section("Forgetting", list(_forgetting(run, saved))),
        Section("Gates", list(_gates(run))),
        Section("Facts", [_facts(run)]),
        Section("Generations", [_generations(run)]),
        Section("Batches", list(_batches(run))),
        Section("Cost", list(_cost(run))),
        Section("More figures", [one for name, one in saved.items() if name not in _PLACED]),
        Section("Settings", list(_settings(run))),
        Section("Reproduce", list(_reproduce(run))),
        Section("Notes", [Paragraph(note) for note in _notes(run)]),
    ]
    return Document(
        title=title,
        lead=_lead(run),
        sections=[section for section in sections if section.blocks],
        writer=writer,
    )


def _lead(run: RunResults) -> str:
    config = run.record.config
    extensions = f", with {' and '.join(config.plugins)}" if config.plugins else ""
    started = run.record.machine.get("started", "")
    when = f" The run began on {started[:10]} at {started[11:16]} UTC." if started else ""
    return (
        f"{counted(run.summary.edits, 'fact')} of {Path(config.dataset).name} written into {Path(config.model).name} "
        f"by {config.editor}{extensions}, {config.batch_size} at a time.{when}"
    )


# Summary


def _notices(run: RunResults) -> Iterator[Block]:
    if run.is_older_than_ledger:
        yield Notice(
            "The measurements are older than the ledger: edits were undone or redone after the facts were measured. "
            "The table of facts has what is active now."
        )
    if run.ledger.note:
        yield Notice(run.ledger.note)


def _headline(run: RunResults, before: Summary, after: Summary, title: str) -> Iterator[Block]:
    values = after.percentages(), before.percentages()
    yield Tiles(
        [
            Tile(name=name, value=number(values[0].get(key)).text, note=f"before: {number(values[1].get(key)).text}")
            for key, name in _SHARES.items()
        ]
    )
    yield Paragraph(_in_words(before, after))
    if run.summary.rejected:
        yield Paragraph(f"{counted(run.summary.rejected, 'fact')} were refused by a gate and not written.")
    yield _metrics(before, after)
    yield Paragraph(_MEANING)
    yield Picture(name="summary", png=png(summary_figure(before, after, title=title)), alt=_summary_alt(before, after))


def _in_words(before: Summary, after: Summary) -> str:
    sentences = [
        ("ES", "After {value} of the edited prompts the new object wins over the true one"),
        ("PS", "after {value} of their paraphrases"),
        ("NS", "and of the prompts about other subjects {value} keep their true object"),
    ]
    parts = []
    for name, words in sentences:
        if (metric := after.metrics.get(name)) is not None:
            low, high = metric.interval
            was = f", {before.metrics[name].mean:.1f} % before" if name in before.metrics else ""
            parts.append(words.format(value=f"{metric.mean:.1f} %") + f" (95 % interval {low:.1f} to {high:.1f}{was})")
    if not parts:
        return "Nothing could be compared: the facts have no true object."
    return f"{'; '.join(parts)}.".replace(" %", "\u00a0%")  # a number stays with its sign at the end of a line


def _metrics(before: Summary, after: Summary) -> Table:
    old, new = before.percentages(), after.percentages()
    rows: list[Row] = []
    for key, name in _METRICS.items():
        if key not in old and key not in new:
            continue
        values = [number(one.get(key)) for one in (old, new)]
        ends = [between(one.metrics[key].interval if key in one.metrics else None) for one in (before, after)]
        gain = new.get(key, math.nan) - old.get(key, math.nan)
        shown = number(gain) if math.isnan(gain) else Cell(f"{gain:+.1f}", order=gain)
        rows.append([name, values[0], ends[0], values[1], ends[1], shown])
    heads = ("before", "95 % interval", "after", "95 % interval", "change")
    return Table(
        caption=f"Percent; {counted(before.cases, 'fact')} measured before, {counted(after.cases, 'fact')} after",
        columns=[Column("measure"), *(Column(head, number=True) for head in heads)],
        rows=rows,
    )


def _summary_alt(before: Summary, after: Summary) -> str:
    old, new = before.percentages(), after.percentages()
    pairs = [
        f"{name} {number(old.get(key)).text} before and {number(new.get(key)).text} after"
        for key, name in _SHARES.items()
    ]
    return f"Bars, in percent: {'; '.join(pairs)}."


# Relations


def _relations(run: RunResults) -> Iterator[Block]:
    before, after = ({str(name): part for name, part in run.phase(one).groupby("relation")} for one in _PHASES)
    if not after:
        return
    old, new = (
        {name: summarize_frame(part) for name, part in parts.items() if name in after} for parts in (before, after)
    )
    for metric in ("ES", "PS", "NS"):
        if any(metric in one.metrics for one in new.values()):
            figure = per_relation_figure(old, new, metric=metric, title=f"{_SHARES[metric]} by relation")
            yield Picture(
                name=f"relations_{metric}",
                png=png(figure),
                alt=f"{_SHARES[metric]} of each relation before and after, in percent; the table has the numbers.",
            )
    yield Table(
        caption="Percent before → after, by relation",
        columns=[Column("relation"), Column("facts", number=True), *(Column(n, number=True) for n in _SHARES.values())],
        rows=[
            [
                name,
                Cell(str(one.cases), order=one.cases),
                *(change(old[name].percentages().get(key), one.percentages().get(key)) for key in _SHARES),
            ]
            for name, one in sorted(new.items())
        ],
    )


_PHASES = ("before", "after")


# Forgetting


def _forgetting(run: RunResults, saved: Mapping[str, Picture]) -> Iterator[Block]:
    if not run.summary.checkpoints:
        return
    if _CURVE in saved:
        yield saved[_CURVE]
    facts = run.summary.forgetting
    sentences = []
    if facts.get("half_life") is not None:
        sentences.append(f"Half of the first efficacy is gone {facts['half_life']:g} facts later (half-life).")
    elif "half_life" in facts:
        sentences.append("Efficacy never fell to half of what it was: there is no half-life.")
    if facts.get("auc") is not None:
        sentences.append(f"Mean retention over ages, the area under the curve, is {facts['auc']:.1f} %.")
    if sentences:
        yield Paragraph(" ".join(sentences))
    rows = [
        {**one, "relative_change": _largest(one.get("relative_change"))} if "relative_change" in one else one
        for one in run.summary.checkpoints
    ]
    yield records_table("All facts edited so far, measured again at each checkpoint", rows, names=_CHECKPOINT)
    bins = facts.get("retention_by_age")
    if isinstance(bins, list) and bins and all(isinstance(one, Mapping) for one in bins):
        yield records_table("Retention by age, in facts edited since a fact was", bins, names=_AGES)


def _largest(by_weight: Any) -> Any:
    """Of a figure for each weight, the largest."""
    if not isinstance(by_weight, Mapping):
        return by_weight
    return max((value for value in by_weight.values() if value is not None), default=None)


# Gates


def _gates(run: RunResults) -> Iterator[Block]:
    verdicts = [
        {
            "batch": entry.batch,
            "by": name,
            "action": verdict.action if verdict.action != "scale" else f"scale by {verdict.scale:.3g}",
            "reason": verdict.reason,
            "figures": _figures(verdict.figures),
        }
        for entry in run.ledger.batches
        for name, verdict in entry.verdicts.items()
    ]
    if verdicts:
        names = {"batch": "batch", "by": "judged by", "action": "verdict", "reason": "reason", "figures": "figures"}
        yield records_table("Verdicts on batches, before they were written", verdicts, names=names, page_only=True)
    if run.refusals:
        yield Table(
            caption="Refused facts: not written into the model",
            columns=[
                Column("id"),
                Column("prompt"),
                Column("edit to"),
                Column("batch", number=True),
                Column("by"),
                Column("reason"),
                Column("figures"),
            ],
            rows=[_refusal(batch, one) for batch, one in run.refusals],
            search=len(run.refusals) > _SEARCHED,
        )


_SEARCHED = 12
"""Rows from which a table has a field to search in."""


def _refusal(batch: int, one: RejectedRequest) -> Row:
    first = (one.request.id, one.request.text, one.request.target_new)
    last = (one.by, one.reason, _figures(one.figures))
    return [*map(one_line, first), Cell(str(batch), order=batch), *map(one_line, last)]


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {one_line(value)}" for name, value in figures.items())


# Facts


def _facts(run: RunResults) -> Table:
    old, new = (_by_fact(run.phase(name)) for name in _PHASES)
    states = {name: (batch, state) for (batch, name), state in run.ledger.states().items()}
    numbers = ("batch", "ES", "PS", "NS", "p(new)", "p(true)")
    texts = ("subject", "prompt", "edited to", "instead of", "relation", "state")
    return Table(
        caption=(
            "Every fact. ES, PS and NS in percent of the fact's prompts, before → after; p is the probability per "
            "token of the new and the true object after the edited prompt, before → after."
        ),
        columns=[*map(Column, texts), *(Column(name, number=True) for name in numbers)],
        rows=[_fact(one, old, new, states) for one in run.facts],
        search=True,
        page_only=True,
    )


Scores = Mapping[tuple[str, str], Mapping[str, float]]


def _by_fact(frame: pd.DataFrame) -> Scores:
    """The numbers of a phase by fact and kind of prompt."""
    columns = ["success", "nll_new", "nll_true"]
    rows = zip(frame["case_id"], frame["kind"], frame[columns].to_numpy(dtype=float), strict=True)
    return {(str(case), str(kind)): dict(zip(columns, map(float, row), strict=True)) for case, kind, row in rows}


def _fact(
    fact: FactRecord,
    old: Scores,
    new: Scores,
    states: Mapping[str, tuple[int, str]],
) -> Row:
    request = fact.request
    batch, state = states.get(request.id, (None, "waiting"))

    def find(scores: Scores, column: str, kind: str = "rewrite") -> float:
        return scores.get((request.id, kind), {}).get(column, math.nan)

    shares = [change(100 * find(old, "success", kind), 100 * find(new, "success", kind)) for kind in _KINDS]
    if state == "active" and find(new, "success") == 0:
        shares[0] = Cell(f"{shares[0].text} lost", order=shares[0].order, tone="bad")
    # exp of the mean log-likelihood: the geometric mean over the object's tokens.
    chances = [
        change(math.exp(-find(old, column)), math.exp(-find(new, column)), 3) for column in ("nll_new", "nll_true")
    ]
    return [
        one_line(request.subject),
        one_line(request.text),
        one_line(request.target_new),
        one_line(request.target_true or ""),
        one_line(fact.relation or ""),
        Cell("refused" if state == "rejected" else state, tone="" if state == "active" else "bad"),
        Cell("", order=math.nan) if batch is None else Cell(str(batch), order=batch),
        *shares,
        *chances,
    ]


# Generations, batches, cost


def _generations(run: RunResults) -> Table:
    return Table(
        caption="What the model says, greedily, after the first prompts",
        columns=[Column("prompt"), Column("edited to"), Column("before"), Column("after")],
        rows=[[one_line(text) for text in (s.prompt, s.target_new, s.before, s.after)] for s in run.summary.samples],
    )


def _batches(run: RunResults) -> Iterator[Block]:
    rows = []
    for entry in run.ledger.batches:
        undone = len(run.ledger.undone(entry.batch))
        rows.append(
            {
                "batch": entry.batch,
                "state": run.ledger.state(entry),
                "new": entry.num_new,
                "undone": undone,
                "replayed": len(entry.requests) - entry.num_new,
                "scale": entry.scale,
                "reason": entry.reason,
                "notes": "; ".join(entry.notes),
                **entry.diagnostics,
            }
        )
    spare = {key for key, nothing in _NOTHING.items() if all(row[key] == nothing for row in rows)}
    shown = [{key: value for key, value in row.items() if key not in spare} for row in rows]
    if shown:
        yield records_table(
            "Batches in the order in which they were written, with the editor's diagnostics",
            shown,
            names={},
            search=len(shown) > _SEARCHED,
            page_only=True,
        )


_NOTHING: Mapping[str, object] = {"undone": 0, "replayed": 0, "scale": 1.0, "reason": "", "notes": ""}


def _cost(run: RunResults) -> Iterator[Block]:
    summary = run.summary
    per_edit = "" if summary.seconds_per_edit is None else f"{summary.seconds_per_edit:.2f} s per edit; "
    yield Paragraph(f"{per_edit}{summary.peak_memory_bytes / 2**30:.2f} GiB of memory at most.")
    times = {name: value or 0.0 for name, value in summary.seconds.items()}
    times["all"] = sum(times.values())
    yield Table(
        caption="Wall time by stage",
        columns=[Column("stage"), Column("time", number=True)],
        rows=[[name, Cell(seconds(value), order=value)] for name, value in times.items()],
    )
    counts = [
        [owner, name.replace("_", " "), one_line("" if value is None else value)]
        for owner, counted_by in summary.extensions.items()
        for name, value in counted_by.items()
    ]
    if counts:
        yield Table(
            caption="What extensions and the backend count about themselves",
            columns=[Column("by"), Column("what"), Column("value")],
            rows=counts,
        )


# Settings, and how to make it again


def _settings(run: RunResults) -> Iterator[Block]:
    config = run.record.config.model_dump(mode="json", exclude={"settings"})
    parts = {"run": config, **run.record.settings}
    yield Table(
        caption="Every setting, with presets and defaults resolved",
        columns=[Column("setting"), Column("value"), Column("of")],
        rows=[
            [name, one_line(_shown(value)), owner] for owner, values in parts.items() for name, value in values.items()
        ],
        search=True,
        page_only=True,
    )


def _shown(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(one_line(_shown(part)) for part in value) or "none"
    return "none" if value is None else value


def _reproduce(run: RunResults) -> Iterator[Block]:
    record = run.record
    if record.command:
        yield Paragraph("The run was started with:")
        yield Code(record.command)
    else:
        yield Paragraph("The run was made from Python.")
    yield Paragraph(
        "With this file, whatever the presets and defaults are by then, the command after it does the same again:"
    )
    values = record.config.model_dump(mode="json", exclude={"settings", "preset"})
    tables = "".join(f"\n[{name}]\n{toml_lines(given)}" for name, given in record.settings.items() if given)
    options = {name: value for name, value in values.items() if value not in (None, [])}
    yield Code(f"# run.toml\n{toml_lines(options)}{tables}".rstrip())
    yield Code("editctl run --config run.toml")
    rows = [
        ("model", str(record.model.get("name", record.config.model))),
        ("fingerprint of its weights", str(record.model["fingerprint"])),
        *((name, value) for name, value in record.machine.items()),
        *record.versions.items(),
    ]
    yield Table(
        caption="What it was made with",
        columns=[Column("what"), Column("which")],
        rows=[[one_line(name), one_line(value)] for name, value in rows],
    )


def _notes(run: RunResults) -> Sequence[str]:
    return list(dict.fromkeys([*run.record.notes, *run.summary.notes]))


# Figures that are there already


_NAME = re.compile(r"[\w.+-]{1,80}")
_CAPTIONS: Mapping[str, str] = {_CURVE: "The forgetting curve: what is left of earlier edits as more are made."}


def saved_pictures(folder: Path) -> list[Picture]:
    """The PNG files of a folder, by name."""
    found = []
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        content = path.read_bytes()
        if content.startswith(b"\x89PNG\r\n\x1a\n") and _NAME.fullmatch(path.stem):
            words = path.stem.replace("_", " ")
            found.append(Picture(name=path.stem, png=content, alt=_CAPTIONS.get(path.stem, f"Figure: {words}.")))
    return found
