"""``editctl stats``: second moments, computed ahead or looked at."""

from __future__ import annotations

from typing import Annotated

import typer

from editcore.cli._lazy import loaded_plugins
from editcore.cli._options import Device, Dtype, ModelOption

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
    seed: Annotated[int, typer.Option(help="Seed of a sampled corpus.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Compute second moments into the cache: all layers in one pass; what is there already is kept."""
    from editcore.cli._console import TerminalProgress, print_table
    from editcore.linalg import Metric
    from editcore.models import LanguageModel
    from editcore.statistics import StatisticsStore

    progress = TerminalProgress()
    loaded = LanguageModel.load(model, device=device, dtype=dtype, plugins=loaded_plugins(ctx), progress=progress)
    for layer in layers:
        loaded.check_layer(layer, setting="stats compute --layer")
    store = StatisticsStore(loaded, corpus=corpus, tokens=corpus_tokens, seed=seed, progress=progress)
    moments = store.moments(sorted(set(layers)))
    print_table(
        ("layer", "mean square", "condition at least", "file"),
        [
            (layer, f"{float(moment.diagonal().mean()):.3g}", f"{Metric(moment).condition():.1e}", store.path(layer))
            for layer, moment in moments.items()
        ],
        right=("layer", "mean square", "condition at least"),
    )


@app.command("list")
def list_statistics() -> None:
    """List the second moments in the cache."""
    from editcore._paths import cache_dir
    from editcore.cli._console import print_table
    from editcore.statistics import cached_moments

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
