"""Announces the extension ``trust``; imports no torch."""

from editcore import ComponentSpec, ExtensionSpec, hookimpl


@hookimpl
def editcore_extensions() -> list[ExtensionSpec]:
    """The extension, with its hyperparameters."""
    return [
        ExtensionSpec(
            "trust",
            "edit_trust.extension:TrustExtension",
            hparams="edit_trust.hparams:TrustHParams",
            summary="Judge every batch before it is kept, and leave out the facts that do harm.",
            settles_conflicts=True,
        )
    ]


@hookimpl
def editcore_components() -> list[ComponentSpec]:
    """The study of the gate."""
    study = "Threshold and action of the gate."
    return [ComponentSpec("trust", "edit_trust.studies:trust.toml", kind="study", summary=study)]
