"""Announces the editor ``template-name``; imports no torch."""

from editcore import Capabilities, EditorSpec, hookimpl


@hookimpl
def editcore_editors() -> list[EditorSpec]:
    """The editor, with its hyperparameters and presets."""
    return [
        EditorSpec(
            "template-name",
            "edit_template_name.editor:TemplateNameEditor",
            hparams="edit_template_name.hparams:TemplateNameHParams",
            presets="edit_template_name.presets",
            summary="TEMPLATE SUMMARY",
            capabilities=Capabilities(uses_weights=True, uses_held=True, multi_layer=True),
        )
    ]
