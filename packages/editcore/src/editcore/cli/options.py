"""Options that several commands share, and commands that get their options as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

__all__ = [
    "AsJson",
    "ChatTemplate",
    "Corpus",
    "CorpusSeed",
    "Device",
    "Dtype",
    "ExecutorSettings",
    "ModelArgument",
    "ModelOption",
    "RunDevice",
    "Save",
    "SaveDtype",
    "Strict",
    "options_given",
    "refuse_used_save",
    "with_options",
]

_MODEL = "A catalogue name, a model folder or a hub id."

ModelArgument = Annotated[str, typer.Argument(help=_MODEL)]
ModelOption = Annotated[str, typer.Option(help=_MODEL)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: over all accelerators.")]
RunDevice = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, or auto: over all accelerators. [default: the run's]")
]
Dtype = Annotated[str, typer.Option(help="Type of the weights.")]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Put the model's chat template around every prompt (instruct models).")
]
Corpus = Annotated[str, typer.Option(help="Text for the second moments: self, docs, hf:NAME or a file.")]
CorpusSeed = Annotated[int, typer.Option(min=0, help="Seed of the text 'self', the same for every --seed.")]
ExecutorSettings = Annotated[
    list[str] | None, typer.Option("--executor-set", metavar="KEY=VALUE", help="A setting of the executor.")
]
Save = Annotated[Path | None, typer.Option(metavar="DIR", help="Write the edited model as a normal model folder.")]
SaveDtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="Type of the weights that --save writes. [default: that of the model's folder]"),
]

Strict = Annotated[
    bool | None,
    typer.Option("--strict", help="Refuse data with records that cannot be edited. [default: leave them out]"),
]


def refuse_used_save(save: Path | None, dtype: str | None = None) -> None:
    """Refuse an existing folder for ``--save`` and an unknown type for ``--save-dtype`` before long work starts.

    Raises:
        StorageError: the path exists.
        HParamsError: ``--save-dtype`` without ``--save``.
        UnknownNameError: the type is unknown.
    """
    from editcore._util.folders import refuse_existing
    from editcore.interfaces.errors import HParamsError

    if save is not None:
        refuse_existing(save, option="--save")
    if dtype is not None:
        if save is None:
            raise HParamsError("--save-dtype is the type that --save DIR writes; give both.")
        from editcore.models.loading import dtype_of

        dtype_of(dtype)


def options_given(ctx: typer.Context, names: Iterable[str]) -> list[str]:
    """The parameters among ``names`` that stand on the command line, as they are spelt there."""
    spelling = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return [spelling[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def with_options(
    options: type[Any], *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as options, in place of its parameter ``options``.

    A parameter of the command replaces the field of the same name. The command is called with an object of the class.

    Args:
        without: fields that the command does not offer; they keep their defaults.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        shared = {name: option for name, option in _parameters(options).items() if name not in {*own, *without}}

        def called(**values: Any) -> None:
            given = options(**{name: values.pop(name) for name in shared})
            command(**values, options=given)

        parameters = [
            option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.items()
            for option in (shared.values() if name == "options" else (parameter,))
        ]
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorated


def _parameters(options: type[Any]) -> dict[str, inspect.Parameter]:
    types = get_type_hints(options, include_extras=True)
    return {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=types[field.name],
        )
        for field in fields(options)
    }
