"""``editctl edit``: writes one fact and shows what changes."""

from __future__ import annotations

from typing import Annotated

import typer

from editcore.cli.lazy import loaded_plugins
from editcore.cli.options import (
    ChatTemplate,
    Corpus,
    CorpusSeed,
    Device,
    Dtype,
    ModelOption,
    Save,
    SaveDtype,
    refuse_used_save,
)

__all__ = ["app"]

app = typer.Typer()


@app.command()
def edit(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Option(help="A sentence opening with {} for the subject: '{} is a city in'.")],
    target: Annotated[str, typer.Option(help="Text that should follow the prompt.")],
    join: Annotated[
        str | None,
        typer.Option(
            help="Text between the prompt and the target. [default: a space, and nothing behind white space, "
            "opening quotes and brackets, and scripts without spaces]"
        ),
    ] = None,
    subject: Annotated[
        str, typer.Option(help="The entity that {} stands for. [default: none, for editors that need none]")
    ] = "",
    editor: Annotated[
        str | None, typer.Option(help="The editing method. [default: the first that has a preset for the model]")
    ] = None,
    model: ModelOption = "smollm2-135m",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    preset: Annotated[str | None, typer.Option(help="The editor's preset.")] = None,
    chat_template: ChatTemplate = False,
    corpus: Corpus = "self",
    corpus_seed: CorpusSeed = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random but the second moments' text.")] = 0,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter of the editor.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to show.")] = 20,
    save: Save = None,
    save_dtype: SaveDtype = None,
) -> None:
    """Write one fact and compare what the model says."""
    from editcore.cli.run import settings_from
    from editcore.interfaces.values import EditRequest
    from editcore.runs.config import SessionConfig
    from editcore.runs.early import check_session
    from editcore.runs.fit import check_savable, check_subjects, with_needed_parts
    from editcore.runs.resolved import default_editor

    request = EditRequest.create(subject=subject, prompt=prompt, target_new=target, join=join)
    refuse_used_save(save, save_dtype)
    plugins = loaded_plugins(ctx)
    editor = editor or default_editor(plugins, model)
    config = SessionConfig.create(
        {
            "editor": editor,
            "preset": preset,
            "settings": settings_from(assignments or [], {}, editor=editor),
            "corpus": corpus,
            "corpus_seed": corpus_seed,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "chat_template": chat_template,
        }
    )
    check_subjects([request], plugins.editor(editor))
    if save is not None:
        check_savable(plugins, editor, with_needed_parts(plugins, editor, (), None)[1])
    check_session(plugins, model, config)

    from editcore.cli.console import TerminalProgress, print_table
    from editcore.runs.session import EditSession

    session = EditSession.open(model, config, registry=plugins, progress=TerminalProgress())
    before = session.generate([request.text], max_new_tokens=tokens)[0]
    (result,) = session.edit([request])
    after = session.generate([request.text], max_new_tokens=tokens)[0]
    (evidence, *_) = result.proposal.evidence
    shown = session.model.prompt_form.shown
    print_table(("", "text"), [("before", shown(request.text, before)), ("after", shown(request.text, after))])
    names = ("steps", "target_probability", "said_probability")
    steps, found, said = (evidence.figures.get(name) for name in names)
    typer.echo(
        f"\n{result.seconds:.1f} s"
        + (f", {steps:.0f} steps" if steps else "")
        + (f"; probability of '{request.target_new}' when its optimisation ended: {found:.2f}" if found else "")
        + (f"; after the prompt, as the model is now: {said:.2f}" if said is not None else "")
    )
    for note in filter(None, [*result.proposal.notes, result.not_said]):
        typer.echo(f"Note: {note}")
    if save is not None:
        session.save(save, dtype=save_dtype)
        typer.echo(f"Edited model: {save}")
