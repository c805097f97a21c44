"""Loads model and tokenizer from a folder, the catalogue or the hub, and refuses what cannot be edited."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from editcore._util.memory import is_out_of_memory
from editcore.interfaces.errors import ModelError
from editcore.interfaces.progress import Progress
from editcore.models.catalogue import CATALOGUE
from editcore.models.fetching import pull
from editcore.models.progress_bars import quiet_transformers
from editcore.models.sources import (
    DTYPE_NAMES,
    check_dtype,
    hub_may_answer,
    look_at,
    no_such_model,
    source_folder,
)

__all__ = [
    "DTYPES",
    "device_of",
    "dtype_of",
    "is_slow",
    "load_config",
    "load_tokenizer",
    "load_weights",
    "one_line",
    "prepare_tokenizer",
    "put_on",
    "refuse_offloaded",
    "refuse_without_float64",
    "source_of",
    "stored_dtype",
]

_log = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""By name, the types that weights can be loaded as."""
_MESSAGE_LENGTH = 240
"""Characters of another library's message that ours shows."""


def one_line(error: BaseException) -> str:
    """The message of an error, in one line and not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[: _MESSAGE_LENGTH - 3]}..."


def _bars() -> contextlib.AbstractContextManager[None]:
    """Progress bars of downloads from the hub, on a terminal only."""
    return contextlib.nullcontext() if sys.stderr.isatty() else quiet_transformers()


def device_of(name: str) -> torch.device:
    """A device by its name.

    Raises:
        ModelError: it cannot be used here, or has no float64.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu"]
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None and _has_float64(accelerator):
            available.append(str(accelerator))
        available.append("auto")
        raise ModelError(f"Device '{name}' cannot be used here. Available: {', '.join(available)}.") from error
    refuse_without_float64([device])
    return device


def refuse_without_float64(devices: Iterable[torch.device]) -> None:
    """Refuse devices that cannot compute in float64.

    Raises:
        ModelError: one of them cannot.
    """
    for device in devices:
        if not _has_float64(device):
            raise ModelError(
                f"Device '{device}' has no float64, in which changes of weights are solved and summed, so nothing can "
                "be edited there. Use --device cpu."
            )


def _has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:  # MPS raises a TypeError
        if is_out_of_memory(error):
            raise
        return False
    return True


_SLOW = 4
"""A type is called slow if its matrix products take this many times as long as those of float32."""


@functools.cache
def _times_slower(dtype: torch.dtype) -> float:
    """How many times as long as in float32 the matrix products of forward and backward passes take on the CPU.

    Measured once, in a few milliseconds; 1 for float32 and wider types.
    """
    if dtype.itemsize >= torch.float32.itemsize:
        return 1.0
    return _product_seconds(dtype) / _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """The shortest time of six tries."""
    rows, weight, taken = torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        (rows @ weight.T) @ weight
        taken.append(time.perf_counter() - start)
    return min(taken)


def is_slow(dtype: torch.dtype, name: str) -> bool:
    """Whether this processor computes slowly in a type. If so, it is told what is done about it."""
    times = _times_slower(dtype)
    if times > _SLOW:
        _log.warning(
            "%s is %.0f times slower than float32 on this processor, which has no instructions for it. The model "
            "computes in float32, with weights that hold the numbers of %s; they take the memory of float32.",
            name,
            times,
            name,
        )
    return times > _SLOW


def put_on(hf: Any, device: torch.device, *, name: str) -> Any:
    """Move a model to a device.

    Raises:
        ModelError: it does not fit, or cannot be moved there.
    """
    try:
        return hf.to(device)
    except RuntimeError as error:
        what = "does not fit" if is_out_of_memory(error) else "cannot be put"
        raise ModelError(f"'{name}' {what} on device '{device}': {one_line(error)}") from error


