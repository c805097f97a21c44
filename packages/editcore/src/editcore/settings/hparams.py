"""Hyperparameters: declared once as a pydantic class, read from presets, files and ``--set``, described for users.

A plugin writes::

    class RomeHParams(HParams):
        layer: Annotated[int, Field(ge=0)]
        \"\"\"Block whose MLP output projection is rewritten.\"\"\"
        kl_factor: Annotated[float, Field(ge=0)] = 0.0625
        \"\"\"Weight of the essence-drift term. ROME, eq. 4.\"\"\"

and gets checking, ``editctl describe``, presets and messages that name the way out.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, PluginError, UnknownNameError

__all__ = [
    "HParams",
    "Layer",
    "Setting",
    "build",
    "describe",
    "layers_named",
    "list_presets",
    "load_preset",
    "parse_assignment",
    "preset_models",
    "to_toml",
    "toml_lines",
]

_LAYER = object()
Layer = Annotated[int, Field(ge=0), _LAYER]
"""Type of a setting that is the number of a decoder block, alone or in a tuple: one that the model does not have is
refused before the model is loaded."""


class HParams(BaseModel):
    """Base of every plugin's hyperparameters. Frozen; unknown names, wrong types and infinities are refused.

    A field's docstring is its meaning in ``editctl describe`` and in ``help()``: say what it does, its unit and its
    source.
    """

    left_to_code: ClassVar[Mapping[str, tuple[object, str]]] = {}
    """For ``editctl hparams import``: by field, the value that the method's reference code uses if its files do not set
    it, and why. Only fields with another default here are listed."""
    also_named: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """For ``editctl hparams import``: other names of the method in such files (``alg_name``, lower case), and the
    settings that each name implies."""

    @property
    def needs_subject(self) -> bool | None:
        """Whether an editor with these settings needs a subject in every request; ``None``: as its announcement says
        (``Capabilities.needs_subject``)."""
        return None

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        documented(cls)


H = TypeVar("H", bound=HParams)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One hyperparameter, described for users."""

    name: str
    """Its name in ``--set``."""
    type: str
    """``int``, ``float``, ``bool``, ``text``, ``list of int``, ``float or none``, ..."""
    required: bool
    """Whether it has no default."""
    default: Any
    """As a TOML or JSON value; ``None`` if required."""
    allowed: str
    """Range or choices; empty if every value of the type is allowed."""
    meaning: str
    """The docstring of the field."""


def describe(hparams: type[HParams]) -> list[Setting]:
    """The hyperparameters of a class, in the order they are declared."""
    schema = hparams.model_json_schema()
    definitions = schema.get("$defs", {})
    rows = []
    for name, entry in schema.get("properties", {}).items():
        field = _Field.read(entry, definitions)
        rows.append(
            Setting(
                name=name,
                type=field.type,
                required=name in schema.get("required", ()),
                default=entry.get("default"),
                allowed=field.allowed,
                meaning=" ".join(entry.get("description", "").replace("``", "`").split()),
            )
        )
    return rows


def build(hparams: type[H], sources: Iterable[Mapping[str, object]], *, owner: str) -> H:
    """Make hyperparameters from several sources, such as a preset, a section of a file, and ``--set``. Later sources
    override earlier ones.

    Args:
        owner: name of the plugin that they belong to, for messages (``"emmet"``).

    Raises:
        HParamsError: a name is unknown, a required one is missing, or a value has the wrong type or is out of range.
    """
    values = {name: value for source in sources for name, value in source.items()}
    settings = {setting.name: setting for setting in describe(hparams)}
    for name in values:
        if name not in settings:
            raise HParamsError(_unknown_setting(name, settings, owner))
    for name, value in values.items():
        if value == "none" and settings[name].type.endswith(" or none"):
            values[name] = None  # TOML has no null
    try:
        # Through JSON, where strict validation takes a list for a tuple and an int for a float, and nothing else.
        return hparams.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise HParamsError(f"{owner}: {_problem(error.errors(), values, settings)}") from error


