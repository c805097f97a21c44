"""Announces the backend ``lora`` and its commands; imports no torch."""

from editcore import BackendSpec, CommandSpec, hookimpl


@hookimpl
def editcore_backends() -> list[BackendSpec]:
    """The backend, with its hyperparameters."""
    summary = "Keep edits beside the weights, as a LoRA adapter."
    return [BackendSpec("lora", "edit_lora.backend:LoraBackend", hparams="edit_lora.hparams:LoraHParams", summary=summary)]


@hookimpl
def editcore_commands() -> list[CommandSpec]:
    """From runs to adapters and back."""
    return [
        CommandSpec("export", "edit_lora.commands:export_app", summary="Write a run's edits as a LoRA adapter or a model."),
        CommandSpec("import", "edit_lora.commands:import_app", summary="Read an adapter back into a run directory."),
        CommandSpec("adapters", "edit_lora.commands:adapters_app", summary="Attach, scale, combine and merge adapters."),
    ]
