"""Announces the extension ``template-name``; imports no torch."""

from editcore import ExtensionSpec, hookimpl


@hookimpl
def editcore_extensions() -> list[ExtensionSpec]:
    """The extension, with its hyperparameters."""
    return [
        ExtensionSpec(
            "template-name",
            "edit_template_name.extension:TemplateNameExtension",
            hparams="edit_template_name.hparams:TemplateNameHParams",
            summary="TEMPLATE SUMMARY",
        )
    ]