def parse_assignment(text: str) -> tuple[str, object]:
    """Split ``key=value`` and read the value as TOML; a bare word is a string.

    >>> parse_assignment("layers=[3, 4]")
    ('layers', [3, 4])
    >>> parse_assignment("fact_token=subject_last")
    ('fact_token', 'subject_last')
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not key or not equals:
        raise HParamsError(f"--set takes KEY=VALUE, found '{text}'. For example: --set kl_factor=0.1")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return key, value
    if parsed.keys() != {"value"} or not isinstance(parsed["value"], bool | int | float | str | list | dict):
        return key, value
    return key, parsed["value"]


def list_presets(source: str | Path | None) -> tuple[str, ...]:
    """Names of the presets in a package (given by name) or a folder (given by path), sorted. Presets are its ``*.toml``
    files. The result is empty for a plugin without presets and for a folder that does not exist."""
    if source is None or (isinstance(source, Path) and not source.is_dir()):
        return ()
    try:
        files = list(_folder(source).iterdir())
    except ModuleNotFoundError as error:
        raise PluginError(f"The package of presets '{source}' cannot be found: {error}.") from error
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_preset(source: str | Path | None, name: str) -> dict[str, object]:
    """The hyperparameters of one preset.

    Raises:
        UnknownNameError: there is no such preset.
        HParamsError: the file is not a flat TOML table, or its ``names`` are not a list of texts.
    """
    table = _read_preset(source, name)
    table.pop(_NAMES, None)
    return table


def preset_models(source: str | Path | None, name: str) -> tuple[str, ...]:
    """Further names of a preset's models: ``names = ["Llama-2-7b-hf"]`` in its file.

    Raises:
        UnknownNameError, HParamsError: as :func:`load_preset`.
    """
    return tuple(_read_preset(source, name).get(_NAMES, ()))


_NAMES = "names"
"""The one key of a preset that is not a hyperparameter."""


def _folder(source: str | Path) -> Traversable:
    return source if isinstance(source, Path) else importlib.resources.files(source)


def _read_preset(source: str | Path | None, name: str) -> dict[str, Any]:
    presets = list_presets(source)
    if source is None or name not in presets:
        raise UnknownNameError("preset", name, presets)
    try:
        table = tomllib.loads(_folder(source).joinpath(f"{name}.toml").read_text("utf-8"))
    except OSError as error:
        raise HParamsError(f"The preset '{name}' of {source} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise HParamsError(f"The preset '{name}' of {source} is not valid TOML: {error}.") from error
    nested = [key for key, value in table.items() if isinstance(value, dict)]
    if nested:
        raise HParamsError(f"The preset '{name}' of {source} must be a flat table, found the section [{nested[0]}].")
    names = table.get(_NAMES, [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise HParamsError(
            f"The preset '{name}' of {source} has names that are not a list of texts: names = [\"MODEL\"]."
        )
    return table


def to_toml(hparams: HParams, *, only: Collection[str] | None = None) -> str:
    """Write hyperparameters as the TOML of a preset; :func:`build` reads them back unchanged.

    Args:
        only: the fields to write; left out, all.

    >>> class Example(HParams):
    ...     layers: tuple[int, ...] = (3,)
    ...     clamp: float | None = None
    >>> to_toml(Example())
    'layers = [3]\\n'
    """
    defaults = {name: field.default for name, field in type(hparams).model_fields.items()}
    lines = []
    for name, value in hparams.model_dump(mode="json", include=None if only is None else set(only)).items():
        if value is not None:
            lines.append(f"{name} = {_toml(value)}")
        elif defaults[name] is not None:
            lines.append(f'{name} = "none"')
    return "".join(f"{line}\n" for line in lines)


def toml_lines(values: Mapping[str, object]) -> str:
    """Settings as lines of TOML. ``None`` is written as ``"none"``, which :func:`build` reads as ``None``.

    >>> toml_lines({"layers": [3], "clamp": None})
    'layers = [3]\\nclamp = "none"\\n'
    """
    return "".join(f"{name} = {_toml('none' if value is None else value)}\n" for name, value in values.items())


def _toml(value: object) -> str:
    # Not tomli-w, which breaks a list over several lines. In presets and run.toml a list stays on one line.
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml(key)} = {_toml(part)}" for key, part in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, except that TOML wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise TypeError(
        f"a hyperparameter is a number, a text, a truth value, or a list or table of them, not {type(value).__name__}"
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """A JSON schema, described in words."""

    type: str
    allowed: str

    @classmethod
    def read(cls, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> _Field:
        if "$ref" in schema:
            return cls.read(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        if "anyOf" in schema:
            options = [cls.read(option, definitions) for option in schema["anyOf"]]
            allowed = [option.allowed for option in options if option.allowed]
            return cls(" or ".join(option.type for option in options), " or ".join(allowed))
        if "const" in schema:
            return cls(_shown(schema["const"]), "")
        if "enum" in schema:
            return cls(_TYPES.get(schema.get("type", ""), "value"), ", ".join(map(_shown, schema["enum"])))
        if schema.get("type") == "array":
            return cls._read_array(schema, definitions)
        return cls(_TYPES.get(schema.get("type", ""), "value"), _range(schema))

    @classmethod
    def _read_array(cls, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> _Field:
        items = cls.read(schema.get("items", {}), definitions)
        allowed = ["not empty"] if schema.get("minItems") == 1 else []
        allowed += [f"at least {schema['minItems']}"] if schema.get("minItems", 0) > 1 else []
        allowed += [f"at most {schema['maxItems']}"] if "maxItems" in schema else []
        allowed += [f"each {items.allowed}"] if items.allowed else []
        return cls(f"list of {items.type}", ", ".join(allowed))


_TYPES = {
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "string": "text",
    "null": "none",
    "object": "table",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _range(schema: Mapping[str, Any]) -> str:
    bounds = [f"{sign} {_shown(schema[key])}" for key, sign in _BOUNDS.items() if key in schema]
    if schema.get("minLength"):
        bounds.append("not empty")
    return " and ".join(bounds)


def _shown(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def _unknown_setting(name: str, settings: Mapping[str, Setting], owner: str) -> str:
    near = difflib.get_close_matches(name, settings, n=1)
    message = f"{owner}: unknown setting '{name}'. It has: {', '.join(sorted(settings)) or 'none'}."
    return f"{message} Did you mean '{near[0]}'?" if near else message


def _problem(errors: list[ErrorDetails], values: Mapping[str, object], settings: Mapping[str, Setting]) -> str:
    """One sentence about the first wrong field. For a union, pydantic reports an error for each member."""
    first = errors[0]
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if not first["loc"]:
        return f"{message}."
    name = str(first["loc"][0])
    kinds = {error["type"] for error in errors if error["loc"][:1] == (name,)}
    if len(kinds) > 1:
        kinds.discard("too_short")  # a consequence of a refused item
    setting = settings[name]
    if "missing" in kinds:
        return f"{name} is required ({_expected(setting)}). Add --set {name}=VALUE."
    found = f"{name} = {json.dumps(values.get(name), ensure_ascii=False, default=str)}"
    if kinds & {"value_error", "assertion_error"}:
        return f"{found}: {message}."
    if "finite_number" in kinds:
        return f"{found} is not a finite number."
    if kinds & _RANGE_ERRORS:
        return f"{found} is out of range. Allowed: {setting.allowed or message}."
    if kinds <= {"literal_error", "enum"} and setting.allowed:
        near = difflib.get_close_matches(str(values.get(name)), setting.allowed.split(", "), n=1)
        return f"{found} is not known. Allowed: {setting.allowed}." + (f" Did you mean '{near[0]}'?" if near else "")
    message = f"{found} has the wrong type. Expected: {_expected(setting)}."
    if setting.type.startswith("list of") and isinstance(values.get(name), int | float | str):
        message += f" Write {name}=[{values[name]}]."
    return message


_RANGE_ERRORS = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "multiple_of",
    "string_too_short",
    "string_too_long",
    "too_short",
    "too_long",
}


def _expected(setting: Setting) -> str:
    return f"{setting.type}, {setting.allowed}" if setting.allowed else setting.type


def layers_named(hparams: HParams) -> Iterator[tuple[str, int]]:
    """Name and value of every setting of type :data:`Layer`; a tuple gives all of its numbers.

    >>> class Example(HParams):
    ...     layers: tuple[Layer, ...] = (3, 4)
    ...     modules: tuple[tuple[str, tuple[Layer, ...]], ...] = (("mlp.up_proj", (5,)),)
    ...     rank: int = 8
    >>> list(layers_named(Example()))
    [('layers', 3), ('layers', 4), ('modules', 5)]
    """
    for name, field in type(hparams).model_fields.items():
        if _LAYER in field.metadata or _mentions_layer(field.annotation):
            yield from ((name, layer) for layer in _layers_in(getattr(hparams, name)))


def _layers_in(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for part in value:
            yield from _layers_in(part)
    elif isinstance(value, int):
        yield value


def _mentions_layer(annotation: object) -> bool:
    return any(part is _LAYER or _mentions_layer(part) for part in get_args(annotation))
