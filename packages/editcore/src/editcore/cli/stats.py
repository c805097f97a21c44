"""``editctl stats``: computes second moments in advance, and lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import CorpusSeed, Device, Dtype, ExecutorSettings, ModelOption

if TYPE_CHECKING:
    from torch import Tensor

    from editcore import LanguageModel, Progress

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Compute and list second moments of activations.")


@app.command()
def compute(
    ctx: typer.Context,
    layers: Annotated[list[int], typer.Option("--layer", help="A block; may be given several times.")],
    model: ModelOption = "smollm2-135m",
    corpus: Annotated[str, typer.Option(help="self, docs, hf:NAME or a file.")] = "self",
    corpus_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens. [default: ten times the projection's input width]")
    ] = None,
    corpus_seed: CorpusSeed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    executor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compute in parallel on the workers of this executor.")
    ] = None,
    executor_settings: ExecutorSettings = None,
) -> None:
    """Compute second moments into the cache: all layers in one pass; what is there already is kept."""
    from editcore.models.sources import check_dtype, check_layer, look_at, num_blocks
    from editcore.second_moments.corpora import open_corpus

    look_at(model)
    if (blocks := num_blocks(model)) is not None:
        for layer in layers:
            check_layer(layer, blocks, model=model, setting="stats compute --layer")
    check_dtype(dtype)
    open_corpus(corpus)

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.models import LanguageModel, LoadOptions
    from editcore.second_moments.linalg import Metric
    from editcore.second_moments.statistics import CorpusOptions, StatisticsStore, second_moments

    progress = TerminalProgress()
    loaded = LanguageModel.load(
        model,
        LoadOptions(device=device, dtype=dtype),
        families=loaded_plugins(ctx).family_paths(),
        progress=progress,
    )
    for layer in layers:
        loaded.check_layer(layer, setting="stats compute --layer")
    store = StatisticsStore(
        loaded,
        CorpusOptions(name=corpus, tokens=corpus_tokens, seed=corpus_seed),
        progress=progress,
        compute=second_moments if executor is None else _sharded(ctx, executor, executor_settings or [], device, dtype),
    )
    moments = store.moments(sorted(set(layers)))
    print_table(
        ("layer", "mean square", "condition at least", "file"),
        [
            (layer, f"{float(moment.diagonal().mean()):.3g}", f"{Metric(moment).condition():.1e}", store.path(layer))
            for layer, moment in moments.items()
        ],
        right=("layer", "mean square", "condition at least"),
    )


def _sharded(
    ctx: typer.Context, executor: str, settings: list[str], device: str, dtype: str
) -> Callable[..., dict[int, Tensor]]:
    """The computation of second moments on an executor's workers."""
    from editcore.execution.executors import make_executor
    from editcore.execution.sharding import ModelSource, sharded_moments
    from editcore.runs.record import folder_of
    from editcore.settings.hparams import parse_assignment

    made = make_executor(loaded_plugins(ctx), executor, dict(map(parse_assignment, settings)))

    def compute(
        model: LanguageModel, sequences: Tensor, layers: Sequence[int], *, progress: Progress
    ) -> dict[int, Tensor]:
        source = ModelSource(name=folder_of(model.name) or model.name, device=device, dtype=dtype)
        return sharded_moments(source, sequences, layers, made, fingerprint=model.base_fingerprint, progress=progress)

    return compute


@app.command("list")
def list_statistics() -> None:
    """List the second moments in the cache."""
    from editcore._util.paths import cache_dir
    from editcore.cli.console import print_table
    from editcore.second_moments.statistics import cached_moments

    rows = [
        (
            metadata.get("model_name", ""),
            metadata["weight"],
            metadata.get("corpus", ""),
            metadata.get("counted_tokens", ""),
            f"{path.stat().st_size / 1e6:.0f} MB",
            path.relative_to(cache_dir() / "statistics"),
        )
        for path, metadata in cached_moments()
    ]
    if not rows:
        typer.echo(f"No second moments in {cache_dir() / 'statistics'} yet; a run computes what it needs.")
        return
    print_table(("model", "weight", "corpus", "tokens", "size", "file"), rows, right=("tokens", "size"))