def dtype_of(name: str) -> torch.dtype:
    """A type of numbers by its name.

    Raises:
        UnknownNameError: a model cannot have it.
    """
    check_dtype(name)
    return DTYPES[name]


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The type of the weights in a folder, as its configuration says; ``None`` where it says none that is known."""
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    names = [part.get("dtype") or part.get("torch_dtype") for part in (config, *nested)]
    return next((DTYPES[name] for name in names if isinstance(name, str) and name in DTYPES), None)


def source_of(name: str, progress: Progress) -> str:
    """The folder or hub id that transformers loads. A catalogue model is fetched if it is not here yet.

    Raises:
        ModelError: there is no such model, or it cannot be fetched or edited.
    """
    if name in CATALOGUE:
        return str(pull(name, progress=progress))
    look_at(name)
    folder = source_folder(name)
    return name if folder is None else str(folder)


def load_config(source: str, name: str) -> Mapping[str, Any]:
    """The configuration as it is in its file, before transformers changes it to the form of its version."""
    from transformers import PreTrainedConfig

    config, _ = _from_pretrained(PreTrainedConfig.get_config_dict, source, name, "configuration")
    found: Mapping[str, Any] = config
    return found


def load_tokenizer(source: str, name: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    return _from_pretrained(
        AutoTokenizer.from_pretrained, source, name, "tokenizer", trust_remote_code=trust_remote_code
    )


def load_weights(source: str, name: str, dtype: torch.dtype, **arguments: Any) -> Any:
    """The causal language model, with its weights in ``dtype``."""
    from transformers import AutoModelForCausalLM

    return _from_pretrained(AutoModelForCausalLM.from_pretrained, source, name, "model", dtype=dtype, **arguments)


def refuse_offloaded(hf: Any, name: str) -> None:
    """Refuse weights that are fetched from the CPU or the disk for every pass: there is no place to change them.

    Raises:
        ModelError: there are some.
    """
    parameters = list(hf.parameters())
    if offloaded := sum(parameter.is_meta for parameter in parameters):
        raise ModelError(
            f"{name} does not fit the accelerators here: {offloaded} of its {len(parameters)} weights are offloaded, "
            "and what is fetched for every pass cannot be edited. Use more accelerators, a smaller type (bfloat16), or "
            "the device cpu."
        )


def _from_pretrained(load: Any, source: str, name: str, what: str, **arguments: Any) -> Any:
    from_hub = not Path(source).is_dir()
    offline = from_hub and not hub_may_answer()
    if offline:
        arguments["local_files_only"] = True  # from the cache of the hub's library; asking would retry for a minute
    try:
        with _bars() if from_hub else quiet_transformers():
            return load(source, **arguments)
    except MemoryError as error:
        raise ModelError(f"There is not enough memory to load '{name}'.") from error
    except (
        OSError,
        ValueError,
        ImportError,
        KeyError,
        RuntimeError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        if not from_hub:
            raise ModelError(f"The {what} in '{name}' cannot be loaded: {one_line(error)}") from error
        raise no_such_model(name, said=None if offline else one_line(error)) from error


def prepare_tokenizer(tokenizer: Any, hf: Any, name: str) -> None:
    """Check that a tokenizer fits its model, and give it a padding token if it has none.

    Raises:
        ModelError: it gives no character offsets, has more tokens than the model embeds, or no token can pad.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer of {name} ({type(tokenizer).__name__}) gives no character offsets, which are needed to "
            "find a subject. Use its fast version (a folder with tokenizer.json)."
        )
    rows = hf.get_input_embeddings().weight.shape[0]
    # A few added tokens without a row are common (Gemma 3 has one for images); a whole vocabulary is a mistake.
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"The tokenizer of {name} has {tokenizer.vocab_size} tokens, but the model embeds {rows}: they do not "
            "belong together."
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        stand_ins = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        known = [token for token in stand_ins if token is not None and tokenizer.convert_tokens_to_ids(token) < rows]
        if not known:
            raise ModelError(
                f"The tokenizer of {name} has no padding token that the model embeds, and no end token to stand in for "
                "it."
            )
        tokenizer.pad_token = known[0]
