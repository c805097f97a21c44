"""Reads hyperparameter files of the methods' reference repositories and of EasyEdit as editcore's settings.

Most of their fields have the same name here. The other fields belong to the run (model, device, text) or say where
modules are, which editcore finds by itself. Each of these is dropped, with a reason. This module names no method: the
fields come from the hyperparameter classes of the installed plugins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError
from editcore.interfaces.specs import EditorSpec
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.settings.hparams import HParams, Setting, build, describe, to_toml, toml_lines

__all__ = ["Imported", "import_file"]

Fields = Mapping[str, object]

_BELONGS_ELSEWHERE = (
    (r".*_(module|tmp)", "editcore finds the modules by itself"),
    (r"(model|tokenizer)(_name|_class|_path)?", "the model is an option of the run (--model)"),
    (r"device|model_parallel|fp16|bf16|dtype", "device and type are options of the run (--device, --dtype)"),
    (
        r"stats_dir|mom2_(dataset|n_samples|dtype)",
        "the text behind the second moments is an option of the run (--corpus, --corpus-tokens)",
    ),
    (r"batch_size|max_length", "batches are an option of the run (--batch-size), and texts are never cut"),
    (r"v_loss_layer", "the loss is read from the model's own logits, which its last block gives"),
)
"""Fields that are not hyperparameters here, by pattern, and why."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A file of hyperparameters, as settings of editcore."""

    source: str
    """Path of the file."""
    editor: str
    """The editor whose settings it has."""
    backend: str | None
    """The backend whose settings the file has; ``None`` if it has none."""
    extensions: tuple[str, ...]
    """The extensions whose settings the file has."""
    settings: Mapping[str, HParams]
    """By name of editor, backend or extension. Fields that the file does not have are unset."""
    added: Mapping[str, str]
    """Settings that the file leaves to the reference code, as ``name = value``, and why they are set here."""
    dropped: Mapping[str, str]
    """Fields that were not used, and why."""

    def toml(self) -> str:
        """A file for ``editctl run --config``."""
        options: dict[str, object] = {"editor": self.editor}
        if self.backend:
            options["backend"] = self.backend
        if self.extensions:
            options["plugins"] = list(self.extensions)
        tables = (
            f"\n[{name}]\n{to_toml(values, only=values.model_fields_set)}" for name, values in self.settings.items()
        )
        first = f"# From {_printable(self.source)}, by editctl hparams import.\n"
        return "".join([first, toml_lines(options), *tables])


def import_file(path: Path | str, plugins: Plugins, *, editor: str | None = None) -> Imported:
    """Read a JSON or YAML file of hyperparameters.

    Args:
        editor: the editor that the file is for; left out, ``alg_name`` in the file names it, or the file's folder.

    Raises:
        HParamsError: the file cannot be read, its editor is not known, or a value does not fit its setting.
        UnknownNameError: ``editor`` is not installed.
    """
    path = Path(path)
    try:
        fields = _read(path)
        spec = plugins.editor(editor) if editor is not None else _editor_of(path, fields, plugins)
        return _translate(path, fields, spec, plugins)
    except RecursionError as error:
        raise HParamsError(f"{path} is nested too deeply for a file of hyperparameters.") from error


def _read(path: Path) -> Fields:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise HParamsError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:  # not UTF-8, or a name that no file can have
        raise HParamsError(f"{path} is not a text file: {error}.") from error
    kind, parse = ("JSON", _parse_json) if path.suffix.lower() == ".json" else ("YAML", _parse_yaml)
    try:
        values = parse(text)
    except ValueError as error:
        raise HParamsError(f"{path} is not a {kind} file: {_one_line(error)}.") from error
    if not isinstance(values, dict):
        raise HParamsError(f"{path} has no fields: it must hold names with values, such as layers: [5].")
    return values


def _parse_json(text: str) -> object:
    values: object = json.loads(text)
    return values


