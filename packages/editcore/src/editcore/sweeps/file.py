"""The sweep file: a run with variations. See docs/reference/sweeps.md."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, PluginError, UnknownNameError
from editcore.interfaces.values import first_problem
from editcore.plugins.registry import Plugins
from editcore.settings.toml import parse_toml, run_values

__all__ = [
    "STUDY",
    "UNEDITED",
    "Arm",
    "FigureSpec",
    "Sweep",
    "SweepFile",
    "load_study",
    "load_sweep",
    "overlaid",
    "parse_sweep",
]

STUDY = "study"
"""Kind of component for ready-made sweeps. Its target is ``"package:FILE.toml"``."""

UNEDITED = "unedited"
"""The name of the model without edits in the column ``arm`` of the table of means. No arm may have it."""

_EVERY_METRIC = "{metric}"
_FORBIDDEN = re.compile(r"[^a-z0-9_]+")


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@documented
class FigureSpec(_Table):
    """A picture of a study."""

    file: Annotated[str, Field(pattern=r"^([\w.-]|\{metric\})+\.png$")]
    """Name of the PNG. With ``{metric}`` in it, there is one for every metric that tables show and that has values."""
    kind: Literal["bars", "lines", "forgetting"]
    """The kind of picture: bars, lines along a setting, or forgetting curves."""
    metric: str = ""
    """The metric to draw; left out, the metric by which trials are compared, which is the first objective of their
    evaluators."""
    metrics: tuple[str, ...] = ()
    """For lines: one or several columns of the table."""
    by: str = "arm"
    """For bars, the setting whose values are the groups; for lines, the setting along the axis."""
    split: str | None = None
    """The setting whose values have a colour each."""
    title: str = ""
    """Its title; left out, the summary of the study."""

    @model_validator(mode="after")
    def _lines_need_an_axis(self) -> FigureSpec:
        if self.kind == "lines" and self.by == "arm":
            raise ValueError(f"{self.file}: lines need a setting along the axis: by = 'batch_size'")
        return self

    @model_validator(mode="after")
    def _every_metric_or_some(self) -> FigureSpec:
        if self.of_every_metric and (self.shown or self.kind == "forgetting"):
            raise ValueError(
                f"{self.file}: {_EVERY_METRIC} draws every metric, as bars or lines; do not name a metric as well"
            )
        return self

    @property
    def of_every_metric(self) -> bool:
        """Whether it stands for one picture per metric."""
        return _EVERY_METRIC in self.file

    def of_metric(self, key: str) -> FigureSpec:
        """The picture of one metric."""
        return self.model_copy(update={"file": self.file.replace(_EVERY_METRIC, key), "metric": key})

    @property
    def shown(self) -> tuple[str, ...]:
        """The columns that it shows; empty if it shows the objective."""
        return self.metrics or ((self.metric,) if self.metric else ())


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A variant of the base run."""

    name: str
    """Name of its rows in tables."""
    values: Mapping[str, Any]
    """Options and settings that replace those of the base."""
    optional: bool = False
    """Whether it is left out if it cannot run, because a plugin is not installed, or because its editor does not fit
    the model, the backend or the data."""


