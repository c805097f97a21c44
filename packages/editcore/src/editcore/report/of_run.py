"""What a report says of a run, in the order in which a reader asks."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.files import json_text
from editcore._util.words import counted, counted_of
from editcore.evaluation import Measure, Summary, retention_of, shown, summarize_frame
from editcore.figures.scores import per_relation_figure, summary_figure
from editcore.figures.style import png
from editcore.interfaces.metrics import HOLDS
from editcore.interfaces.values import FactRecord, RejectedRequest
from editcore.report.cells import between, change, number, quantity, records_table, seconds
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
from editcore.settings.presets import model_stem

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["run_report", "saved_pictures"]

_CHECKPOINT: Mapping[str, str] = {
    "num_edits": "facts edited",
    "facts": "facts measured",
}
_CHECKPOINT_COSTS: Mapping[str, str] = {
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
_PLACED = ("summary", _CURVE)
"""Figures that have their place in another section; so has every ``relations_METRIC``."""


def run_report(directory: Path, *, writer: str) -> Document:
    """The report of a finished run.

    Raises:
        RunError: the run is not finished, or a file is missing or damaged.
    """
    run = RunResults.read(directory)
    before, after = (summarize_frame(run.phase(name), run.summary.metrics) for name in _PHASES)
    edits, more = run.edits
    title = run.record.config.title(edits, data=run.record.data, more=more)
    saved = {one.name: one for one in saved_pictures(directory / FIGURES_NAME)}
    sections = [
        Section("Summary", [*_notices(run), *_headline(run, before, after, title)]),
        Section("Relations", list(_relations(run))),
        Section("Forgetting", list(_forgetting(run, saved))),
        Section("Gates", list(_gates(run))),
        Section("Facts", [_facts(run)]),
        Section("Generations", [_generations(run)]),
        Section("Batches", list(_batches(run))),
        Section("Counts", list(_counts(run))),
        Section("Cost", list(_cost(run))),
        Section(
            "More figures",
            [one for name, one in saved.items() if name not in {*_PLACED, *map(_relations_name, run.summary.metrics)}],
        ),
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
    config, (edits, more) = run.record.config, run.edits
    extensions = f", with {' and '.join(config.plugins)}" if config.plugins else ""
    started = run.record.machine.get("started", "")
    when = f" The run began on {started[:10]} at {started[11:16]} UTC." if started else ""
    together = "all together" if run.record.composed_of else f"{config.batch_size} at a time"
    return (
        f"{counted_of(edits, 'fact', run.record.data, more=more)} written into {model_stem(config.model)} "
        f"by {config.editor}{extensions}, {together}.{when}"
    )


# Summary


def _notices(run: RunResults) -> Iterator[Block]:
    if run.is_older_than_ledger:
        yield Notice(
            "The measurements are older than the ledger: edits were added, undone or redone after the facts were "
            "measured. The table of facts has what is active now."
        )
    if run.ledger.note:
        yield Notice(run.ledger.note)


def _headline(run: RunResults, before: Summary, after: Summary, title: str) -> Iterator[Block]:
    old, new = (
        {key: value for key, value in one.items() if value is not None}
        for one in (run.summary.before, run.summary.after)
    )
    told = [one for one in shown(run.summary.metrics, {**old, **new}) if one.key in old or one.key in new]
    if told:
        yield Tiles(
            [Tile(name=one.heading, value=_cell(one, new).text, note=f"before: {_cell(one, old).text}") for one in told]
        )
    yield Paragraph(_in_words(before, after))
    for one in run.summary.tallies:
        yield Paragraph(one_line(one.sentence()))
    if run.summary.rejected:
        yield Paragraph(f"{counted(run.summary.rejected, 'fact')} were refused by a gate and not written.")
    for evaluator in dict.fromkeys(one.evaluator for one in run.summary.metrics):
        if evaluator in before.facts or evaluator in after.facts:
            yield _metrics(evaluator, before, after, old, new)
    if told:
        figure = summary_figure(before, after, title=title)
        yield Picture(name="summary", png=png(figure), alt=_summary_alt(told, old, new))


def _cell(measure: Measure, values: Mapping[str, float]) -> Cell:
    return quantity(values.get(measure.key), measure)


def _in_words(before: Summary, after: Summary) -> str:
    old = before.values()
    parts = []
    for one in shown(after.measures, after.values()):
        if (ends := after.interval(one.key)) is not None:
            was = f"; {one.text(old[one.key])} before" if one.key in old else ""
            value, low, high = (one.text(end) for end in (after.value(one.key), *ends))
            unit = f" {one.unit}" if one.unit else ""
            parts.append(f"{one.label} {value}{unit} (95 % interval {low} to {high}{was})")
    if not parts:
        return "Nothing could be measured: no evaluator has a question that these facts answer."
    return f"{', '.join(parts)}.".replace(" %", "\u00a0%")  # a number stays with its sign at the end of a line


def _metrics(
    evaluator: str, before: Summary, after: Summary, old: Mapping[str, float], new: Mapping[str, float]
) -> Table:
    """What one evaluator measured, with what each metric says."""
    rows: list[Row] = []
    for one in after.measures:
        if one.evaluator != evaluator or one.show == "data" or (one.key not in old and one.key not in new):
            continue
        ends = [between(summary.interval(one.key), one.text) for summary in (before, after)]
        gain = new.get(one.key, math.nan) - old.get(one.key, math.nan)
        text = f"{gain:+.1f}" if one.percent else f"{gain:+.4g}"
        shown_gain = number(gain) if math.isnan(gain) else Cell(text, order=gain)
        better = "" if one.better == "higher" else " Lower is better."
        rows.append(
            [
                one.label, _cell(one, old), _cell(one, new), shown_gain, *ends, one.unit, _behind(one, after),
                one_line(f"{one.meaning}{better}"),
            ]
        )  # fmt: skip
    heads = ("before", "after", "change", "interval before", "interval after")
    facts = [counted(summary.facts.get(evaluator, 0), "fact") for summary in (before, after)]
    return Table(
        caption=(
            f"By the evaluator {evaluator}: {facts[0]} measured before, {facts[1]} after. Higher is better unless it "
            "says otherwise; intervals are of 95 %, over facts."
        ),
        columns=[
            Column("measure"), *(Column(head, number=True) for head in heads), Column("unit"),
            Column("facts", number=True), Column("what it says"),
        ],
        rows=rows,
    )  # fmt: skip


def _behind(measure: Measure, summary: Summary) -> Cell:
    """How many facts a mean is of."""
    averaged = summary.averages.get(measure.key)
    return Cell("", order=math.nan) if averaged is None else Cell(str(averaged.facts), order=averaged.facts)


def _summary_alt(told: Sequence[Measure], old: Mapping[str, float], new: Mapping[str, float]) -> str:
    pairs = [f"{one.label} {_cell(one, old).text} before and {_cell(one, new).text} after" for one in told]
    return f"Bars: {'; '.join(pairs)}."


# Relations


def _relations(run: RunResults) -> Iterator[Block]:
    before, after = ({str(name): part for name, part in run.phase(one).groupby("relation")} for one in _PHASES)
    if not after:
        return
    metrics = run.summary.metrics
    old, new = (
        {name: summarize_frame(part, metrics) for name, part in parts.items() if name in after}
        for parts in (before, after)
    )
    known = {key for part in new.values() for key in part.values()}
    told = [one for one in shown(metrics, known) if one.key in known]
    for one in told:
        if not one.of and one.share:
            yield Picture(
                name=_relations_name(one),
                png=png(per_relation_figure(old, new, measure=one, title=f"{one.label} by relation")),
                alt=f"{one.label} of each relation before and after, in percent; the table has the numbers.",
            )
    yield Table(
        caption="Before → after, by relation",
        columns=[Column("relation"), Column("facts", number=True), *(Column(n.heading, number=True) for n in told)],
        rows=[
            [
                name,
                Cell(str(facts := max(part.facts.values(), default=0)), order=facts),
                *(_changed(one, old.get(name), part) for one in told),
            ]
            for name, part in sorted(new.items())
        ],
    )


def _relations_name(measure: Measure) -> str:
    return f"relations_{measure.key}"


def _changed(measure: Measure, old: Summary | None, new: Summary) -> Cell:
    before = math.nan if old is None else old.value(measure.key)
    return change(before, new.value(measure.key), 0 if measure.percent else 2)


_PHASES = ("before", "after")


# Forgetting


def _forgetting(run: RunResults, saved: Mapping[str, Picture]) -> Iterator[Block]:
    if not run.summary.checkpoints:
        return
    if _CURVE in saved:
        yield saved[_CURVE]
    sentences = []
    found = run.summary.forgetting
    if found is not None and found.half_life is not None:
        sentences.append(f"Half of what was retained at first is gone {found.half_life:g} facts later (half-life).")
    elif found is not None and found.auc is not None:
        sentences.append("Retention never fell to half of what it was: there is no half-life.")
    if found is not None and found.auc is not None:
        sentences.append(f"Mean retention over ages, the area under the curve, is {found.auc:.1f} %.")
    if sentences:
        yield Paragraph(" ".join(sentences))
    checkpoints = run.summary.checkpoints
    measured = (run.summary.before, run.summary.after, *(checkpoint.values for checkpoint in checkpoints))
    known = {key for values in measured for key, value in values.items() if value is not None}
    metrics = shown(run.summary.metrics, known)
    rows = [
        {
            **checkpoint.model_dump(include={*_CHECKPOINT, *_CHECKPOINT_COSTS}),
            **{metric.key: checkpoint.values.get(metric.key) for metric in metrics},
            "relative_change": max(
                (change for change in checkpoint.relative_change.values() if change == change), default=None
            ),
        }
        for checkpoint in checkpoints
    ]
    names = {**_CHECKPOINT, **{metric.key: metric.heading for metric in metrics}, **_CHECKPOINT_COSTS}
    yield records_table("All facts edited so far, measured again at each checkpoint", rows, names=names)
    if found is not None and found.retention_by_age:
        bins = [age_bin.model_dump(mode="json") for age_bin in found.retention_by_age]
        yield records_table("Retention by age, in facts edited since a fact was", bins, names=_AGES)


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
    known = {key for means in (old, new) for values in means.values() for key in values}
    told = [one for one in shown(run.summary.metrics, known) if not one.of and one.key in known]
    holding = retention_of(run.summary.metrics, known)
    spoken = {one.metric for one in run.summary.tallies}
    states = {name: (batch, state) for (batch, name), state in run.ledger.states().items()}
    said = _said(run.phase("after"), spoken)
    texts = ["subject", "prompt", "edited to", "instead of", "relation", "state", *(["it says"] if said else [])]
    return Table(
        caption=(
            "Every fact: its own means of each measure, before → after. Where a measure is of a sample, the others "
            "have none."
        ),
        columns=[
            *map(Column, texts), Column("batch", number=True), *(Column(one.heading, number=True) for one in told),
        ],
        rows=[_fact(one, told, holding, old, new, said, states) for one in run.facts],
        search=True,
        page_only=True,
    )  # fmt: skip


Means = Mapping[str, Mapping[str, float]]
"""By request id, a fact's means by metric."""


