"""What a batch edit costs, against the plain way of doing it, in one run on one machine.

    python tools/bench.py --model smollm2-135m --edits 50 --json bench.json

Three ways write the same facts into the same model and are measured alike:

* ``plain``: the loop of ``bench_oracle.py``: one fact at a time, whole sequences, all logits;
* ``exact``: editcore with the plain loop's settings: five sampled contexts, all steps, no early stop;
* ``default``: editcore as it comes, with the preset of the model or another one.

The plain loop is measured on the first ``--plain-edits`` facts, because it is slow. Machines are noisy and differ; the
ratios are what this prints, the seconds are what it saw.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_oracle import PlainLoop
from editcore import EditRequest, EditSession, FactoredDelta, FactRecord, LanguageModel, Plugins, SessionConfig
from editcore._util.files import json_text, write_text
from editcore._util.memory import peak_memory_bytes
from editcore.datasets import check_records, load_records
from editcore.figures.style import AFTER, BEFORE, new_figure, save
from editcore.models import LoadOptions
from editcore.second_moments.linalg import Metric, solve_update
from torch import Tensor

EDITOR = "emmet"
EXACT = {
    "context_count": 5, "v_contexts_per_step": None, "v_num_grad_steps": 20, "v_stop_loss": 0.0,
    "v_stop_probability": None, "v_final_step": False, "v_optimizer": "adam", "v_beta1": 0.9, "emmet_lambda": 0.0,
    "mom2_update_weight": 1.0, "solve_rounds": 1,
}  # fmt: skip
LADDER = (
    ("the preset's contexts", {"context_count", "v_contexts_per_step"}),
    ("its stop", {"v_stop_loss", "v_stop_probability", "v_final_step", "v_num_grad_steps"}),
    ("its steps", {"v_optimizer", "v_beta1"}),
    ("its solve", {"emmet_lambda", "mom2_update_weight", "solve_rounds"}),
)
"""Settings of exact mode that give way to the preset's, in this order."""
STAGES = ("targets", "keys", "solve", "other")
SOLVES = (1, 10, 100, 1000, 10_000)


@dataclass(kw_only=True)
class Mode:
    """One way of editing, measured."""

    name: str
    edits: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Per fact and stage."""
    scores: dict[str, float] = field(default_factory=dict)
    """By metric, as tables show it, after all edits."""
    peak_memory_mb: float = 0.0
    """Highest so far: modes are measured from the leanest to the plain one."""
    mean_steps: float = 0.0
    deltas: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def total(self) -> float:
        """Seconds per fact, evaluation left out."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        record = {key: value for key, value in asdict(self).items() if key != "deltas"}
        return {**record, "seconds_per_fact": self.total}


def main() -> None:
    """Run the benchmark."""
    logging.basicConfig(level=logging.WARNING)
    options = _options()
    torch.manual_seed(0)
    registry = Plugins.load()
    model = LanguageModel.load(
        options.model,
        LoadOptions(device=options.device, dtype=options.dtype),
        families=registry.family_paths(),
    )
    records, _ = check_records(load_records(options.dataset, plugins=registry)[: options.edits])
    print(
        f"{model.name}, {len(records)} facts of {options.dataset}, {torch.get_num_threads()} threads, {options.device}"
    )
    default = _ours(model, records, name="default", settings={}, options=options)
    curve = _curve(model, options) if options.curve else None  # before the modes that take more memory
    exact = _ours(model, records, name="exact", settings=EXACT, options=options)
    count = min(len(records), options.plain_edits or len(records))
    plain = _plain(model, records[:count], options=options)
    cosines = [
        float(torch.cosine_similarity(a.double(), b.double(), dim=0))
        for a, b in zip(plain.deltas, exact.deltas, strict=False)
    ]
    result: dict[str, Any] = {
        "model": model.name,
        "dataset": str(options.dataset),
        "edits": len(records),
        "batch_size": options.batch_size or len(records),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "ratio_exact": plain.total / exact.total,
        "ratio_default": plain.total / default.total,
        "min_cosine": min(cosines),
        "modes": [mode.as_json() for mode in (plain, exact, default)],
    }
    _print_modes([plain, exact, default])
    print(
        f"exact {result['ratio_exact']:.1f} times, default {result['ratio_default']:.1f} times as fast as the plain "
        f"loop; smallest cosine of δ between plain and exact {result['min_cosine']:.7f} over {len(cosines)} facts"
    )
    if options.ladder:
        result["ladder"] = [mode.as_json() for mode in _ladder(model, records[:count], options)]
    if curve is not None:
        result["curve"] = curve
    if options.solve:
        result["solve"] = _solves(model)
    if options.json is not None:
        write_text(options.json, json_text(result, indent=2) + "\n")
        _draw(result, options.json.with_suffix(".png"))
        beside = options.json.with_suffix("")
        if curve:
            _draw_growth(curve, "edits", "seconds_per_fact", "facts at once, seconds per fact", f"{beside}-curve.png")
        if options.solve:
            _draw_growth(result["solve"], "keys", "seconds", "keys solved together, seconds", f"{beside}-solve.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--preset", help="of the editor; left out, the one named like the model")
    parser.add_argument("--dataset", default="worldfacts", help="registered data set or a file of records")
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--batch-size", type=int, help="facts solved together; all of them if left out")
    parser.add_argument("--plain-edits", type=int, help="facts given to the plain loop; all of them if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-scores", action="store_true", help="leave the evaluations out")
    parser.add_argument("--ladder", action="store_true", help="also from plain to default, one change at a time")
    parser.add_argument("--curve", type=int, nargs="*", help="also the cost per fact for these numbers of facts")
    parser.add_argument("--solve", action="store_true", help="also the solve alone, to 10,000 synthetic keys")
    parser.add_argument("--json", type=Path, help="write the figures here, and pictures beside it")
    return parser.parse_args()


