"""``editctl export``, ``import`` and ``adapters``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from editcore.cli import TerminalProgress, loaded_plugins, print_table

if TYPE_CHECKING:
    from edit_lora.export import Exported

__all__ = ["adapters_app", "check_run", "export_app", "import_app"]

export_app = typer.Typer()
import_app = typer.Typer()
adapters_app = typer.Typer(no_args_is_help=True)

_FORMATS, _CRITERIA, _ENGINES = ("peft", "merged", "gguf", "gguf-model"), ("weighted", "frobenius"), ("vllm",)
_OPTIONS = {
    "peft": ("rank", "criterion", "pad-for", "dtype", "push-to-hub", "public"),
    "merged": ("dtype",),
    "gguf": ("rank", "criterion", "dtype", "base-gguf"),
    "gguf-model": ("dtype", "base-gguf"),
}
"""The options that each format has."""
_NOT_FOR = {
    "peft": "peft reads no GGUF files",
    "merged": "a merged model has the run's edits as they are",
    "gguf": "llama.cpp serves any rank",
    "gguf-model": "the model has the run's edits as they are",
}
"""Why a format does not have the others."""
_TYPES = {"peft": ("float32", "float16", "bfloat16"), "gguf": ("f32", "f16"), "gguf-model": ("f32", "f16", "q8_0")}
"""The types that are written; those of merged models are checked where they are written."""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Folder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder with adapter_config.json.")]
New = Annotated[Path, typer.Option("--out", metavar="DIR", help="What to write; it must not exist yet.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name in the run.")]
Force = Annotated[bool, typer.Option("--force", help="Accept a base that the adapter was not made for.")]


@export_app.command()
def export(
    ctx: typer.Context,
    run: Run,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="What to write: a folder, or for GGUF a file. It must not exist yet.")
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="peft: a LoRA adapter. merged: the whole edited model. gguf, gguf-model: these two for llama.cpp, as "
            "one file.",
        ),
    ] = "peft",
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Largest rank. [default: the run's lora_rank, or as many as the edits need]"),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="What a bounded rank keeps: weighted or frobenius. [default: the run's lora_criterion]"),
    ] = None,
    pad_for: Annotated[
        str | None, typer.Option(help="Pad with zeros up to a rank that this engine serves: vllm.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Type of a merged model's weights, or of an adapter's factors: float32, float16, bfloat16. gguf: f32, "
            "f16. gguf-model: f32, f16 or q8_0, for the edited weights. [default: that of the base; adapters: float32]",
        ),
    ] = None,
    repository: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="NAME", help="Put the adapter into this repository of the hub, too."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is for everybody to see, not private.")
    ] = False,
    verified: Annotated[
        bool, typer.Option("--verify", help="Compare what was written with the run: what rank and type cost.")
    ] = False,
    base_gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The base as a GGUF file: needed by gguf-model, checked by gguf."),
    ] = None,
) -> None:
    """Write a run's edits as a LoRA adapter, or as a whole model.

    An adapter is exact unless its rank is bounded. It can be loaded without editcore. One for peft contains the single
    edits for 'editctl import'.
    """
    from editcore import HParamsError, UnknownNameError
    from editcore.runs import refuse_existing

    from edit_lora.gguf_kind import refuse_existing_file

    check_run(run)
    (refuse_existing_file if form.startswith("gguf") else refuse_existing)(out)
    choices = {"format": (form, _FORMATS), "criterion": (criterion, _CRITERIA), "engine": (pad_for, _ENGINES)}
    for kind, (asked, known) in choices.items():
        if asked is not None and asked not in known:
            raise UnknownNameError(kind, asked, known)
    options = {
        "rank": rank, "criterion": criterion, "pad-for": pad_for, "dtype": dtype, "base-gguf": base_gguf,
        "push-to-hub": repository, "public": public or None,
    }  # fmt: skip
    _check_options(form, options)
    if verified and form in ("gguf", "gguf-model"):
        from edit_lora.llama_server import check_installed

        if base_gguf is None:
            raise HParamsError("--verify runs the adapter on its base: --base-gguf FILE.")
        check_installed()
    plugins, progress = loaded_plugins(ctx), TerminalProgress()
    match form:
        case "merged":
            from edit_lora.export import export_merged

            export_merged(run, out, dtype=dtype, plugins=plugins, progress=progress)
            typer.echo(f"Edited model: {out}")
        case "gguf-model":
            from edit_lora.gguf_model import export_gguf_model

            assert base_gguf is not None
            replaced = export_gguf_model(run, out, base=base_gguf, dtype=dtype, plugins=plugins, progress=progress)
            print_table(
                ("tensor", "was", "is", "rounding of the edit"),
                [(tensor.name, tensor.was, tensor.now, f"{tensor.rounding:.1%}") for tensor in replaced],
                right=("rounding of the edit",),
            )
            typer.echo(f"Edited model: {out}")
        case _:
            from edit_lora.export import AdapterSize, export_adapter

            size = AdapterSize(rank=rank, criterion=criterion, pad_for=pad_for)
            if form == "gguf":
                from edit_lora.gguf_export import GgufForm, export_gguf

                gguf_form = GgufForm(size=size, half=dtype == "f16", base=base_gguf)
                done = export_gguf(run, out, gguf_form, plugins=plugins, progress=progress)
            else:
                done = export_adapter(run, out, size=size, dtype=dtype or "float32", plugins=plugins, progress=progress)
            _print_exported(done)
            typer.echo(f"Adapter of rank {done.rank} with {_edits(done.edits)}: {out}")
    if verified:
        from edit_lora.place import Place
        from edit_lora.serving_commands import verify_and_print

        verify_and_print(ctx, run, Place(target=str(out), base_gguf=base_gguf))
    if repository is not None:
        from edit_lora.hub import push

        address = push(out, repository, public=public)
        typer.echo(f"On the hub, {'public' if public else 'private'} if it is new: {address}")


def _check_options(form: str, options: Mapping[str, object]) -> None:
    """Refuse options that a format does not have, and types and files that it cannot take."""
    from editcore import HParamsError, UnknownNameError

    if used := [option for option, value in options.items() if value is not None and option not in _OPTIONS[form]]:
        takers = [name for name, known in _OPTIONS.items() if used[0] in known]
        raise HParamsError(f"--{used[0]} is for --format {' and '.join(takers)}; {_NOT_FOR[form]}.")
    if options["dtype"] is not None and form in _TYPES and options["dtype"] not in _TYPES[form]:
        raise UnknownNameError("type", str(options["dtype"]), _TYPES[form])
    base = options["base-gguf"]
    if form == "gguf-model" and base is None:
        raise HParamsError("--format gguf-model needs the base as a GGUF file: --base-gguf FILE.")
    if isinstance(repository := options["push-to-hub"], str):
        from edit_lora.hub import check_repository

        check_repository(repository)
    elif options["public"]:
        raise HParamsError("--public is for --push-to-hub NAME.")
    if isinstance(base, Path):
        from edit_lora.gguf_kind import kind_of

        kind_of(base)


_ROUNDED = 1e-5
"""What an adapter may lose before it is said. Float32 loses 1e-7 of the edit."""


def _print_exported(done: Exported) -> None:
    if any(lost > _ROUNDED for lost in done.rounding.values()):
        print_table(
            ("module", "rounding of the edit"),
            [(path, f"{lost:.2%}") for path, lost in done.rounding.items()],
            right=("rounding of the edit",),
        )
    if all(reduction.whole for reduction in done.modules.values()):
        return
    print_table(
        ("weight", "rank", "of", "kept on text", "at the keys", "of ‖Δ‖²"),
        [
            (
                name,
                reduction.delta.rank,
                reduction.exact_rank,
                *(
                    "-" if kept is None else f"{kept:.1%}"
                    for kept in (reduction.kept_weighted, reduction.kept_keys, reduction.kept_frobenius)
                ),
            )
            for name, reduction in done.modules.items()
        ],
        right=("rank", "of", "kept on text", "at the keys", "of ‖Δ‖²"),
    )


@import_app.command("import")
def import_(
    ctx: typer.Context,
    adapter: Folder,
    out: New,
    model: Annotated[str | None, typer.Option(help="The base. [default: the one that the adapter names]")] = None,
    editor: Annotated[
        str | None, typer.Option(help="For further edits, where the adapter names none. [default: the model's]")
    ] = None,
    force: Force = False,
) -> None:
    """Read an adapter back into a run directory.

    An adapter of 'editctl export' brings its edits one by one. Any other plain LoRA of linear modules and embeddings
    becomes one batch of unknown facts.
    """
    from editcore.models import look_at
    from editcore.runs import refuse_existing

    from edit_lora.config_file import read_config

    refuse_existing(out)
    read_config(adapter)
    if model is not None:
        look_at(model)

    from edit_lora.imports import ImportOptions, import_adapter

    done = import_adapter(
        adapter,
        out,
        options=ImportOptions(model=model, editor=editor, force=force),
        plugins=loaded_plugins(ctx),
        progress=TerminalProgress(),
    )
    what = _edits(done.edits) if done.edits else "unknown facts"
    batches = "1 batch" if done.batches == 1 else f"{done.batches} batches"
    typer.echo(f"Run with {what} in {batches} on {done.model}: {out}")


@adapters_app.callback()
def adapters() -> None:
    """Attach, scale, combine and merge LoRA adapters.

    A run made with --plugin lora takes any number of adapters beside its edits.
    """


@adapters_app.command("list")
def list_(run: Run) -> None:
    """List the adapters that are attached to a run."""
    check_run(run)

    from edit_lora.attached import read_attached

    rows = []
    for name, kept in read_attached(run).items():
        adapter = kept.adapter()
        rows.append((name, f"{kept.scale:g}", adapter.rank, len(adapter.factors), kept.source))
    if not rows:
        typer.echo(f"{run} has no adapters beside its edits.")
        return
    print_table(("name", "scale", "rank", "modules", "from"), rows, right=("scale", "rank", "modules"))


@adapters_app.command()
def show(adapter: Folder) -> None:
    """Say what an adapter is made for and what it changes."""
    _check_adapters([adapter])

    from edit_lora.adapter import Adapter

    found = Adapter.read(adapter)
    typer.echo(f"base: {found.base_model or 'unknown'}")
    typer.echo(f"fingerprint: {found.base_fingerprint or 'unknown'}")
    print_table(
        ("module", "rank", "‖Δ‖"),
        [(path, delta.rank, f"{delta.norm():.4g}") for path, delta in found.factors.items()],
        right=("rank", "‖Δ‖"),
    )


@adapters_app.command()
def attach(
    run: Run,
    adapter: Folder,
    name: Annotated[str | None, typer.Option(help="Its name in the run. [default: the folder's]")] = None,
    scale: Annotated[float, typer.Option(help="Its strength.")] = 1.0,
    force: Force = False,
) -> None:
    """Put an adapter beside a run's edits.

    The run keeps a copy. 'editctl generate' and whatever else opens the run sees it.
    """
    check_run(run)
    _check_adapters([adapter])

    from edit_lora.adapter import Adapter, check_name
    from edit_lora.attached import check_attachable, keep

    found = Adapter.read(adapter)
    name = name if name is not None else adapter.resolve().name
    check_name(name)
    check_attachable(run, found, force=force)
    keep(run, name, adapter, scale=scale, forced=force)
    typer.echo(f"Attached {name} at strength {scale:g} to {run}")


@adapters_app.command()
def detach(run: Run, name: Name) -> None:
    """Remove an adapter from a run."""
    check_run(run)

    from edit_lora.attached import remove

    remove(run, name)
    typer.echo(f"Detached {name} from {run}")


@adapters_app.command()
def scale(
    run: Run, name: Name, strength: Annotated[float, typer.Argument(metavar="STRENGTH", help="0 switches it off.")]
) -> None:
    """Set the strength of an attached adapter."""
    check_run(run)

    from edit_lora.attached import rescale

    rescale(run, name, strength)
    typer.echo(f"{name} has strength {strength:g} in {run}")


@adapters_app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Folders with adapter_config.json.")],
    out: New,
    weights: Annotated[
        list[float] | None, typer.Option("--weight", metavar="W", help="One per adapter, in their order. [default: 1]")
    ] = None,
    force: Force = False,
) -> None:
    """Combine several adapters into one.

    Ranks add up (peft's 'cat'); nothing is lost.
    """
    from editcore.runs import new_folder, refuse_existing

    refuse_existing(out)
    _check_adapters(adapters)
    strengths = _weights(weights, len(adapters))

    from edit_lora.adapter import Adapter, combine as combined

    found = [Adapter.read(adapter) for adapter in adapters]
    made = combined(found, strengths, force=force)
    with new_folder(out) as folder:
        made.write(folder)
    typer.echo(f"Adapter of rank {made.rank}: {out}")


@adapters_app.command()
def merge(
    ctx: typer.Context,
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Folders with adapter_config.json.")],
    out: New,
    model: Annotated[str | None, typer.Option(help="The base. [default: the one that the first adapter names]")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the weights. [default: that of the base's folder]")
    ] = None,
    weights: Annotated[
        list[float] | None, typer.Option("--weight", metavar="W", help="One per adapter, in their order. [default: 1]")
    ] = None,
    force: Force = False,
) -> None:
    """Write a whole model with adapters in its weights."""
    from editcore.models import check_dtype, look_at
    from editcore.runs import refuse_existing

    refuse_existing(out)
    _check_adapters(adapters)
    strengths = _weights(weights, len(adapters))
    if dtype is not None:
        check_dtype(dtype)
    if model is not None:
        look_at(model)

    from editcore import LanguageModel, ModelError
    from editcore.models import dtype_of

    from edit_lora.adapter import Adapter
    from edit_lora.backend import LoraBackend
    from edit_lora.hparams import LoraHParams

    found = [Adapter.read(adapter) for adapter in adapters]
    asked = None if dtype is None else dtype_of(dtype)
    name = model or found[0].source
    if not name:
        raise ModelError(f"{adapters[0]} does not say which model it is for; name it with --model.")
    base = LanguageModel.load(name, families=loaded_plugins(ctx).family_paths(), progress=TerminalProgress())
    backend = LoraBackend(LoraHParams())
    backend.open(base)
    for number, (adapter, strength) in enumerate(zip(found, strengths, strict=True)):
        backend.attach(f"adapter-{number}", adapter, scale=strength, force=force)
    with base.held_as(base.saved_dtype if asked is None else asked), backend.written():
        base.save(out)
    typer.echo(f"Model: {out}")


def _weights(given: list[float] | None, count: int) -> list[float]:
    from editcore import HParamsError

    if given is not None and len(given) != count:
        raise HParamsError(f"{count} adapters were given and {len(given)} weights; give --weight once per adapter.")
    return given if given is not None else [1.0] * count


def check_run(run: Path) -> None:
    """What is wrong with files is told before torch is imported, which takes seconds."""
    from editcore.runs import RunRecord

    RunRecord.read(run)


def _check_adapters(folders: list[Path]) -> None:
    from edit_lora.config_file import read_config

    for folder in folders:
        read_config(folder)


def _edits(count: int) -> str:
    return f"{count} edit" if count == 1 else f"{count} edits"
