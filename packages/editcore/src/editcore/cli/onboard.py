"""``editctl onboard``: finds presets for a model that nobody has edited yet."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import ChatTemplate, Corpus, CorpusSeed, Device, Dtype, ModelArgument, Strict

if TYPE_CHECKING:
    from editcore.interfaces.specs import EditorSpec
    from editcore.locate_then_edit.located import Tracing
    from editcore.models import LanguageModel
    from editcore.onboarding.onboard import Bench, Trial
    from editcore.second_moments.statistics import StatisticsStore

__all__ = ["app"]

app = typer.Typer()

_NEXT_EDITS = 40
"""Facts in the run that is proposed at the end."""
_GOOD = 90.0
"""Percent of the facts that must be written. Below this the settings are reported as poor."""


@app.command()
def onboard(
    ctx: typer.Context,
    model: ModelArgument,
    editor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Write presets for these editors only; the first one tries the layers. [default: all]"
        ),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Facts to trace and edit: a data set (NAME or NAME:ARGUMENT) or a file.")
    ] = "worldfacts",
    trace: Annotated[int, typer.Option(min=0, help="Facts to trace; 0 leaves tracing out.")] = 6,
    edits: Annotated[int, typer.Option(min=1, help="Facts to edit in each trial.")] = 6,
    strict: Strict = None,
    evaluator: Annotated[
        str, typer.Option(metavar="NAME", help="The evaluator that measures the trials.")
    ] = "counterfact",
    norm_facts: Annotated[
        int, typer.Option(min=0, help="Other facts on which the length of values is measured; 0 leaves it out.")
    ] = 20,
    candidates: Annotated[int, typer.Option(min=1, help="Layers to try.")] = 6,
    corpus: Corpus = "self",
    corpus_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of that text, in tokens. [default: ten times the projection's input width]"),
    ] = None,
    corpus_seed: CorpusSeed = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random but the second moments' text.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    chat_template: ChatTemplate = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite your own presets for this model.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where tables and pictures go. [default: runs/onboard-MODEL-TIME]"),
    ] = None,
) -> None:
    """Find out which layer of a new model to edit and how far, and write a preset for every editor.

    Causal tracing proposes layers, short trials of real edits decide. The model is not changed.
    """
    from editcore.datasets import Selection, load_records
    from editcore.models.sources import check_dtype, look_at
    from editcore.second_moments.corpora import open_corpus

    look_at(model)
    check_dtype(dtype)
    open_corpus(corpus)
    load_records(dataset, plugins=loaded_plugins(ctx), notes=[], selection=Selection(first=1))

    from editcore._util.paths import fresh_directory
    from editcore._util.words import counted
    from editcore.cli.console import TerminalProgress
    from editcore.datasets import check_records, load_known_facts, short_name
    from editcore.evaluation.measures import retention_of
    from editcore.models import LanguageModel, LoadOptions
    from editcore.onboarding.causal_tracing import TracingOptions, trace as trace_model
    from editcore.onboarding.onboard import (
        SEARCH,
        Bench,
        best,
        candidate_layers,
        preset_paths,
        tunable_editors,
        write_presets,
    )
    from editcore.runs.fit import subject_refusal
    from editcore.second_moments.statistics import CorpusOptions, StatisticsStore
    from editcore.settings.presets import model_stem

    plugins, progress = loaded_plugins(ctx), TerminalProgress()
    specs = tunable_editors(plugins, editor or ())
    if idle := [name for name in plugins.editors() if not editor and plugins.editor(name) not in specs]:
        typer.echo(f"Note: there is nothing to find out for {', '.join(idle)}; give what is required with --set.")
    paths = preset_paths(specs, model, replace=replace)
    notes: list[str] = []
    refusals = [subject_refusal(spec) for spec in specs]
    available = load_records(
        dataset,
        plugins=plugins,
        notes=notes,
        selection=Selection(
            first=max(edits + norm_facts, _NEXT_EDITS),
            strict=bool(strict),
            refuse=lambda request: next(filter(None, (refuse(request) for refuse in refusals)), None),
        ),
    )
    records, _ = check_records(available[:edits])
    facts = load_known_facts(dataset, plugins=plugins, notes=notes) if trace else []
    for note in dict.fromkeys(notes):
        typer.echo(f"Note: {note}")
    directory = fresh_directory(out, f"onboard-{model_stem(model)}")
    loaded = LanguageModel.load(
        model,
        LoadOptions(device=device, dtype=dtype, chat_template=chat_template),
        families=plugins.family_paths(),
        progress=progress,
    )
    statistics = StatisticsStore(
        loaded, CorpusOptions(name=corpus, tokens=corpus_tokens, seed=corpus_seed), progress=progress
    )
    _show_layout(loaded)
    tracing = (
        trace_model(loaded, facts, options=TracingOptions(num=trace, seed=seed), progress=progress) if trace else None
    )
    layers = candidate_layers(loaded.layout.num_layers, candidates, tracing)
    _show_candidates(loaded, tracing, layers)
    searching = [spec for spec in specs if spec.name in plugins.components(SEARCH)]
    inheriting = [spec for spec in specs if spec not in searching]
    _show_cost(inheriting, searching, layers, len(records), statistics)
    if inheriting:
        statistics.moments(layers)
    bench = Bench(records, statistics, plugins=plugins, evaluator=evaluator, seed=seed, progress=progress)
    scan = bench.scan(inheriting[0], layers) if inheriting else {}
    chosen = _trials(bench, inheriting, scan) if inheriting else []
    chosen += _searches(bench, searching, layers)
    _show_trials(bench, chosen)
    winner = best(chosen or bench.trials)
    held_out = available[edits : edits + norm_facts]
    if held_out and inheriting:
        typer.echo(f"Lengths of values on {counted(len(held_out), 'other fact')}, for v_norm_anchor.")
        chosen = [bench.with_value_norms(trial, held_out) for trial in chosen]
    elif norm_facts and inheriting:
        typer.echo("Note: no facts are left to measure the length of values, so the presets have no v_norms.")
    _write_results(bench, tracing, scan, directory)
    measured = (
        f"{counted(len(records), 'fact')} of {short_name(dataset)}; second moments from {Path(corpus).name}, its seed "
        f"{corpus_seed}; seed {seed}; model {loaded.base_fingerprint[:12]}"
    )
    if chat_template:
        measured += ", with its chat template"
    for path in write_presets(chosen, paths, measured=measured, before=bench.before):
        typer.echo(f"Wrote {path}")
    telling = retention_of(bench.measures, bench.before.values())
    if telling is not None and winner.summary is not None and not winner.summary.value(telling.key) >= _GOOD:
        typer.echo(
            f"Note: even the best settings write {winner.summary.value(telling.key):.0f} % of the facts "
            f"({telling.key}). More --candidates may find a better layer; a model that knows few facts is also hard to "
            "edit."
        )
    options = {"--dataset": (dataset, "worldfacts"), "--corpus": (corpus, "self"),
               "--corpus-tokens": (corpus_tokens, None), "--corpus-seed": (corpus_seed, 0), "--seed": (seed, 0),
               "--device": (device, "cpu"), "--dtype": (dtype, "float32")}  # fmt: skip
    more = [word for name, (value, usual) in options.items() if value != usual for word in (name, str(value))]
    more += ["--chat-template"] if chat_template else []
    more += ["--strict"] if strict else []
    count = min(_NEXT_EDITS, len(available))
    command = ["editctl", "run", "--editor", winner.editor, "--model", model, "--edits", str(count), *more]
    typer.echo(f"\nNext: {shlex.join(command)}")


def _trials(bench: Bench, specs: list[EditorSpec], scan: Mapping[int, Trial]) -> list[Trial]:
    """The best trial of each editor. The editor that scanned the layers comes first; editors that cannot edit the model
    are left out."""
    from editcore.onboarding.onboard import best

    scanned = best(scan.values())
    found = best([scanned, *bench.clamps(specs[0], scanned.settings["layers"][0])])
    tried = {spec.name: bench.alternatives(spec, found.settings) for spec in specs}
    return [best(trials) for name, trials in tried.items() if _works(name, trials)]


def _searches(bench: Bench, specs: list[EditorSpec], layers: list[int]) -> list[Trial]:
    """The best trial of each editor that has a search; those that cannot edit the model are left out."""
    from editcore.onboarding.onboard import best

    tried = {spec.name: bench.search(spec, layers) for spec in specs}
    return [best(trials) for name, trials in tried.items() if _works(name, trials)]


def _works(editor: str, trials: list[Trial]) -> bool:
    """Whether one of the trials of an editor worked. If none did, the user is told."""
    if any(trial.summary is not None for trial in trials):
        return True
    problem = trials[0].problem if trials else "Its search proposes nothing."
    typer.echo(f"{editor} cannot edit this model as it is set; it gets no preset. {problem}")
    return False


def _show_layout(model: LanguageModel) -> None:
    layout = model.layout
    behind = f", a norm behind it ({layout.post_norm})" if layout.post_norm else ""
    typer.echo(
        f"{model.name}: {type(model.hf).__name__}, {layout.num_layers} blocks ({layout.blocks}), edited at "
        f"{layout.projection} ({layout.d_ff} to {layout.d_model}{behind}); checked by a forward pass."
    )


def _show_candidates(model: LanguageModel, tracing: Tracing | None, layers: list[int]) -> None:
    from editcore.cli.trace import show_tracing
    from editcore.locate_then_edit.located import store_tracing

    named = ", ".join(map(str, layers))
    if tracing is not None and tracing.used:
        store_tracing(tracing)
        show_tracing(tracing)
        typer.echo(f"Layers to try, proposed by the tracing: {named}. The trials decide.")
        return
    why = "Without tracing"
    if tracing is not None:
        why = f"{model.name} knows none of the {tracing.asked} facts, so there is nothing to trace"
    typer.echo(f"{why}; layers to try, spread over the depth: {named}. The trials decide.")


def _show_cost(
    inheriting: list[EditorSpec],
    searching: list[EditorSpec],
    layers: list[int],
    facts: int,
    statistics: StatisticsStore,
) -> None:
    """Print what will be computed, before the long work starts."""
    from editcore._util.words import counted
    from editcore.onboarding.onboard import CLAMPS

    parts = []
    if inheriting:
        parts += [
            f"{counted(len(layers), 'layer')} and {len(CLAMPS)} clamps with {inheriting[0].name}",
            f"then up to two with each of {', '.join(spec.name for spec in inheriting)}",
        ]
    if searching:
        parts.append(f"the searches of {', '.join(spec.name for spec in searching)}")
    text = f"Trials of {counted(facts, 'fact')} each: {', '.join(parts)}."
    if inheriting:
        text += (
            f" Second moments of {counted(len(layers), 'layer')} "
            f"({len(layers) * 8 * statistics.model.layout.d_ff**2 / 1e6:,.0f} MB) from {statistics.tokens:,} tokens."
        )
    typer.echo(text)


def _show_trials(bench: Bench, chosen: list[Trial]) -> None:
    from editcore.cli.console import print_table
    from editcore.evaluation.measures import legend, shown

    measures = shown(bench.measures, bench.before.values())
    numbers = [measure.key for measure in measures]
    rows = [("", "before", "", *(measure.text(bench.before.value(measure.key)) for measure in measures))]
    for trial in bench.trials:
        values = trial.summary.values() if trial.summary else {}
        result = [measure.text(values.get(measure.key)) for measure in measures]
        rows.append(("*" if trial in chosen else "", trial.editor, trial.problem or trial.label, *result))
    print_table(
        ("", "editor", "settings", *numbers), rows, title=f"Trials; {legend(measures)}; * becomes a preset",
        right=numbers,
    )  # fmt: skip


def _write_results(bench: Bench, tracing: Tracing | None, scan: Mapping[int, Trial], directory: Path) -> None:
    """Write ``trials.csv``, the layer scan's picture, and the tracing's table and picture if there is a tracing."""
    import pandas as pd

    from editcore._util.files import write_text
    from editcore._util.words import counted
    from editcore.cli.trace import write_tracing
    from editcore.figures.layers import layers_figure
    from editcore.figures.style import save
    from editcore.onboarding.onboard import best
    from editcore.settings.presets import model_stem

    table, picture = directory / "trials.csv", directory / "figures" / "layers.png"
    write_text(table, pd.DataFrame([trial.row() for trial in bench.trials]).to_csv(index=False))
    written = [table]
    if scan:
        worked = {layer: trial.summary for layer, trial in scan.items() if trial.summary is not None}
        first, facts = best(scan.values()), counted(len(bench.records), "fact")
        title = f"Editing one layer of {model_stem(bench.model.name)}: {first.editor}, {facts}"
        save(layers_figure(worked, bench.before, chosen=first.settings["layers"][0], title=title), picture)
        written.append(picture)
    if tracing is not None and tracing.used:
        written += write_tracing(tracing, directory)
    for path in written:
        typer.echo(f"Wrote {path}")