def _parse_yaml(text: str) -> object:
    """A YAML document with every scalar as text.

    YAML 1.1 does not read 5e-1 as a number. So numbers are read later, when the type of the field is known. Tags are
    ignored, and aliases are refused.
    """
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.BaseLoader)):
            raise ValueError("it uses an alias, which is not supported here")
        values: object = yaml.load(text, Loader=yaml.BaseLoader)  # makes dicts, lists and texts only
    except (yaml.YAMLError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" overflows
        raise ValueError(str(error)) from error
    return values


def _editor_of(path: Path, fields: Fields, plugins: Plugins) -> EditorSpec:
    """The editor that the file names, or that its folder names, because the repositories have
    ``hparams/METHOD/MODEL``."""
    editors = plugins.editors()
    named = fields.get("alg_name")
    also = {other: spec for spec in editors.values() for other in _class_of(spec).also_named}
    for name in (named, path.absolute().parent.name):
        if isinstance(name, str) and (found := {**also, **editors}.get(name.lower())) is not None:
            return found
    asked = f"names {_shown(named)}, which is not installed" if named else "does not name its method (alg_name)"
    raise HParamsError(f"{path} {asked}. Name its editor with --editor: {', '.join(sorted(editors)) or 'none'}.")


def _class_of(spec: EditorSpec) -> type[HParams]:
    made: type[HParams] = resolve(spec.hparams)
    return made


@dataclass(frozen=True, slots=True)
class _Owner:
    """An installed editor, backend or extension, with its settings."""

    name: str
    kind: str
    hparams: type[HParams]
    settings: Mapping[str, Setting]

    @classmethod
    def of(cls, kind: str, name: str, hparams: str) -> _Owner:
        made: type[HParams] = resolve(hparams)
        return cls(name, kind, made, {setting.name: setting for setting in describe(made)})

    def find(self, field: str) -> str | None:
        """The setting for a field: it has the field's name, or the field's name without the owner's prefix."""
        return next((name for name in (field, field.removeprefix(f"{self.name}_")) if name in self.settings), None)


def _translate(path: Path, fields: Fields, spec: EditorSpec, plugins: Plugins) -> Imported:
    _check_loss_layer(path, fields)
    editor = _Owner.of("editor", spec.name, spec.hparams)
    companions = list(_companions(plugins))
    values: dict[str, dict[str, object]] = {editor.name: {}}
    dropped: dict[str, str] = {}
    chosen: dict[str, str] = {}
    mode = str(fields.get("edit_mode", ""))
    if mode and not any(_asks_for(mode, backend) for backend in plugins.backends()):
        dropped["edit_mode"] = f"no installed backend is {_shown(mode)}"
    for field, value in fields.items():
        if field in {"alg_name", "edit_mode"}:
            continue
        if field in editor.settings:
            values[editor.name][field] = value
        elif field in _TRANSLATORS and (translated := _TRANSLATORS[field](value, editor.settings)):
            values[editor.name] |= {name: known for name, known in translated.items() if name not in fields}
            if field in _VARIANT_FIELDS:
                chosen |= {name: f"{field} is set" for name in translated if name not in fields}
        elif (found := _companion(field, companions)) is None:
            dropped[field] = _reason(field, editor, companions)
        elif found[0].kind == "backend" and mode and not _asks_for(mode, found[0].name):
            dropped[field] = f"edit_mode is {_shown(mode)}, not {found[0].name}"
        else:
            values.setdefault(found[0].name, {})[found[1]] = value
    added = {name: (values[editor.name][name], why) for name, why in chosen.items()}
    added |= dict(_added(values[editor.name], editor, _alias_of(path, fields, editor)))
    values[editor.name] |= {name: value for name, (value, _) in added.items()}
    owners = {owner.name: owner for owner in (editor, *companions) if owner.name in values}
    return Imported(
        source=path.name,
        editor=editor.name,
        backend=next((name for name, owner in owners.items() if owner.kind == "backend"), None),
        extensions=tuple(name for name, owner in owners.items() if owner.kind == "extension"),
        settings={name: _build(path, owner, values[name]) for name, owner in owners.items()},
        added={f"{name} = {_shown(value)}": why for name, (value, why) in added.items()},
        dropped=dropped,
    )


def _check_loss_layer(path: Path, fields: Fields) -> None:
    """Refuse a loss that is not read at the last block of the model.

    The file does not say how many blocks the model has. The last one is none that an edited block is above.
    """
    asked = _number(fields.get("v_loss_layer"))
    if asked is None or asked in _NONE:
        return
    layers = fields.get("layers")
    edited = [number for part in layers if isinstance(number := _number(part), int)] if isinstance(layers, list) else []
    if type(asked) is not int or asked < max(edited, default=0):
        raise HParamsError(
            f"{path}: v_loss_layer is {_shown(asked)}, and layers is {_shown(layers)}. The loss is read from the "
            "model's own logits, so v_loss_layer must be its last block, or be left out."
        )


def _companions(plugins: Plugins) -> Iterator[_Owner]:
    """Backends and extensions with settings."""
    kinds = {"backend": plugins.backends(), "extension": plugins.extensions()}
    for kind, specs in kinds.items():
        for name, spec in specs.items():
            hparams = getattr(spec, "hparams", None)
            if hparams:
                yield _Owner.of(kind, name, hparams)


def _companion(field: str, companions: Sequence[_Owner]) -> tuple[_Owner, str] | None:
    """The owner of a field, and its setting. An owner whose name is the field's prefix comes first."""
    ordered = sorted(companions, key=lambda owner: not field.startswith(f"{owner.name}_"))
    return next(((owner, name) for owner in ordered if (name := owner.find(field)) is not None), None)


def _asks_for(mode: str, backend: str) -> bool:
    """Whether an ``edit_mode`` such as ``lora_native`` asks for a backend."""
    return mode == backend or mode.startswith(f"{backend}_")


def _reason(field: str, editor: _Owner, companions: Collection[_Owner]) -> str:
    for pattern, reason in _BELONGS_ELSEWHERE:
        if re.fullmatch(pattern, field):
            return reason
    for owner in companions:
        if field.startswith(f"{owner.name}_"):
            return f"the {owner.kind} {owner.name} has no such setting"
    return (
        f"neither {editor.name} nor an installed backend or extension has such a setting (if it belongs to a package, "
        "install that first)"
    )


def _alias_of(path: Path, fields: Fields, editor: _Owner) -> str:
    """The other name of the editor's method that the file, or its folder, has; empty if there is none."""
    names = (str(fields.get("alg_name", "")), path.absolute().parent.name)
    return next((name for name in names if name.lower() in editor.hparams.also_named), "")


def _added(values: Fields, editor: _Owner, alias: str) -> Iterator[tuple[str, tuple[object, str]]]:
    """Settings that follow from the method's name, and those that the files leave to reference code with another
    default."""
    for name, value in editor.hparams.also_named.get(alias.lower(), {}).items():
        if name not in values:
            yield name, (value, f"the file is for {alias}")
    yield from ((name, left) for name, left in editor.hparams.left_to_code.items() if name not in values)


_MOST_CONTEXTS = 100
"""No list is made for more contexts, because the settings refuse them."""


def _context_counts(value: object, settings: Collection[str]) -> Fields:
    """Pairs of length and number, such as ``[[5, 10], [10, 10]]``, as the count of all contexts and their lengths."""
    if not {"context_count", "context_length"} <= set(settings) or not isinstance(value, list):
        return {}
    pairs = [[_number(part) for part in pair] if isinstance(pair, list) else [] for pair in value]
    lengths = [pair[0] for pair in pairs if len(pair) == 2 and isinstance(pair[0], int)]
    counts = [pair[1] for pair in pairs if len(pair) == 2 and isinstance(pair[1], int)]
    if not value or not len(lengths) == len(counts) == len(pairs):
        return {}
    if len(set(counts)) > 1 and min(counts) >= 0 and sum(counts) <= _MOST_CONTEXTS:  # one length per context is needed
        lengths = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    return {"context_count": sum(counts), "context_length": lengths[0] if len(set(lengths)) == 1 else lengths}


def _key_mode(mode: str) -> Callable[[object, Collection[str]], Fields]:
    def translate(value: object, settings: Collection[str]) -> Fields:
        return {"key_mode": mode} if "key_mode" in settings and _number(value) is True else {}

    return translate


_TRANSLATORS: Mapping[str, Callable[[object, Collection[str]], Fields]] = {
    "context_template_length_params": _context_counts,
    "enable_random_prefix_keys": _key_mode("mean"),
    "enable_prompt_keys": _key_mode("prompt"),
}
"""Fields that have another name or form here. A translator returns nothing if there is no such setting."""
_NONE = ("", "~", "null", "Null", "NULL")
"""How YAML writes that there is no value."""
_VARIANT_FIELDS = frozenset({"enable_random_prefix_keys", "enable_prompt_keys"})
"""Fields that choose a variant of a method. The settings that follow are reported to the user."""


def _build(path: Path, owner: _Owner, values: Fields) -> HParams:
    fitted = {name: _fit(value, owner.settings[name]) for name, value in values.items()}
    return build(owner.hparams, [fitted], owner=f"{path} ({owner.name})")


def _fit(value: object, setting: Setting) -> object:
    """The value, with texts read as numbers and truth values where the setting takes no text."""
    if setting.type.endswith(" or none") and value in _NONE:
        return None
    return value if "text" in setting.type else _read_numbers(value, whole="int" in setting.type)


def _read_numbers(value: object, *, whole: bool) -> object:
    if isinstance(value, list):
        return [_read_numbers(part, whole=whole) for part in value]
    if isinstance(value, dict):
        return {key: _read_numbers(part, whole=whole) for key, part in value.items()}
    number = _number(value)
    return int(number) if whole and isinstance(number, float) and number.is_integer() else number


def _number(value: object) -> object:
    """The number or truth value that a text is; any other value as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in {"true", "yes", "on"}:
        return True
    if text.lower() in {"false", "no", "off"}:
        return False
    try:
        if re.fullmatch(r"[-+]?[0-9]+", text):
            return int(text)
        if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
            return float(text)
    except ValueError:  # more digits than Python reads
        pass
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
