"""Options that several commands have, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    "refuse_used_save",
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
Corpus = Annotated[str, typer.Option(help="Text behind the second moments: self, docs, hf:NAME or a file.")]
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
    """Refuse a folder for ``--save`` that is there already, and a type that no weights can have, before anything long.

    Raises:
        RunError: there is something at that place.
        HParamsError: ``--save-dtype`` without ``--save``.
        UnknownNameError: there is no such type.
    """
    from editcore.interfaces.errors import HParamsError, RunError

    if save is not None and save.exists() and any(save.iterdir() if save.is_dir() else [save]):
        raise RunError(f"--save {save} is already there; give a directory that does not exist yet.")
    if dtype is not None:
        if save is None:
            raise HParamsError("--save-dtype is the type that --save DIR writes; give both.")
        from editcore.models.loading import dtype_of

        dtype_of(dtype)