@documented
class Sweep(_Table):
    """A checked sweep file."""

    title: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Name of the folder of tables and figures."""
    summary: str = ""
    """A sentence for the report."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Each combination is run with every seed; left out, with the seed of ``base``."""
    base: Mapping[str, Any] = Field(default_factory=dict)
    """Options of ``editctl run`` that all trials share."""
    arms: tuple[Mapping[str, Any], ...] = ()
    """Variants of the base, each with a name."""
    grid: Mapping[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """By setting, the values that it takes."""
    exclude: tuple[Mapping[str, Any], ...] = ()
    """Combinations that are left out."""
    figures: tuple[FigureSpec, ...] = ()
    """The pictures to draw."""

    @field_validator("grid", mode="before")
    @classmethod
    def _flat(cls, grid: Any) -> Any:
        """``[grid.replay] replay_rate = [...]`` is ``"replay.replay_rate" = [...]``."""
        if not isinstance(grid, dict):
            return grid
        flat: dict[str, Any] = {}
        for name, values in grid.items():
            flat |= {f"{name}.{key}": v for key, v in values.items()} if isinstance(values, dict) else {name: values}
        return {name if "." in name else name.replace("-", "_"): values for name, values in flat.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if self.seeds is not None and ("seed" in self.grid or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError("seeds: name each seed once, in 'seeds' alone")
        if "arm" in self.grid:
            raise ValueError("grid: 'arm' is not a setting; write [[arms]]")
        names = [str(arm.get("name", "")) for arm in self.arms]
        if not all(names) or len(set(names)) < len(names):
            raise ValueError("arms: each needs a name of its own")
        if UNEDITED in names:
            raise ValueError(f"arms: '{UNEDITED}' names the model without edits in tables; choose another name")
        known = {"arm", "seed", *self.grid}
        for entry in self.exclude:
            for name in entry:
                if name not in known:
                    raise ValueError(f"exclude: '{name}' does not vary here; what does: {', '.join(sorted(known))}")
        for figure in self.figures:
            for varied in (figure.by, figure.split):
                if varied is not None and varied not in known:
                    raise ValueError(f"figures: '{varied}' does not vary here; what does: {', '.join(sorted(known))}")
        return self

    def changed(
        self,
        *,
        base: Mapping[str, Any],
        settings: Mapping[str, Mapping[str, Any]],
        grid: Mapping[str, Sequence[Any]],
        seeds: Sequence[int],
        arms: Sequence[str],
    ) -> Sweep:
        """A copy with some parts replaced, for the options of the command line.

        Args:
            base: options that replace those of the base. If an option is an axis, the axis has only this value. Lines
                along an axis of one value are not drawn.
            settings: settings that replace those of the base, by plugin.
            grid: axes to replace or add.
            arms: names of the arms to keep; all if empty.

        Raises:
            UnknownNameError: there is no such arm.
            HParamsError: the result is not a valid sweep.
        """
        flat = {**base, **{f"{section}.{key}": v for section, values in settings.items() for key, v in values.items()}}
        single = {name: (value,) for name, value in flat.items() if name in self.grid and name not in grid}
        axes = {**self.grid, **single, **grid}
        points = {name for name, chosen in axes.items() if len(chosen) == 1 < len(self.grid.get(name, ()))}
        names = [arm.name for arm in self.variants()]
        for name in arms:
            if name not in names:
                raise UnknownNameError("arm", name, names)
        values: dict[str, Any] = {
            **self.model_dump(exclude={"figures"}),
            "figures": [figure for figure in self.figures if figure.kind != "lines" or figure.by not in points],
            "base": overlaid(self.base, {**base, **settings}),
            "grid": axes,
            "arms": [arm for arm in self.arms if not arms or arm["name"] in arms],
        }
        if seeds:
            values["seeds"] = tuple(seeds)
        try:
            return Sweep(**values)
        except ValidationError as error:
            raise HParamsError(f"With these options the sweep is wrong. {first_problem(error)}.") from error

    def variants(self) -> Sequence[Arm]:
        """The arms; without any, the base run alone."""
        if not self.arms:
            options = run_values(self.base)
            given = options.get("plugins", ())
            plugins = [given] if isinstance(given, str) else list(given)
            return [Arm(name="+".join(map(str, [options.get("editor", "run"), *plugins])), values={})]
        own = ("name", "optional")
        return [
            Arm(
                name=str(arm["name"]),
                values={name: value for name, value in arm.items() if name not in own},
                optional=bool(arm.get("optional", False)),
            )
            for arm in self.arms
        ]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFile:
    """A sweep with the text that it was read from."""

    sweep: Sweep
    """The checked sweep."""
    text: str
    """The text of the file."""


def load_sweep(path: Path | str) -> SweepFile:
    """Read a sweep file.

    Raises:
        HParamsError: the file cannot be read or is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise HParamsError(f"Cannot read the sweep file {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise HParamsError(f"{path} is not a TOML file: {error}.") from error
    return parse_sweep(text, origin=str(path), stem=path.stem)


def load_study(plugins: Plugins, name: str) -> SweepFile:
    """A ready-made sweep that a package offers.

    Raises:
        UnknownNameError: no installed package has it.
        PluginError: its file is not there.
        HParamsError: its file is wrong.
    """
    studies = plugins.components(STUDY)
    if name not in studies:
        raise UnknownNameError(STUDY, name, studies, hint=plugins.hint(name))
    package, _, file = studies[name].target.partition(":")
    try:
        text = importlib.resources.files(package).joinpath(file).read_text("utf-8")
    except (ModuleNotFoundError, OSError, ValueError) as error:
        raise PluginError(f"The study '{name}' has no file '{studies[name].target}' ({error}).") from error
    return parse_sweep(text, origin=f"The study '{name}'", stem=name)


def parse_sweep(text: str, *, origin: str, stem: str) -> SweepFile:
    """A sweep from the text of its file.

    Args:
        origin: where the text is from, for messages.
        stem: the title, if the text has none.

    Raises:
        HParamsError: the text is not TOML, or not a sweep.
        UnknownNameError: the text has a key that sweep files do not have.
    """
    table = parse_toml(text, origin=origin)
    for key in table:
        if key not in Sweep.model_fields:
            raise UnknownNameError(
                "key of a sweep file", key, Sweep.model_fields, hint="A run's options belong in [base]."
            )
    table.setdefault("title", _FORBIDDEN.sub("_", stem.lower()).strip("_") or "sweep")
    try:
        return SweepFile(sweep=Sweep(**table), text=text)
    except ValidationError as error:
        raise HParamsError(f"{origin} is not a sweep file. {first_problem(error)}.") from error


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the options of ``over``. Tables of plugins are merged, everything else is replaced."""
    merged = dict(base)
    for name, value in over.items():
        under = merged.get(name)
        merged[name] = {**under, **value} if isinstance(under, dict) and isinstance(value, dict) else value
    return merged
