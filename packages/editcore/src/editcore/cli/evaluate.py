"""``editctl evaluate``: measures any model on facts, with its edits and without them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import AsJson, Strict, with_options

if TYPE_CHECKING:
    from editcore.interfaces.values import FactRecord
    from editcore.plugins.registry import Plugins
    from editcore.runs.evaluating import Evaluated
    from editcore.runs.evaluation_record import HarnessScore
    from editcore.runs.targets import Target

__all__ = ["EvaluateOptions", "app"]

app = typer.Typer()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What is loaded, and what is measured."""

    dataset: Annotated[
        str | None,
        typer.Option(help="A data set (NAME or NAME:ARGUMENT) or a file of records. [default: the target's own facts]"),
    ] = None
    edits: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N facts. [default: all of them]")
    ] = None
    strict: Strict = None
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="An evaluator; may be given several times. [default: counterfact and generation]"
        ),
    ] = None
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME.KEY=VALUE", help="A hyperparameter of an evaluator or the data set."),
    ] = None
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The unedited model, to compare with. [default: the one that the target names; none for a model]",
        ),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Take a base with another fingerprint than a pack's or an adapter's.")
    ] = False
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, or auto: over all accelerators. [default: the run's, or cpu]")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="Type of the weights. [default: float32; a run knows its own]")] = (
        None
    )
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Whether to put the model's chat template around prompts. [default: as in the run, or not]",
        ),
    ] = None
    text: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Also the perplexity of a text: docs, self, hf:NAME or a file."),
    ] = None
    text_tokens: Annotated[int, typer.Option(min=256, metavar="N", help="Tokens of that text.")] = 2048
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Also tasks of lm-eval, with commas between them: names, or folders with files of tasks.",
        ),
    ] = None
    lm_eval_limit: Annotated[
        int | None,
        typer.Option("--lm-eval-limit", min=1, metavar="N", help="Only the first N questions of each task."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of everything random in the measurements.")] = 0
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask everything again, whatever earlier evaluations have kept.")
    ] = False


@app.command()
@with_options(EvaluateOptions)
def evaluate(
    ctx: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="A run directory, a pack of edits, an adapter folder, or a model (its name, folder or id)."
        ),
    ],
    options: EvaluateOptions,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the results. [default: runs/evaluate-TARGET-TIME]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure any model on facts, with its edits and without them.

    What was asked is kept, so the same command, after an interruption or later, asks only what was not asked yet.
    'editctl report' makes a page of the results, and 'editctl compare-results' compares them with others.
    """
    from editcore._util.paths import fresh_directory
    from editcore.evaluation.measures import DEFAULT_EVALUATORS
    from editcore.interfaces.errors import HParamsError
    from editcore.models.sources import check_dtype
    from editcore.runs.harness import HarnessPlan
    from editcore.runs.resolved import check_evaluators
    from editcore.runs.targets import TargetOptions, find_target
    from editcore.second_moments.corpora import open_corpus

    plugins = loaded_plugins(ctx)
    if options.dtype is not None:
        check_dtype(options.dtype)
    evaluators = tuple(options.evaluator or DEFAULT_EVALUATORS)
    settings = _settings(options.assignments or [])
    check_evaluators(plugins, evaluators, settings, dataset=options.dataset)
    if options.lm_eval_limit is not None and options.lm_eval is None:
        raise HParamsError("--lm-eval-limit is for --lm-eval TASKS; give both.")
    harness = None if options.lm_eval is None else HarnessPlan.create(options.lm_eval, options.lm_eval_limit)
    if options.text is not None:
        open_corpus(options.text, seed=options.seed)
    found = find_target(
        target,
        TargetOptions(
            base=options.base, device=options.device, dtype=options.dtype, chat_template=options.chat_template,
            force=options.force,
        ),
        plugins,
    )  # fmt: skip
    records, notes = _records(found, options, settings, plugins)
    directory = fresh_directory(out, f"evaluate-{Path(target).name}")

    from editcore.cli.console import TerminalProgress
    from editcore.runs.evaluating import EvaluationPlan, evaluate as measure

    plan = EvaluationPlan(
        dataset=options.dataset or target,
        own_facts=options.dataset is None,
        evaluators=evaluators,
        settings=settings,
        text=options.text,
        text_tokens=options.text_tokens,
        harness=harness,
        seed=options.seed,
        fresh=options.fresh,
        notes=notes,
        command=["editctl", *sys.argv[1:]],
    )
    try:
        done = measure(found, records, plan=plan, out=directory, plugins=plugins, progress=TerminalProgress())
    except KeyboardInterrupt:
        if not options.fresh:
            typer.echo("Interrupted. What was asked is kept; the same command goes on from there.", err=True)
        raise
    _show(done, as_json=as_json)


def _settings(assignments: Sequence[str]) -> dict[str, dict[str, object]]:
    """``--set`` values by section.

    Raises:
        HParamsError: one names no section.
    """
    from editcore.interfaces.errors import HParamsError
    from editcore.settings.hparams import parse_assignment

    settings: dict[str, dict[str, object]] = {}
    for assignment in assignments:
        key, value = parse_assignment(assignment)
        section, dot, name = key.rpartition(".")
        if not dot:
            raise HParamsError(f"--set {assignment}: say whose setting it is, such as generation.sample=none.")
        settings.setdefault(section, {})[name] = value
    return settings


def _records(
    target: Target, options: EvaluateOptions, settings: dict[str, dict[str, object]], plugins: Plugins
) -> tuple[list[FactRecord], list[str]]:
    """The records to measure, and notes on them."""
    from editcore._util.words import counted
    from editcore.datasets.load import Selection, load
    from editcore.interfaces.errors import HParamsError

    if options.dataset is not None:
        selection = Selection(first=options.edits, strict=bool(options.strict))
        loaded = load(options.dataset, plugins=plugins, settings=settings, selection=selection)
        return _checked(list(loaded.records), [*loaded.notes], options)
    if target.facts is None:
        raise HParamsError(f"{target.name} does not say which facts it was taught; give --dataset NAME or FILE.")
    if not target.facts:
        raise HParamsError(f"No edit is active in {target.name}, so it has no facts of its own; give --dataset.")
    if options.edits is not None and options.edits > len(target.facts):
        raise HParamsError(f"--edits {options.edits}: {target.name} has {counted(len(target.facts), 'active fact')}.")
    return list(target.facts[: options.edits]), []


def _checked(
    records: list[FactRecord], notes: list[str], options: EvaluateOptions
) -> tuple[list[FactRecord], list[str]]:
    from editcore._util.words import counted
    from editcore.datasets.check import check_records
    from editcore.interfaces.errors import HParamsError

    if options.edits is not None and options.edits > len(records):
        raise HParamsError(
            f"--edits {options.edits} is more than the data set '{options.dataset}' has; it has "
            f"{counted(len(records), 'record')}."
        )
    kept, more = check_records(records)
    return kept, [*notes, *more]


def _show(done: Evaluated, *, as_json: bool) -> None:
    from editcore._util.words import counted
    from editcore.cli.console import print_json
    from editcore.cli.measures_view import show_measures

    record = done.record
    if as_json:
        print_json({"directory": str(done.directory), **record.model_dump(mode="json")})
        return
    phases = {"the model": done.after} if done.before is None else {"before": done.before, "after": done.after}
    show_measures(phases, counted(record.dataset.records, "fact"), record.dataset.records)
    _show_harness(record.harness_before, record.harness)
    if (text := record.perplexity) is not None:
        of_text = f"Perplexity of {text.text.source}, {text.text.tokens} tokens: "
        typer.echo(
            f"\n{of_text}{text.after:.4g}"
            + ("" if done.before is None else f", {text.text.perplexity:.4g} before: × {text.ratio:.4f}")
        )
    typer.echo()
    for note in record.notes:
        typer.echo(f"Note: {note}")
    for tally in record.tallies:
        typer.echo(tally.sentence())
    asked, known = record.questions.asked, record.questions.known
    said = f"{counted(asked, 'question')} asked" if asked else "Nothing was asked: all answers were known"
    said += f", {known:,} known" if asked and known else ""
    typer.echo(f"{said}; {record.seconds:.1f} s, peak memory {record.peak_memory_bytes / 2**30:.2f} GiB")
    typer.echo(f"Everything is in {done.directory}; a page about it: editctl report {done.directory}")


def _show_harness(before: Sequence[HarnessScore], after: Sequence[HarnessScore]) -> None:
    from editcore.cli.console import print_table

    if not after:
        return
    earlier = {(result.task, result.metric): result for result in before}
    rows = []
    for result in after:
        ends, was = result.interval, earlier.get((result.task, result.metric))
        interval = "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"
        shown = "" if was is None else f"{was.value:.4g}"
        rows.append((result.task, result.metric, str(result.questions), shown, f"{result.value:.4g}", interval))
    typer.echo()
    print_table(
        ("task", "metric", "n", "before", "after", "95 % interval"),
        rows,
        title="The model as a whole, by lm-eval",
        right=("n", "before", "after"),
    )
