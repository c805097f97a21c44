"""Announces the extension ``trust``; imports no torch."""

from editcore import ExtensionSpec, hookimpl


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
