"""The components and commands that the package offers; imports no torch."""

__all__ = ["COMMANDS", "COMPONENTS"]

COMPONENTS = (
    ("edit_lora.studies:lora.toml", "study", "Rank and fit of the adapter."),
    ("edit_lora.reading:read_adapter", "adapter.reader", "Reads folders of LoRA adapters."),
)

COMMANDS = (
    ("export", "commands:export_app", "Write a run's edits as a LoRA adapter or a model."),
    ("import", "commands:import_app", "Read an adapter back into a run directory."),
    ("adapters", "commands:adapters_app", "Attach, scale, combine and merge LoRA adapters."),
    ("deploy", "serving_commands:deploy_app", "Give a run's adapter to a running server."),
    ("verify-served", "serving_commands:verify_app", "Compare what is served with a run's own answers."),
)
