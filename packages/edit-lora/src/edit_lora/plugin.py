"""Announces the backend ``lora`` and its commands; imports no torch."""

from editcore import BackendSpec, CommandSpec, ComponentSpec, hookimpl

from edit_lora.offers import COMMANDS, COMPONENTS


@hookimpl
def editcore_backends() -> list[BackendSpec]:
    """The backend, with its hyperparameters."""
    return [
        BackendSpec(
            "lora",
            "edit_lora.backend:LoraBackend",
            hparams="edit_lora.hparams:LoraHParams",
            takes=frozenset({"factored", "dense", "attachment"}),
            summary="Keep edits beside the weights, as a LoRA adapter.",
        )
    ]


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """The study of the adapter's rank, and what reads adapters that are evaluated."""
    return [ComponentSpec("lora", target, kind=kind, summary=summary) for target, kind, summary in COMPONENTS]


@hookimpl
def editcore_commands() -> list[CommandSpec]:
    """The commands that turn runs into adapters and back."""
    return [CommandSpec(name, f"edit_lora.{target}", summary=summary) for name, target, summary in COMMANDS]
