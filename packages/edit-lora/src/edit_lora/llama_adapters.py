"""The adapters that a llama-server has loaded. Asked without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editcore import ModelError
from editcore.models import JsonServer, RefusedError

__all__ = ["adapter_name", "find_adapter", "loaded_adapters"]

_NOT_THERE = (404, 405, 501)


def loaded_adapters(server: JsonServer) -> list[Mapping[str, Any]] | None:
    """The adapters of a llama-server; ``None`` for another server.

    Raises:
        ModelError: the server does not answer.
    """
    try:
        found = server.get("/lora-adapters")
    except RefusedError as error:
        if error.status in _NOT_THERE:
            return None
        raise
    return list(found) if isinstance(found, list) else None


def adapter_name(adapter: Mapping[str, Any]) -> str:
    """The name of a llama-server's adapter: that of its file."""
    return str(adapter.get("path", "")).replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")


def find_adapter(adapters: Sequence[Mapping[str, Any]], name: str | None, *, url: str) -> Mapping[str, Any]:
    """The adapter of that name, or the only one.

    Raises:
        ModelError: there is none, or it is not clear which.
    """
    names = [adapter_name(adapter) for adapter in adapters]
    fitting = [adapter for adapter in adapters if name in (None, adapter_name(adapter), adapter.get("path"))]
    if len(fitting) == 1:
        return fitting[0]
    if not adapters:
        raise ModelError(
            f"The llama-server at {url} has no adapter loaded. Start it with --lora FILE --lora-init-without-apply "
            "(FILE is of 'editctl export --format gguf'), or say --merged if the edits are in its model's weights."
        )
    asked = "it was not said which is meant" if name is None else f"not one '{name}'"
    raise ModelError(f"The llama-server at {url} has the adapters {', '.join(names)}, and {asked}: --name NAME.")
