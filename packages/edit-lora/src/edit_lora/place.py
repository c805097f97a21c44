"""Where edits are served, and how much is asked there. Checked without torch."""

from __future__ import annotations

import contextlib
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from editcore import ModelError
from editcore.models import JsonServer, RefusedError

from edit_lora.config_file import CONFIG_NAME
from edit_lora.gguf_kind import kind_of
from edit_lora.llama_server import check_installed

__all__ = ["Place", "Sample", "check_address", "check_place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What is to be verified, and where."""

    target: str
    """The address of a server, a GGUF file, or the folder of an adapter or a model."""
    name: str | None = None
    """The adapter, as a server calls it; without adapters, the model."""
    base: str | None = None
    """The model without the edits, as a server calls it."""
    base_gguf: Path | None = None
    """The base as a GGUF file."""
    merged: bool = False
    """The model of a llama-server has the edits in its weights."""
    key: str | None = None
    """Sent to a server as a bearer token."""
    timeout: float = 60.0
    """Seconds that an answer may take."""

    @property
    def server(self) -> JsonServer:
        """The server at that address."""
        return JsonServer(url=self.target.rstrip("/").removesuffix("/v1"), key=self.key, timeout=self.timeout)

    @property
    def is_url(self) -> bool:
        """Whether it is the address of a server."""
        return self.target.startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How much is asked."""

    facts: int = 40
    neighbours: int = 40
    tokens: int = 8
    """The most tokens of an answer."""


def check_place(place: Place) -> None:
    """Refuse a place that is not one, before a model is loaded.

    Raises:
        ModelError: there is no such file or folder, the base or llama.cpp is missing, or no server answers.
    """
    if place.is_url:
        check_address(place.target)
        with contextlib.suppress(RefusedError):  # not every server lists its models
            place.server.get("/v1/models")
        return
    path = Path(place.target)
    if (path / CONFIG_NAME).is_file() or (path / "config.json").is_file():
        return
    if not path.is_file():
        raise ModelError(
            f"'{place.target}' is neither the address of a server (http://...), nor a GGUF file, nor the folder of "
            f"an adapter ({CONFIG_NAME}) or of a model (config.json)."
        )
    if kind_of(path) == "adapter" and place.base_gguf is None:
        raise ModelError(f"{path} is an adapter; name the GGUF file of its base, too: --base-gguf FILE.")
    check_installed()
    if place.base_gguf is not None and kind_of(place.base_gguf) == "adapter":
        raise ModelError(f"{place.base_gguf} is an adapter; --base-gguf is the file of the model that it is for.")


def check_address(url: str) -> None:
    """Refuse what is no address.

    Raises:
        ModelError: it names no server.
    """
    found = urllib.parse.urlsplit(url)
    if found.scheme not in ("http", "https") or not found.hostname:
        raise ModelError(f"'{url}' is not the address of a server; one looks like http://localhost:8000.")
