"""The text of ``editctl describe`` about one thing that a plugin offers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

import typer

from editcore.interfaces.metrics import MetricSpec
from editcore.interfaces.specs import CommandSpec, ComponentSpec, EvaluatorSpec, Spec

if TYPE_CHECKING:
    from editcore.plugins.registry import Offer
    from editcore.settings.hparams import Setting

__all__ = ["as_values", "presets", "print_description"]

_SAID_ELSEWHERE = {"name", "target", "summary", "kind", "hparams", "presets", "argument", "metrics", "metrics_of"}
"""Fields of specs that have a line or a table of their own."""


def presets(spec: Spec) -> str:
    """The names of its presets, the user's own marked as such."""
    from editcore.settings.presets import presets_of

    return ", ".join(f"{name} (yours)" if preset.own else name for name, preset in presets_of(spec).items())


def as_values(offer: Offer) -> dict[str, object]:
    """Everything about an offer, as JSON for programs."""
    from editcore.settings.presets import presets_of

    announced = _plain(offer.spec)
    assert isinstance(announced, dict)
    if isinstance(offer.spec, ComponentSpec):
        announced["extension_point"] = announced.pop("kind")
    return {
        "kind": offer.kind,
        "distribution": offer.distribution,
        "version": offer.version,
        **announced,
        "presets": list(presets_of(offer.spec)),
        "settings": [_plain(setting) for setting in _settings(offer.spec)],
    }


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def print_description(offer: Offer) -> None:
    """Print an offer for people: what it is, what it can do, its metrics and its settings."""
    from editcore.cli.console import print_table

    spec = offer.spec
    kind = f"{offer.kind} of {spec.kind}" if isinstance(spec, ComponentSpec) else offer.kind
    typer.echo(f"{spec.name} ({kind}): {spec.summary}")
    for label, text in _lines(offer):
        typer.echo(f"{label}: {text}")
    if isinstance(spec, EvaluatorSpec):
        composites = any(metric.of for metric in spec.metrics)
        columns = ("metric", "label", "unit", "better", *(["made of"] if composites else []), "meaning")
        print_table(columns, [_metric(metric, composites=composites) for metric in spec.metrics])
    if settings := _settings(spec):
        print_table(
            ("setting", "type", "default", "allowed", "meaning"),
            [(row.name, row.type, _default(row), row.allowed, row.meaning) for row in settings],
        )
    elif hasattr(spec, "hparams"):
        typer.echo("It has no hyperparameters.")


def _lines(offer: Offer) -> Iterator[tuple[str, str]]:
    spec = offer.spec
    if listed := presets(spec):
        yield "Presets", listed
    yield "Package", f"{offer.distribution} {offer.version}".rstrip()
    if spec.target:
        yield "Code", spec.target
    if argument := getattr(spec, "argument", ""):
        yield "Argument", f"{argument} (--dataset {spec.name}:{argument.upper()})"
    if isinstance(spec, CommandSpec):
        yield "Options", f"editctl {spec.name} --help"
    yield from _facts(spec)


def _facts(described: object) -> Iterator[tuple[str, str]]:
    """The other fields of a spec and of its capabilities. Fields that are unset, empty or false are left out."""
    assert is_dataclass(described)
    for field in fields(described):
        value = getattr(described, field.name)
        if field.name in _SAID_ELSEWHERE or not value:
            continue
        if is_dataclass(value):
            yield from _facts(value)
        else:
            yield field.name.replace("_", " ").capitalize(), _shown(value)


def _shown(value: object) -> str:
    if value is True:
        return "yes"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {item}" for name, item in value.items())
    if isinstance(value, frozenset):
        return ", ".join(sorted(value))
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _metric(metric: MetricSpec, *, composites: bool) -> tuple[str, ...]:
    made_of = [", ".join(metric.of)] if composites else []
    return (metric.name, metric.label, metric.unit, metric.better, *made_of, metric.meaning)


def _settings(spec: Spec) -> list[Setting]:
    from editcore.plugins.calls import resolve
    from editcore.settings.hparams import describe

    hparams: str | None = getattr(spec, "hparams", None)
    return describe(resolve(hparams)) if hparams else []


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    if setting.default is None:
        return "none"
    plain = isinstance(setting.default, str) and "\n" not in setting.default  # a row of a table is one line
    return setting.default if plain else json.dumps(setting.default, ensure_ascii=False)
