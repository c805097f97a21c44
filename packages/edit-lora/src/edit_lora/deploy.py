"""Hands a run's adapter to a running server, and takes it back if it does not answer as the run does.

vLLM loads and unloads adapters by name, if it was started for that. llama-server loads adapters when it starts, and
their strength can be set later. Nothing is deleted on the server's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editcore import ModelError
from editcore.models import JsonServer, RefusedError

from edit_lora.config_file import CONFIG_NAME, read_config
from edit_lora.llama_adapters import adapter_name, find_adapter, loaded_adapters

__all__ = ["Deployment", "check_llama_server", "check_vllm", "deploy", "start_line", "undo"]

_NOT_FOUND = 404


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """An adapter of a run, and the server that is to serve it."""

    engine: str
    """``vllm`` or ``llama-cpp``."""
    server: JsonServer
    name: str
    """The adapter's name on the server."""
    path: Path
    """The adapter's folder, or for llama.cpp its file."""
    seen_as: str | None = None
    """The same path as the server sees it, if it runs elsewhere."""


def start_line(path: Path) -> str:
    """How a llama-server is started with an adapter that is off at first.

    Without ``--cache-ram 0`` it answers from prompts that it has read with the adapter at another strength.
    """
    return f"llama-server --model BASE.gguf --lora {path} --lora-init-without-apply --cache-ram 0"


def check_vllm(deployment: Deployment) -> None:
    """Refuse a server that is not vLLM or serves something of that name already.

    Raises:
        ModelError: it does, or it does not answer.
    """
    names = _served_names(deployment.server)
    if deployment.name in names:
        raise ModelError(
            f"{deployment.server.url} serves '{deployment.name}' already. Choose another --name, or switch it off with "
            "--undo."
        )


def check_llama_server(deployment: Deployment) -> None:
    """Refuse a server without the adapter.

    Raises:
        ModelError: it has no such adapter, or does not answer.
    """
    _own(deployment)


def deploy(deployment: Deployment) -> None:
    """Switch the adapter on.

    Raises:
        ModelError: the server refuses, in a sentence that says what to change.
    """
    if deployment.engine == "vllm":
        _load(deployment)
    else:
        _set_scale(deployment, 1.0)


def undo(deployment: Deployment) -> None:
    """Switch the adapter off.

    Raises:
        ModelError: the server does not have it, or refuses.
    """
    if deployment.engine != "vllm":
        _set_scale(deployment, 0.0)
        return
    names = _served_names(deployment.server)
    if deployment.name not in names:
        raise ModelError(f"{deployment.server.url} does not serve '{deployment.name}'; it serves {', '.join(names)}.")
    try:
        deployment.server.post("/v1/unload_lora_adapter", {"lora_name": deployment.name})
    except RefusedError as error:
        raise _reason(error, deployment) from error


def _load(deployment: Deployment) -> None:
    body = {"lora_name": deployment.name, "lora_path": deployment.seen_as or str(deployment.path.resolve())}
    try:
        deployment.server.post("/v1/load_lora_adapter", body)
    except RefusedError as error:
        raise _reason(error, deployment) from error


def _reason(error: RefusedError, deployment: Deployment) -> ModelError:
    """What a refusal of vLLM means."""
    url, said = deployment.server.url, error.said.lower()
    if error.status == _NOT_FOUND and said in ("", "not found"):
        return ModelError(
            f"{url} does not load adapters while it runs. Start vLLM with --enable-lora and the environment variable "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or load the adapter at its start: --lora-modules "
            f"{deployment.name}={deployment.path}."
        )
    if "rank" in said:
        rank = read_config(deployment.path).get("r") if (deployment.path / CONFIG_NAME).is_file() else None
        return ModelError(
            f"{url} does not take an adapter of rank {rank}: {error.said} Start vLLM with a larger --max-lora-rank, or "
            "deploy with --rank N, which keeps what matters most."
        )
    if "no adapter found" in said or "no such file" in said:
        return ModelError(
            f"{url} cannot read the adapter at {deployment.seen_as or deployment.path.resolve()}. If the server runs "
            "elsewhere or in a container, put the folder where it can read it, and say where that is with --seen-as."
        )
    return ModelError(f"{url} refuses the adapter: {error.said or error}")


def _served_names(server: JsonServer) -> list[str]:
    try:
        listed = server.get("/v1/models")
        return [str(found["id"]) for found in listed["data"]]
    except (RefusedError, TypeError, KeyError) as error:
        raise ModelError(f"{server.url} does not have vLLM's API: it does not list its models ({error}).") from error


def _own(deployment: Deployment) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    adapters = loaded_adapters(deployment.server)
    if adapters is None:
        raise ModelError(f"{deployment.server.url} is no llama-server: it has no /lora-adapters.")
    if deployment.name not in [adapter_name(adapter) for adapter in adapters]:
        raise ModelError(
            f"The llama-server at {deployment.server.url} has no adapter '{deployment.name}', and loads adapters only "
            f"when it starts: {start_line(deployment.path)}"
        )
    return find_adapter(adapters, deployment.name, url=deployment.server.url), adapters


def _set_scale(deployment: Deployment, scale: float) -> None:
    """Set the strength of the adapter; the others keep theirs."""
    own, adapters = _own(deployment)
    scales = [
        {"id": adapter["id"], "scale": scale if adapter["id"] == own["id"] else adapter["scale"]}
        for adapter in adapters
    ]
    deployment.server.post("/lora-adapters", scales)
