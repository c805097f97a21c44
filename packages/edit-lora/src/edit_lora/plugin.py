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
    """The study of the adapter's rank."""
    study = "Rank, fit steps and truncation of the adapter."
    return [ComponentSpec("lora", "edit_lora.studies:lora.toml", kind="study", summary=study)]


@hookimpl
def editcore_commands() -> list[CommandSpec]:
    """The commands that turn runs into adapters and back."""
    module = "edit_lora.commands"
    return [
        CommandSpec("export", f"{module}:export_app", summary="Write a run's edits as a LoRA adapter or a model."),
        CommandSpec("import", f"{module}:import_app", summary="Read an adapter back into a run directory."),
        CommandSpec("adapters", f"{module}:adapters_app", summary="Attach, scale, combine and merge LoRA adapters."),
    ]