def _has_preset(model: LanguageModel) -> bool:
    from editcore.settings.hparams import list_presets

    spec = Plugins.load().editor(EDITOR)
    return model.name in list_presets(spec.presets)


def _session(model: LanguageModel, settings: Mapping[str, Any], options: argparse.Namespace) -> EditSession:
    if not options.preset and not _has_preset(model):  # two layers, a quarter of the way up
        settings = {"layers": [model.layout.num_layers // 4, model.layout.num_layers // 4 + 1], **settings}
    return EditSession.open(
        model,
        SessionConfig(
            editor=EDITOR, preset=options.preset, settings={EDITOR: dict(settings)}, evaluators=("counterfact",)
        ),
    )


def _ours(
    model: LanguageModel,
    records: Sequence[FactRecord],
    *,
    name: str,
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> Mode:
    session = _session(model, settings, options)
    mode = Mode(name=name, edits=len(records))
    batches = session.edit([record.request for record in records], batch_size=options.batch_size)
    for batch in batches:
        stages = {**batch.proposal.seconds, "other": batch.seconds - sum(batch.proposal.seconds.values())}
        for stage, seconds in stages.items():
            mode.seconds[stage] = mode.seconds.get(stage, 0.0) + seconds / len(records)
        mode.mean_steps += sum(evidence.figures["steps"] for evidence in batch.proposal.evidence) / len(records)
        layers = len(batch.proposal.changes)
        first, change = next(iter(batch.proposal.changes.items()))
        assert isinstance(change, FactoredDelta)
        for request in batch.batch.requests:
            # λ = 0: at the first layer, the change of the fact's own key is its share of δ.
            key = batch.proposal.known[request.id].keys[first]
            mode.deltas.append(layers * (change.left.cpu() @ (change.right.cpu() @ key)))
    mode.peak_memory_mb = peak_memory_bytes(model.device) / 2**20
    if not options.no_scores:
        mode.scores = session.evaluate(records).summary.values()
    session.close()
    gc.collect()
    return mode


def _plain(model: LanguageModel, records: Sequence[FactRecord], *, options: argparse.Namespace) -> Mode:
    session = _session(model, EXACT, options)
    hparams: Any = session.settings[EDITOR]
    loop = PlainLoop(
        model,
        hparams,
        templates=session.provenance["context_templates"],
        moments=session.context.statistics.moments(hparams.layers),
        ridge=hparams.emmet_lambda,
    )
    base = {name: model.weight(name).detach().clone() for name in map(model.layout.weight_name, hparams.layers)}
    mode = Mode(name="plain", edits=len(records), mean_steps=hparams.v_num_grad_steps - 1)
    size = options.batch_size or len(records)
    requests: list[EditRequest] = [record.request for record in records]
    for start in range(0, len(requests), size):
        batch = loop.edit(requests[start : start + size])
        mode.deltas += batch.deltas
        for stage, seconds in batch.seconds.items():
            mode.seconds[stage] = mode.seconds.get(stage, 0.0) + seconds / len(requests)
    mode.peak_memory_mb = peak_memory_bytes(model.device) / 2**20
    if not options.no_scores:
        mode.scores = session.evaluate(records).summary.values()
    with torch.no_grad():
        for name, weight in base.items():
            model.weight(name).copy_(weight)
    session.close()
    return mode


def _ladder(model: LanguageModel, records: Sequence[FactRecord], options: argparse.Namespace) -> list[Mode]:
    """From the plain loop's way to the default, one change after another, on the facts that the plain loop had."""
    settings: Mapping[str, Any] = EXACT
    alone = argparse.Namespace(**{**vars(options), "batch_size": 1, "no_scores": True})
    together = argparse.Namespace(**{**vars(options), "no_scores": True})
    modes = []
    with mock.patch(
        "editcore.locate_then_edit.targets.prefixes_fit", return_value=False
    ):  # as for a family whose caches do not fit
        modes.append(_ours(model, records, name="needed logits only", settings=settings, options=alone))
        modes.append(_ours(model, records, name="facts side by side", settings=settings, options=together))
    modes.append(_ours(model, records, name="cached prefixes", settings=settings, options=together))
    for name, released in LADDER:
        settings = {key: value for key, value in settings.items() if key not in released}
        modes.append(_ours(model, records, name=name, settings=settings, options=together))
    _print_modes(modes)
    return modes


def _curve(model: LanguageModel, options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds per fact for batches of growing size, the default way."""
    available, _ = check_records(load_records(options.dataset, plugins=Plugins.load()))
    rows = []
    for count in options.curve:
        session = _session(model, {}, options)
        requests = [record.request for record in available[:count]]
        start = time.perf_counter()
        session.edit(requests)
        seconds = (time.perf_counter() - start) / len(requests)
        session.close()
        rows.append(
            {"edits": len(requests), "seconds_per_fact": seconds, "peak_mb": peak_memory_bytes(model.device) / 2**20}
        )
        print(f"{len(requests):6d} facts at once: {seconds:.3f} s per fact, peak {rows[-1]['peak_mb']:.0f} MB")
    return rows


def _solves(model: LanguageModel) -> list[dict[str, float]]:
    """The solve alone, for synthetic keys of the model's width."""
    generator = torch.Generator().manual_seed(0)
    d_in, d_out = model.layout.d_ff, model.layout.d_model
    text = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64)
    metric = Metric(text.T @ text / len(text))
    metric.inverse_times(text[:1].T)  # its factor is computed once for all batches
    rows = []
    for count in SOLVES:
        keys = torch.randn(count, d_in, generator=generator, dtype=torch.float64)
        residuals = torch.randn(count, d_out, generator=generator, dtype=torch.float64)
        start = time.perf_counter()
        solve_update(keys, residuals, metric)
        rows.append({"keys": count, "seconds": time.perf_counter() - start})
        print(f"{count:6d} keys solved in {rows[-1]['seconds']:.3f} s")
    return rows


def _print_modes(modes: Sequence[Mode]) -> None:
    print(f"{'':22} {'facts':>5} " + " ".join(f"{stage:>8}" for stage in (*STAGES, "s/fact", "steps")), end="")
    print("".join(f"{metric:>7}" for metric in ("ES", "PS", "NS")) + f"{'peak MB':>9}")
    for mode in modes:
        cells = [mode.seconds.get(stage, 0.0) for stage in STAGES] + [mode.total, mode.mean_steps]
        print(f"{mode.name:22} {mode.edits:5d} " + " ".join(f"{cell:8.3f}" for cell in cells), end="")
        print("".join(f"{mode.scores.get(metric, float('nan')):7.1f}" for metric in ("ES", "PS", "NS")), end="")
        print(f"{mode.peak_memory_mb:9.0f}")


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Seconds per fact of each mode, on a logarithmic axis."""
    figure, axes = new_figure(height=2.2)
    names = [mode["name"] for mode in result["modes"]]
    seconds = [mode["seconds_per_fact"] for mode in result["modes"]]
    bars = axes.barh(names[::-1], seconds[::-1], color=[AFTER, AFTER, BEFORE][: len(names)], height=0.6)
    axes.bar_label(bars, [f"{value:.2f} s" for value in seconds[::-1]], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 2, max(seconds) * 4)
    axes.set_xlabel("seconds per fact", fontsize=8)
    axes.set_title(f"{result['edits']} edits of {result['model']}, {result['threads']} threads", fontsize=9, loc="left")
    save(figure, path)


def _draw_growth(rows: Sequence[Mapping[str, float]], x: str, y: str, title: str, path: str) -> None:
    """One number by the size of a batch, both axes logarithmic."""
    figure, axes = new_figure(height=2.2)
    across, up = [row[x] for row in rows], [row[y] for row in rows]
    axes.plot(across, up, color=AFTER, marker="o", markersize=4)
    for place, value in zip(across, up, strict=True):
        axes.annotate(
            f"{value:.2g} s", (place, value), xytext=(0, 5), textcoords="offset points", fontsize=8, ha="center"
        )
    axes.set(xscale="log", yscale="log", ylim=(min(up) / 2, max(up) * 3))
    axes.set_title(title, fontsize=9, loc="left")
    save(figure, path)


if __name__ == "__main__":
    main()
