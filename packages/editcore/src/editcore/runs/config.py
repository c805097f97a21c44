"""The configuration of a session and of a run: all options that decide a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from editcore._util.words import counted_of
from editcore.datasets import short_name
from editcore.evaluation.measures import DEFAULT_EVALUATORS
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, UnknownNameError
from editcore.interfaces.values import first_problem
from editcore.models.options import LoadOptions
from editcore.plugins.registry import Plugins
from editcore.runs.fit import refuse_duplicates, with_needed_parts
from editcore.runs.held_out import TEXT_TOKENS, TEXT_WINDOW
from editcore.settings.presets import model_stem

__all__ = ["RunConfig", "SessionConfig"]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# A configuration inherits from the groups below. Files list its fields from the last group to the first.


class _Method(_Options):
    editor: str
    """Name of an installed editor."""
    plugins: tuple[str, ...] = ()
    """Extensions, in the order asked for. Those that the editor needs come by themselves."""
    backend: str | None = None
    """How changes of weights are put into the model; left out, the one that the editor needs, or ``raw``."""


class _Facts(_Options):
    model: str = "smollm2-135m"
    """A catalogue name, a folder or a hub id."""
    dataset: str = "worldfacts"
    """A registered data set, with or without its argument (``NAME:ARGUMENT``), or a file of records."""
    edits: Annotated[int, Field(ge=1)] | None = None
    """How many records to edit, from the start of the data set; left out, all of them. Records that cannot be edited
    do not count."""
    strict: bool = False
    """Whether records that cannot be edited are an error; otherwise they are left out and reported."""
    batch_size: Annotated[int, Field(ge=1)] = 10
    """Facts solved together."""


class _Conditions(_Options):
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random but the text of the second moments."""
    device: str = "cpu"
    """Where the model runs, as torch names it."""
    dtype: str = "float32"
    """Of the model's weights: one of ``editcore.models.DTYPES``."""
    preset: str | None = None
    """A preset of the editor; left out, the one named like the model where there is one."""
    corpus: str = "self"
    """Text behind the second moments: self, docs, hf:NAME or a file."""
    corpus_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens counted; left out, ten times the width of the projection's input."""
    corpus_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of a sampled text. It is apart from ``seed``, so that runs with other seeds share the text and its second
    moments."""
    chat_template: bool = False
    """Whether the model's chat template stands around every prompt, of edits and of measurements."""
    evaluators: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_EVALUATORS
    """What measures the model."""

    @property
    def load_options(self) -> LoadOptions:
        """How the model is loaded."""
        return LoadOptions(device=self.device, dtype=self.dtype, chat_template=self.chat_template)


class _Checkpoints(_Options):
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Facts between two checkpoints, at which the edits made so far are measured again; left out, only the end is
    measured."""
    eval_sample: Annotated[int, Field(ge=1)] | None = None
    """Facts measured at a checkpoint, a seeded sample over all ages; left out, all. The end is measured on all."""
    eval_text: str | None = None
    """Text for the perplexity at checkpoints: docs, hf:NAME or a file; left out, text that the unedited model writes,
    with another seed than the second moments have."""
    eval_text_tokens: Annotated[int, Field(ge=TEXT_WINDOW)] = TEXT_TOKENS
    """Tokens to take from the start of that text."""


class _Settings(_Options):
    settings: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Hyperparameters, by the name of their owner: ``{"emmet": {"layers": [3]}}``."""


@documented
class SessionConfig(_Settings, _Conditions, _Method):
    """What an :class:`EditSession` edits with, and how its model is loaded.

    >>> SessionConfig(editor="emmet", plugins=["replay"], settings={"emmet": {"layers": [3]}}).plugins
    ('replay',)
    """

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> SessionConfig:
        """A checked configuration.

        Raises:
            HParamsError: a value is missing or out of range.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise HParamsError(f"The session's configuration is wrong. {first_problem(error)}.") from error


@documented
class RunConfig(_Settings, _Checkpoints, _Conditions, _Facts, _Method):
    """Everything that decides a run's result, but for the versions of the code."""

    backend: str = "raw"
    """How changes of weights are put into the model."""

    @property
    def session(self) -> SessionConfig:
        """The configuration of its session."""
        values = {name: getattr(self, name) for name in SessionConfig.model_fields}
        values["settings"] = {name: own for name, own in self.settings.items() if name in self.part_names}
        return SessionConfig(**values)

    @property
    def part_names(self) -> frozenset[str]:
        """Names of the parts of its session: editor, backend, extensions and evaluators."""
        return frozenset({self.editor, self.backend, *self.plugins, *self.evaluators})

    @property
    def method_parts(self) -> frozenset[str]:
        """Names of editor, backend and extensions: the parts that decide the edits."""
        return frozenset({self.editor, self.backend, *self.plugins})

    @property
    def method(self) -> str:
        """The method's name in titles: the editor and its extensions."""
        return " + ".join([self.editor, *self.plugins])

    @classmethod
    def create(cls, values: Mapping[str, Any], plugins: Plugins) -> RunConfig:
        """A checked configuration. A backend that is named with ``--plugin`` becomes the backend.

        Raises:
            HParamsError: a value is missing or out of range.
            UnknownNameError: there is no such option.
        """
        values = dict(values)
        for name in values:
            if name not in cls.model_fields:
                raise UnknownNameError(
                    "option", name, cls.model_fields, hint="A plugin's settings belong in its own table."
                )
        given = values.get("plugins", ())
        names = [given] if isinstance(given, str) else [str(name) for name in given]
        chosen = [name for name in names if name in plugins.backends()]
        if given_backend := values.get("backend"):
            chosen = [str(given_backend), *(name for name in chosen if name != given_backend)]
        if len(chosen) > 1:
            raise HParamsError(
                f"The backends {' and '.join(chosen)} were asked for (--plugin with a backend's name chooses it); "
                "a run has one backend."
            )
        extensions = tuple(name for name in names if name not in plugins.backends())
        if isinstance(evaluator := values.get("evaluators"), str):
            values["evaluators"] = (evaluator,)
        values["plugins"], values["backend"] = extensions, chosen[0] if chosen else "raw"
        if isinstance(editor := values.get("editor"), str):
            needed = with_needed_parts(plugins, editor, extensions, chosen[0] if chosen else None)
            values["plugins"], values["backend"] = needed
        try:
            config = cls(**values)
        except ValidationError as error:
            raise HParamsError(f"The run's configuration is wrong. {first_problem(error)}.") from error
        refuse_duplicates("plugin", config.plugins)
        refuse_duplicates("evaluator", config.evaluators)
        for name in ("eval_sample", "eval_text", "eval_text_tokens"):
            value = getattr(config, name)
            if config.eval_every is None and value != cls.model_fields[name].default:
                raise HParamsError(
                    f"--{name.replace('_', '-')} {value} is for checkpoints, and there are none without --eval-every N."
                )
        return config

    def title(self, edits: int, *, data: str | None = None, more: int = 0) -> str:
        """The title of a run's results: the method, the model, and how many facts of which data were edited.

        Args:
            data: where the facts are from, if not from the data set alone.
            more: number of facts that were edited beside those of the data.
        """
        edited = counted_of(edits, "edit", data or short_name(self.dataset), more=more)
        return f"{self.method} on {model_stem(self.model)}: {edited}"
