"""What the name of a model stands for, before anything is loaded.

Nothing here imports torch or transformers, so that a wrong name is refused at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editcore._util.origin import read_object
from editcore._util.paths import hub_snapshot
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, ModelError, UnknownNameError
from editcore.models.catalogue import CATALOGUE, model_folder

__all__ = [
    "DTYPE_NAMES",
    "HubModel",
    "check_dtype",
    "check_layer",
    "hub_may_answer",
    "hub_model",
    "look_at",
    "no_such_model",
    "num_blocks",
    "refuse_quantised",
    "source_folder",
]

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
"""What weights can be loaded as."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
ADAPTER_CONFIG = "adapter_config.json"
"""The file by which a folder is known as an adapter of peft."""


@documented
@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub, where everybody can find it."""

    id: str
    """``organisation/name``."""
    revision: str | None = None
    """The commit, where it is known."""


def source_folder(name: str) -> Path | None:
    """The folder that a model's name stands for; ``None`` for a name of the catalogue and for a hub id."""
    path = Path(name).expanduser()
    return path if name not in CATALOGUE and path.is_dir() else None


def hub_model(name: str, commit: str | None = None) -> HubModel | None:
    """The model on the hub that a name stands for; ``None`` for a folder that is not from the hub.

    It is the model that a catalogue entry was made from, the model whose snapshot a folder of the hub's cache is, or
    the hub id itself.

    Args:
        commit: of the files that were loaded, where it is known.
    """
    if name in CATALOGUE:
        entry = CATALOGUE[name]
        return HubModel(entry.hub_id, entry.hub_revision) if entry.hub_id else None
    if (folder := source_folder(name)) is not None:
        found = hub_snapshot(folder)
        return None if found is None else HubModel(*found)
    return HubModel(name, commit) if name.count("/") <= 1 and not name.startswith((".", "/", "~")) else None


def look_at(name: str) -> None:
    """Refuse a name that stands for no model that can be edited.

    Raises:
        ModelError: it is a file, a run directory, an adapter or a quantised model; a folder without configuration,
            weights or tokenizer; or neither a folder nor a model on the hub. The message says what to give instead.
    """
    if name in CATALOGUE:
        return
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"'{name}' is a file; a model is a folder with config.json, weights and a tokenizer.")
    if path.is_dir():
        _check_folder(path)
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(f"There is no model folder '{name}'.")
    else:
        _ask_hub(name)


def check_dtype(name: str) -> None:
    """Refuse a type that weights cannot be loaded as.

    Raises:
        UnknownNameError: it is none of :data:`DTYPE_NAMES`.
    """
    if name not in DTYPE_NAMES:
        raise UnknownNameError("dtype", name, DTYPE_NAMES)


def num_blocks(name: str) -> int | None:
    """How many decoder blocks a model has, going by the configuration that is on this machine.

    ``None`` where there is none, or where it does not use one of the usual names for the number.
    """
    path = _local_config(name)
    if path is None:
        return None
    config = read_object(path)
    parts = [part for part in (config.get("text_config"), config) if isinstance(part, Mapping)]
    found = (part.get(key) for part in parts for key in ("num_hidden_layers", "n_layer", "num_layers"))
    return next((count for count in found if isinstance(count, int)), None)


def check_layer(layer: int, blocks: int, *, model: str, setting: str) -> None:
    """Refuse a decoder block that a model does not have.

    Args:
        layer: its number.
        blocks: how many the model has.

    Raises:
        HParamsError: ``layer`` is out of range; the message names ``setting``.
    """
    if not 0 <= layer < blocks:
        raise HParamsError(
            f"{setting}: layer {layer} does not exist in {model} (it has {blocks} blocks, 0 to {blocks - 1})."
        )


def _local_config(name: str) -> Path | None:
    folder = model_folder(CATALOGUE[name]) if name in CATALOGUE else source_folder(name)
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no hub id
            return None
        return Path(found) if isinstance(found, str) else None
    path = folder / "config.json"
    return path if path.is_file() else None


def refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    """Refuse quantised weights: there is no full-precision weight to add a change to.

    Args:
        config: the configuration of the model, as it is in its file.

    Raises:
        ModelError: it has a ``quantization_config``.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    by = f" by {method}" if method else ""
    raise ModelError(
        f"'{name}' holds weights that are quantised{by}, which cannot be edited. Edit the full-precision model that it "
        "was made from, write the edits as an adapter ('editctl export', of the package edit-lora), and serve that "
        "adapter on the quantised model."
    )


def _check_folder(path: Path) -> None:
    if (path / ADAPTER_CONFIG).is_file():
        _refuse_adapter(path)
    if not (path / "config.json").is_file():
        _refuse_run(path)
        raise ModelError(f"The folder '{path}' is no model: it has no config.json.")
    refuse_quantised(read_object(path / "config.json"), str(path))
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ModelError(f"The folder '{path}' has a config.json but no weights (*.safetensors or *.bin).")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"The folder '{path}' has no tokenizer (tokenizer.json). Save the tokenizer into it: "
            "tokenizer.save_pretrained(folder)."
        )
    _check_tokenizer_model(path)


def _refuse_run(path: Path) -> None:
    if not (path / "run.json").is_file():
        return
    model = read_object(path / "run.json").get("config", {}).get("model", "a base model")
    raise ModelError(
        f"'{path}' is a run directory: edits of {model}, and no model. 'editctl generate {path} PROMPT' speaks with "
        f"the edited model. To edit it again, write it as a folder (editctl pack {path} FILE, then editctl apply FILE "
        "--save DIR) and give that folder."
    )


def _refuse_adapter(path: Path) -> None:
    base = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f" for {base}" if base else ""
    raise ModelError(
        f"The folder '{path}' is an adapter{of} ({ADAPTER_CONFIG}), and no model. With the package edit-lora, 'editctl "
        f"adapters merge {path} --out DIR' writes the model that base and adapter make together, and 'editctl import "
        f"{path} --out RUN' makes a run of it, which can be edited on."
    )


def _check_tokenizer_model(path: Path) -> None:
    """Refuse a ``tokenizer.model`` alone, if the package that converts it is not installed.

    Raises:
        ModelError: the package is missing.
    """
    file = path / "tokenizer.model"
    if not file.is_file() or any((path / name).is_file() for name in _TOKENIZER_FILES if name != file.name):
        return
    needed = "tiktoken" if _is_tiktoken(file) else "sentencepiece"
    if importlib.util.find_spec(needed) is None:
        raise ModelError(
            f"The folder '{path}' has its tokenizer as tokenizer.model alone, which is read with {needed}, and that is "
            f"not installed. Install with: pip install {needed}, or put the model's tokenizer.json into the folder."
        )


def _is_tiktoken(file: Path) -> bool:
    """Whether the first line is a token in base64 and its rank. Files of sentencepiece are binary."""
    with file.open("rb") as opened:
        token, _, rank = opened.readline(1000).strip().partition(b" ")
    return rank.isdigit() and token.isascii()


def _ask_hub(name: str) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if not hub_may_answer():
            raise no_such_model(name)
        hf_hub_download(name, "config.json")
    except (OSError, ValueError) as error:
        raise no_such_model(name, said=" ".join(str(error).split())) from error


def no_such_model(name: str, *, said: str | None = None) -> ModelError:
    """The error for a name that is not a folder, not in the catalogue and not on the hub.

    Args:
        said: the answer of the hub; ``None`` if it cannot be reached.
    """
    near = difflib.get_close_matches(name, CATALOGUE, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    why = "the model hub cannot be reached" if said is None else f"the model hub did not give it: {said[:240]}"
    return ModelError(
        f"There is no model '{name}': it is no folder, no name of the catalogue ({', '.join(sorted(CATALOGUE))}), "
        f"and {why.rstrip('.')}.{hint}"
    )


def hub_may_answer() -> bool:
    """Whether the hub may be reached: its address resolves, or there is a proxy that may resolve it."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True
