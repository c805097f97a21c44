"""Announces the backend ``lora`` and its commands; imports no torch."""

from editcore import BackendSpec, CommandSpec, ComponentSpec, hookimpl


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
    return [
        ComponentSpec("lora", "edit_lora.studies:lora.toml", kind="study", summary="Rank and fit of the adapter."),
        ComponentSpec(
            "lora", "edit_lora.reading:read_adapter", kind="adapter.reader", summary="Reads folders of LoRA adapters."
        ),
    ]


@hookimpl
def editcore_commands() -> list[CommandSpec]:
    """The commands that turn runs into adapters and back."""
    return [CommandSpec(name, f"edit_lora.{target}", summary=summary) for name, target, summary in _COMMANDS]


_COMMANDS = (
    ("export", "commands:export_app", "Write a run's edits as a LoRA adapter or a model."),
    ("import", "commands:import_app", "Read an adapter back into a run directory."),
    ("adapters", "commands:adapters_app", "Attach, scale, combine and merge LoRA adapters."),
    ("deploy", "serving_commands:deploy_app", "Give a run's adapter to a running server."),
    ("verify-served", "serving_commands:verify_app", "Compare what is served with a run's own answers."),
)