def _by_fact(frame: pd.DataFrame) -> Means:
    found: dict[str, dict[str, float]] = {}
    means = frame.groupby(["request_id", "metric"], sort=False)["value"].mean().reset_index()
    for fact, metric, value in zip(means["request_id"], means["metric"], means["value"], strict=True):
        found.setdefault(str(fact), {})[str(metric)] = float(value)
    return found


def _said(frame: pd.DataFrame, metrics: Collection[str]) -> Mapping[str, str]:
    """By request id, what the model says after the edited prompt, where it was let speak."""
    rows = frame[frame["metric"].isin(list(metrics)) & frame["text"].notna()]
    return {str(fact): str(text) for fact, text in zip(rows["request_id"], rows["text"], strict=True)}


def _fact(
    fact: FactRecord,
    told: Sequence[Measure],
    holding: Measure | None,
    old: Means,
    new: Means,
    said: Mapping[str, str],
    states: Mapping[str, tuple[int, str]],
) -> Row:
    request = fact.request
    batch, state = states.get(request.id, (None, "waiting"))
    cells = []
    for one in told:
        values = (means.get(request.id, {}).get(one.key, math.nan) for means in (old, new))
        before, after = (100 * value if one.percent else value for value in values)
        cell = change(before, after, 0 if one.percent else 3)
        if one is holding and state == "active" and after < 100 * HOLDS:
            cell = Cell(f"{cell.text} lost", order=cell.order, tone="bad")
        cells.append(cell)
    return [
        one_line(request.subject),
        one_line(request.text),
        one_line(request.target_new),
        one_line(request.target_true or ""),
        one_line(fact.relation or ""),
        Cell("refused" if state == "rejected" else state, tone="" if state == "active" else "bad"),
        *([one_line(said.get(request.id, ""))] if said else []),
        Cell("", order=math.nan) if batch is None else Cell(str(batch), order=batch),
        *cells,
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


def _counts(run: RunResults) -> Iterator[Block]:
    counts = [
        [owner, name.replace("_", " "), one_line("" if value is None else value)]
        for owner, counted_by in run.summary.extensions.items()
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
    if isinstance(value, str) and value != one_line(value):  # a line break, say
        return json_text(value)
    return "none" if value is None else value


def _reproduce(run: RunResults) -> Iterator[Block]:
    record = run.record
    if record.command:
        yield Paragraph("The run was started with:")
        yield Code(record.command)
    else:
        yield Paragraph("The run was made from Python.")
    if record.composed_of:
        yield Paragraph(f"Its facts are those of {' and '.join(map(str, record.composed_of))}, solved together.")
    else:
        yield from _as_config(run)
    if more := run.edits[1]:
        yield Paragraph(f"A session added {counted(more, 'fact')} more, which no command here does again.")
    rows = [
        ("model", record.model.name or record.config.model),
        ("fingerprint of its weights", record.model.fingerprint),
        *((name, value) for name, value in record.machine.items()),
        *record.versions.items(),
    ]
    yield Table(
        caption="What it was made with",
        columns=[Column("what"), Column("which")],
        rows=[[one_line(name), one_line(value)] for name, value in rows],
    )


def _as_config(run: RunResults) -> Iterator[Block]:
    """The run as a file for ``editctl run --config``."""
    record = run.record
    yield Paragraph(
        "With this file, whatever the presets and defaults are by then, the command after it does the same again:"
    )
    values = record.config.model_dump(mode="json", exclude={"settings", "preset"})
    tables = "".join(f"\n[{name}]\n{toml_lines(given)}" for name, given in record.settings.items() if given)
    options = {name: value for name, value in values.items() if value not in (None, [])}
    yield Code(f"# run.toml\n{toml_lines(options)}{tables}".rstrip())
    yield Code("editctl run --config run.toml")


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
