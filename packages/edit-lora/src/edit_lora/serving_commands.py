"""``editctl verify-served`` and ``deploy``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from editcore.cli import TerminalProgress, loaded_plugins, print_table

if TYPE_CHECKING:
    from edit_lora.comparison import Compared, Stage
    from edit_lora.place import Place, Sample
    from edit_lora.verify import Report

__all__ = ["deploy_app", "verify_and_print", "verify_app"]

verify_app = typer.Typer()
deploy_app = typer.Typer()

_ENGINES = ("vllm", "llama-cpp")


@verify_app.command("verify-served")
def verify_served(
    ctx: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="The address of a server (http://...), a GGUF file, or the folder of an adapter or a model.",
        ),
    ],
    run: Annotated[Path, typer.Option(metavar="RUN", help="The run directory whose edits are served.")],
    name: Annotated[
        str | None,
        typer.Option(help="The adapter or merged model, as the server calls it. [default: the only adapter]"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model without the edits, as the server calls it. [default: the adapter's]")
    ] = None,
    base_gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The base of a GGUF file, as a GGUF file.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The llama-server's model has the edits in it.")] = False,
    facts: Annotated[int, typer.Option(min=1, help="Facts that are asked.")] = 40,
    neighbours: Annotated[int, typer.Option(min=0, help="Neighbours of facts that are asked.")] = 40,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 8,
    key_variable: Annotated[
        str | None,
        typer.Option("--key-from", metavar="VARIABLE", help="The environment variable with the server's API key."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 60.0,
) -> None:
    """Compare what is served with a run's own answers.

    First with the adapter off, because a wrong base is not a wrong adapter; then on. Facts, their neighbours and some
    text are answered greedily. Exit code 1 if the answers differ by more than rounding.
    """
    from edit_lora.commands import check_run

    check_run(run)
    key = None if key_variable is None else read_key(key_variable)

    from edit_lora.place import Place, Sample, check_place

    place = Place(
        target=target, name=name, base=base, base_gguf=base_gguf, merged=merged, key=key, timeout=timeout
    )  # fmt: skip
    check_place(place)

    verify_and_print(ctx, run, place, Sample(facts=facts, neighbours=neighbours, tokens=tokens))


@deploy_app.command()
def deploy(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    url: Annotated[
        str | None, typer.Argument(metavar="[URL]", help="The server, such as http://localhost:8000.")
    ] = None,
    engine: Annotated[str, typer.Option("--to", help="What the server is: vllm or llama-cpp.")] = "vllm",
    name: Annotated[str | None, typer.Option(help="The adapter's name on the server. [default: the run's]")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="The adapter's folder or GGUF file; written unless it is there. [default: NAME]"
        ),
    ] = None,
    seen_as: Annotated[
        str | None, typer.Option(metavar="PATH", help="That folder, as a vLLM server elsewhere sees it.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Largest rank of the adapter.")] = None,
    off: Annotated[bool, typer.Option("--undo", help="Switch the adapter off again.")] = False,
    key_variable: Annotated[
        str | None,
        typer.Option("--key-from", metavar="VARIABLE", help="The environment variable with the server's API key."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 60.0,
) -> None:
    """Give a run's adapter to a running server, and verify what it answers.

    If the answers differ from the run's, the adapter is switched off again, and the exit code is 1. llama.cpp loads
    adapters when it starts: without a URL, the adapter is written and the way to start is printed.
    """
    from editcore import HParamsError, UnknownNameError

    from edit_lora.commands import check_run
    from edit_lora.deploy import Deployment, check_llama_server, check_vllm, deploy, start_line, undo
    from edit_lora.place import Place, check_address

    check_run(run)
    if engine not in _ENGINES:
        raise UnknownNameError("engine", engine, _ENGINES)
    if url is None and (engine == "vllm" or off):
        raise HParamsError("Which server? Give its URL, such as http://localhost:8000.")
    name = name if name is not None else run.resolve().name
    path = out if out is not None else Path(name if engine == "vllm" else f"{name}.gguf")
    key = None if key_variable is None else read_key(key_variable)
    if url is None:
        _write_adapter(ctx, run, path, engine=engine, rank=rank)
        typer.echo(f"Start llama.cpp with it: {start_line(path)}")
        return
    check_address(url)
    place = Place(target=url, name=name, key=key, timeout=timeout)
    deployment = Deployment(engine=engine, server=place.server, name=name, path=path, seen_as=seen_as)
    if off:
        undo(deployment)
        typer.echo(f"{name} is switched off at {url}")
        return
    (check_vllm if engine == "vllm" else check_llama_server)(deployment)
    _write_adapter(ctx, run, path, engine=engine, rank=rank)
    deploy(deployment)

    from edit_lora.verify import verify

    kept = False
    try:
        report = verify(run, place, plugins=loaded_plugins(ctx), progress=TerminalProgress())
        kept = report.grade != "different"
    finally:
        if not kept:
            undo(deployment)
    print_report(report)
    if not kept:
        typer.echo(f"{name} was switched off again at {url}")
        raise typer.Exit(1)
    typer.echo(f"{name} is served at {url}. The same command with --undo switches it off.")


def _write_adapter(ctx: typer.Context, run: Path, path: Path, *, engine: str, rank: int | None) -> None:
    if path.exists():
        typer.echo(f"{path} is there already and is taken as it is")
        return
    from edit_lora.export import AdapterSize, export_adapter

    size, plugins, progress = AdapterSize(rank=rank), loaded_plugins(ctx), TerminalProgress()
    if engine == "vllm":
        done = export_adapter(run, path, size=size, plugins=plugins, progress=progress)
    else:
        from edit_lora.gguf_export import GgufForm, export_gguf

        done = export_gguf(run, path, GgufForm(size=size), plugins=plugins, progress=progress)
    typer.echo(f"Adapter of rank {done.rank}: {path}")


def verify_and_print(ctx: typer.Context, run: Path, place: Place, sample: Sample | None = None) -> None:
    """Compare what is served with a run, and end with exit code 1 if it differs."""
    from edit_lora.verify import verify

    report = verify(run, place, sample=sample, plugins=loaded_plugins(ctx), progress=TerminalProgress())
    print_report(report)
    if report.grade == "different":
        raise typer.Exit(1)


def read_key(variable: str) -> str:
    """The API key in an environment variable.

    Raises:
        HParamsError: it is not set.
    """
    from editcore import HParamsError

    found = os.environ.get(variable)
    if not found:
        raise HParamsError(f"--key-from names the environment variable with the API key, and {variable} is not set.")
    return found


def print_report(report: Report) -> None:
    """Print what a verification found."""
    stages = [stage for stage in (report.base, report.edited) if stage is not None]
    print_table(
        ("", "prompts", "same tokens", "equal", "close", "different", "log p differs by"),
        [row for stage in stages for row in _rows(stage)],
        right=("prompts", "same tokens", "equal", "close", "different", "log p differs by"),
    )
    for stage in stages:
        if stage.grade != "equal":
            typer.echo(f"Worst {_state(stage)}: {_case(stage.worst)}")
    typer.echo(_conclusion(report))


def _rows(stage: Stage) -> list[tuple[str, ...]]:
    rows = []
    for kind in ("fact", "neighbour", "text"):
        part = [compared for compared in stage.compared if compared.prompt.kind == kind]
        told = [compared.deviation for compared in part if compared.deviation is not None]
        if part:
            rows.append(
                (
                    f"{kind}s {_state(stage)}",
                    str(len(part)),
                    f"{sum(compared.same_text for compared in part) / len(part):.1%}",
                    *(
                        str(sum(compared.grade == grade for compared in part))
                        for grade in ("equal", "close", "different")
                    ),
                    f"{max(told):.2g}" if told else "-",
                )
            )
    return rows


def _state(stage: Stage) -> str:
    return "with the edits" if stage.edited else "without"


def _case(compared: Compared) -> str:
    deviation = "" if compared.deviation is None else f", log p differs by {compared.deviation:.2g}"
    undecided = "" if compared.gap is None else f"; the run prefers its token by {compared.gap:.2g} nats"
    said = f"'{compared.prompt.text}' → '{compared.found.text}', the run says '{compared.expected.text}'"
    return f"{said}{deviation}{undecided}"


def _conclusion(report: Report) -> str:
    if report.edited is None:
        return "Different: the base that is served is not the run's base, so its adapter was not tried."
    unknown = "" if report.base is not None else " The base is not served, so it was not compared."
    match report.grade:
        case "equal":
            return f"Equal: what is served answers as the run does.{unknown}"
        case "close":
            return f"Close: what is served answers as the run does, up to rounding.{unknown}"
        case _:
            cause = report.fault or "No single fault of the adapter explains it."
            return f"Different: what is served does not answer as the run does. {cause}{unknown}"
