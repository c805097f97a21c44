"""What can be evaluated: a run directory, a pack of edits, an adapter folder, or a model; each as a model that can be
asked with its edits and without them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from editcore._util.files import json_text
from editcore._util.origin import read_object
from editcore.interfaces.changes import Changes, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, ModelError
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import FactRecord
from editcore.ledger.ledger import Ledger
from editcore.models.options import LoadOptions
from editcore.models.sources import ADAPTER_CONFIG, look_at
from editcore.plugins.calls import boundary, resolve
from editcore.plugins.registry import Plugins
from editcore.runs.evaluation_record import MethodRecord
from editcore.runs.log import read_batches
from editcore.runs.outcome import seconds_per_edit
from editcore.runs.pack_file import read_manifest
from editcore.runs.record import RUN_NAME, ModelRecord, RunRecord, facts_of

if TYPE_CHECKING:
    from editcore.models import EditedModel, LanguageModel

__all__ = [
    "ADAPTER_READER",
    "AdapterReading",
    "Opened",
    "OpenedRecord",
    "Target",
    "TargetOptions",
    "find_target",
    "settings_hash",
]

ADAPTER_READER = "adapter.reader"
"""The kind of component that reads adapter folders: a function that takes the folder and returns an
:class:`AdapterReading`."""

TargetKind = Literal["run", "pack", "adapter", "model"]


@documented
class AdapterReading(Protocol):
    """An adapter folder that was read."""

    source: str
    """The base model that it names, as editcore loads it; empty if it names none."""

    def changes(self, model: LanguageModel, *, force: bool = False) -> Changes:
        """What it adds to the weights of its base.

        Args:
            force: whether to take a base with another fingerprint than the adapter's.

        Raises:
            ModelError: it was made for another base.
        """
        ...


def settings_hash(settings: Mapping[str, Mapping[str, Any]], parts: Collection[str]) -> str:
    """A short hash of hyperparameters.

    Args:
        settings: by the name of their owner.
        parts: the owners that count: editor, backend and extensions.
    """
    own = {name: dict(values) for name, values in sorted(settings.items()) if name in parts}
    return hashlib.sha256(json_text(own).encode()).hexdigest()[:12]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """How a target is loaded; ``None`` where the target decides."""

    base: str | None = None
    """The unedited model."""
    device: str | None = None
    """Where the model runs."""
    dtype: str | None = None
    """Type of the weights."""
    chat_template: bool | None = None
    """Whether the model's chat template stands around prompts."""
    force: bool = False
    """Whether to take a base with another fingerprint than the target's."""

    def load_options(self) -> LoadOptions:
        """How a model is loaded."""
        usual = LoadOptions()
        return LoadOptions(
            device=self.device or usual.device,
            dtype=self.dtype or usual.dtype,
            chat_template=usual.chat_template if self.chat_template is None else self.chat_template,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRecord:
    """What is known of a model in one state."""

    source: str
    """Where it was loaded from."""
    state: str
    """See :mod:`editcore.runs.model_state`."""
    record: ModelRecord
    """Of the unedited model."""
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model in one state, in memory."""

    model: LanguageModel
    about: OpenedRecord

    @classmethod
    def of(cls, model: LanguageModel, source: str, state: str) -> Opened:
        """A model that is in a state now."""
        record = ModelRecord.of(model, source, prompt_form=model.prompt_form)
        dtype = str(model.dtype).removeprefix("torch.")
        about = OpenedRecord(source=source, state=state, record=record, dtype=dtype, device=str(model.device))
        return cls(model=model, about=about)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that can be evaluated. Nothing is loaded yet, and torch is not imported."""

    name: str
    """As it was given."""
    kind: TargetKind
    """What it is."""
    base: str | None
    """The unedited model; ``None`` for a model that nothing is known of."""
    options: TargetOptions
    """How it is loaded."""
    facts: Sequence[FactRecord] | None
    """What its edits write; ``None`` where that is not known."""
    method: MethodRecord | None
    """How its edits were made; ``None`` where that is not known."""

    def states(self, plugins: Plugins, progress: Progress = silent) -> Generator[Opened]:
        """The model without edits and then with them, one after the other; of a model without a base, the model alone.

        Use a state before you ask for the next one, and close the generator when you are done.

        Raises:
            EditcoreError: the model cannot be loaded, or does not fit its base.
        """
        match self.kind:
            case "run":
                return _run(self, plugins, progress)
            case "model":
                return _models(self, plugins, progress)
            case _:
                return _changes(self, plugins, progress)


def find_target(name: str, options: TargetOptions, plugins: Plugins) -> Target:
    """What a name stands for.

    Raises:
        EditcoreError: there is no such thing, it names no base and none was given, or an option does not fit it.
    """
    path = Path(name).expanduser()
    if (path / RUN_NAME).is_file():
        return _find_run(name, path, options)
    if path.is_file():
        manifest = read_manifest(path)
        base = options.base or manifest.model
        try:
            look_at(base)
        except ModelError as error:
            raise ModelError(f"{name} is for '{manifest.model}'. {error} Name its base with --base.") from error
        latest = {request.fact_key: FactRecord(request=request) for request in manifest.requests}
        parts = manifest.settings.keys() - plugins.evaluators().keys() - plugins.datasets().keys()
        method = MethodRecord(
            name=manifest.editor, settings_hash=settings_hash(manifest.settings, parts), edits=len(latest)
        )
        return Target(name=name, kind="pack", base=base, options=options, facts=tuple(latest.values()), method=method)
    if (path / ADAPTER_CONFIG).is_file():
        if not plugins.components(ADAPTER_READER):
            raise ModelError(
                f"The folder '{name}' is an adapter, and no installed package reads adapters. Install with: "
                "pip install edit-lora"
            )
        named = options.base or read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not named:
            raise _without_base(name)
        if options.base is not None:
            look_at(options.base)
        return Target(name=name, kind="adapter", base=options.base, options=options, facts=None, method=None)
    look_at(name)
    if options.base is not None:
        look_at(options.base)
    if options.force:
        raise HParamsError("--force is for a pack or an adapter; a model is taken as it is.")
    return Target(name=name, kind="model", base=options.base, options=options, facts=None, method=None)


def _without_base(name: str) -> ModelError:
    return ModelError(f"The adapter '{name}' does not say which model it is for; name it with --base.")


def _find_run(name: str, path: Path, options: TargetOptions) -> Target:
    record, ledger = RunRecord.read(path), Ledger.read(path)
    given = {"--base": options.base, "--dtype": options.dtype, "--force": options.force or None}
    if wrong := [option for option, value in given.items() if value is not None]:
        raise HParamsError(f"{', '.join(wrong)}: the run directory {name} knows its model. Leave it out.")
    active = [request.id for request in ledger.facts()]
    facts = {fact.request.id: fact for fact in facts_of(path, ledger)}
    timed = seconds_per_edit(read_batches(path))
    config = record.config
    return Target(
        name=name,
        kind="run",
        base=record.source,
        options=options,
        facts=tuple(facts[identity] for identity in active),
        method=MethodRecord(
            name=config.method,
            settings_hash=settings_hash(record.settings, config.method_parts),
            batch_size=None if record.composed_of else config.batch_size,
            edits=len(active),
            seconds_per_edit=timed or math.nan,
        ),
    )


def _run(target: Target, plugins: Plugins, progress: Progress) -> Generator[Opened]:
    from editcore.runs.model_state import edited_state, model_state
    from editcore.runs.reopening import open_run

    path, options = Path(target.name).expanduser(), target.options
    edited, ledger = open_run(
        path, device=options.device, chat_template=options.chat_template, plugins=plugins, progress=progress
    )
    source = RunRecord.read(path).source
    with edited.unedited():
        yield Opened.of(edited.model, source, model_state(edited.model))
    yield Opened.of(edited.model, source, edited_state(edited, ledger.active(), directory=path))
    edited.rebuild([])


def _changes(target: Target, plugins: Plugins, progress: Progress) -> Generator[Opened]:
    """The states of a pack and of an adapter: a base, and what they write into it."""
    from editcore.models import LanguageModel
    from editcore.runs.model_state import edited_state, model_state

    path, options = Path(target.name).expanduser(), target.options
    reading = None if target.kind == "pack" else _read_adapter(path, plugins)
    base = target.base or (reading.source if reading is not None else "")
    if not base:
        raise _without_base(target.name)
    model = LanguageModel.load(base, options.load_options(), families=plugins.family_paths(), progress=progress)
    edited, active = (
        _with_pack(path, model, plugins, force=options.force)
        if reading is None
        else _with_adapter(reading, model, plugins, force=options.force)
    )
    with edited.unedited():
        yield Opened.of(model, base, model_state(model))
    yield Opened.of(model, base, edited_state(edited, active))
    edited.rebuild([])


def _with_pack(
    path: Path, model: LanguageModel, plugins: Plugins, *, force: bool
) -> tuple[EditedModel, Sequence[Written]]:
    from editcore.runs.pack import read_pack

    pack = read_pack(path)
    return pack.apply(model, plugins, force=force), pack.written


def _with_adapter(
    reading: AdapterReading, model: LanguageModel, plugins: Plugins, *, force: bool
) -> tuple[EditedModel, Sequence[Written]]:
    from editcore.models import EditedModel
    from editcore.runs.backends import RawBackend

    written = [Written(changes=reading.changes(model, force=force))]
    backend = RawBackend()
    backend.open(model)
    edited = EditedModel(model, backend, spec=plugins.backend("raw"), plugins=plugins)
    edited.rebuild(written)
    return edited, written


def _read_adapter(path: Path, plugins: Plugins) -> AdapterReading:
    name, spec = next(iter(plugins.components(ADAPTER_READER).items()))
    with boundary(f"The adapter reader '{name}' failed: "):
        found: AdapterReading = resolve(spec.target)(path)
    return found


def _models(target: Target, plugins: Plugins, progress: Progress) -> Generator[Opened]:
    """The base, if there is one, and the model: never both in memory."""
    from editcore.models import LanguageModel
    from editcore.runs.model_state import model_state

    vocabulary: dict[str, int] | None = None
    for name in filter(None, (target.base, target.name)):
        model = LanguageModel.load(
            name, target.options.load_options(), families=plugins.family_paths(), progress=progress
        )
        if vocabulary not in (None, model.tokenizer.get_vocab()):
            raise ModelError(
                f"'{target.base}' is not what '{target.name}' was edited from: their tokenizers have other tokens. "
                "--base is the same model before its edits."
            )
        vocabulary = model.tokenizer.get_vocab()
        yield Opened.of(model, name, model_state(model))
        del model  # before the next one is loaded
