"""Hyperparameters are checked, described and read from their sources with messages that name the way out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from editcore.interfaces.errors import HParamsError, PluginError, UnknownNameError
from editcore.settings.hparams import HParams, build, describe, list_presets, load_preset, parse_assignment, to_toml
from hypothesis import given, strategies as st
from pydantic import Field, ValidationError, model_validator


class Settings(HParams):
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Blocks that are
    rewritten."""
    kl_factor: Annotated[float, Field(ge=0, le=1)] = 0.0625
    """Weight of the ``drift`` term."""
    mode: Literal["mean", "prompt"] = "mean"
    weight: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    stop: Annotated[float, Field(gt=0)] | None = 0.5
    steps: Annotated[int, Field(ge=1)] = 20
    name: str = ""
    fast: bool = False

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers must ascend, found {list(self.layers)}")
        return self


def read(**values: object) -> Settings:
    return build(Settings, [values], owner="toy")


def refusal(**values: object) -> str:
    with pytest.raises(HParamsError) as caught:
        read(**values)
    return str(caught.value)


def test_description_says_type_default_range_and_meaning() -> None:
    rows = {row.name: row for row in describe(Settings)}
    assert list(rows) == ["layers", "kl_factor", "mode", "weight", "stop", "steps", "name", "fast"]
    layers = rows["layers"]
    assert (layers.type, layers.required, layers.allowed) == ("list of int", True, "not empty, each ≥ 0")
    assert layers.meaning == "Blocks that are rewritten."
    factor = rows["kl_factor"]
    assert (factor.type, factor.required, factor.default, factor.allowed) == ("float", False, 0.0625, "≥ 0 and ≤ 1")
    assert factor.meaning == "Weight of the `drift` term."
    assert (rows["mode"].type, rows["mode"].allowed) == ("text", "mean, prompt")
    assert (rows["weight"].type, rows["weight"].allowed) == ("float or auto", "> 0")
    assert rows["stop"].type == "float or none"
    assert rows["fast"].type == "bool"


def test_a_later_source_wins() -> None:
    preset = {"layers": [3], "kl_factor": 0.5, "steps": 10}
    section = {"kl_factor": 0.25}
    settings = build(Settings, [preset, section, {"steps": 5}], owner="toy")
    assert (settings.layers, settings.kl_factor, settings.steps) == ((3,), 0.25, 5)


def test_an_int_is_a_float_and_none_is_none() -> None:
    assert read(layers=[1], kl_factor=1).kl_factor == 1.0
    assert read(layers=[1], stop="none").stop is None
    assert read(layers=[1], name="none").name == "none"
    assert read(layers=[1], weight=2).weight == 2.0


def test_an_unknown_setting_lists_those_that_exist() -> None:
    assert refusal(layers=[1], kl_facter=1) == (
        "toy: unknown setting 'kl_facter'. It has: fast, kl_factor, layers, mode, name, steps, stop, weight. "
        "Did you mean 'kl_factor'?"
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {},
            "toy: layers is required (list of int, not empty, each ≥ 0). Add --set layers=VALUE.",
        ),
        (
            {"layers": 3},
            "toy: layers = 3 has the wrong type. Expected: list of int, not empty, each ≥ 0. Write layers=[3].",
        ),
        ({"layers": []}, "toy: layers = [] is out of range. Allowed: not empty, each ≥ 0."),
        ({"layers": [-1]}, "toy: layers = [-1] is out of range. Allowed: not empty, each ≥ 0."),
        (
            {"layers": ["a"]},
            'toy: layers = ["a"] has the wrong type. Expected: list of int, not empty, each ≥ 0.',
        ),
        ({"layers": [2, 1]}, "toy: layers must ascend, found [2, 1]."),
        ({"kl_factor": 1.5}, "toy: kl_factor = 1.5 is out of range. Allowed: ≥ 0 and ≤ 1."),
        ({"kl_factor": "0.5"}, 'toy: kl_factor = "0.5" has the wrong type. Expected: float, ≥ 0 and ≤ 1.'),
        ({"stop": float("inf")}, "toy: stop = Infinity is not a finite number."),
        ({"stop": float("nan")}, "toy: stop = NaN is not a finite number."),
        ({"mode": "maen"}, "toy: mode = \"maen\" is not known. Allowed: mean, prompt. Did you mean 'mean'?"),
        ({"weight": -1}, "toy: weight = -1 is out of range. Allowed: > 0."),
        ({"weight": "much"}, 'toy: weight = "much" has the wrong type. Expected: float or auto, > 0.'),
        ({"steps": 2.5}, "toy: steps = 2.5 has the wrong type. Expected: int, ≥ 1."),
        ({"steps": True}, "toy: steps = true has the wrong type. Expected: int, ≥ 1."),
        ({"fast": 1}, "toy: fast = 1 has the wrong type. Expected: bool."),
    ],
)
def test_a_bad_value_is_one_sentence(values: dict[str, object], sentence: str) -> None:
    required = {} if not values or "layers" in values else {"layers": [1]}
    assert refusal(**required, **values) == sentence


def test_hyperparameters_are_frozen() -> None:
    with pytest.raises(ValidationError):
        read(layers=[1]).steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=0.1", 0.1),
        ("k=1e-5", 1e-5),
        ("k = 3", 3),
        ("k=[3, 4]", [3, 4]),
        ("k=true", True),
        ('k="true"', "true"),
        ("k=subject_last", "subject_last"),
        ("k=a=b", "a=b"),
        ("k=", ""),
        ("k=007", "007"),
        ("k=2020-01-01", "2020-01-01"),
        ("k=1\nj=2", "1\nj=2"),
    ],
)
def test_an_assignment_is_read_as_toml_and_a_bare_word_as_text(text: str, value: object) -> None:
    assert parse_assignment(text) == ("k", value)


@pytest.mark.parametrize("text", ["kl_factor", "=1", ""])
def test_an_assignment_needs_a_key_and_a_value(text: str) -> None:
    with pytest.raises(HParamsError, match="--set takes KEY=VALUE, found"):
        parse_assignment(text)


@given(
    layers=st.lists(st.integers(0, 99), min_size=1).map(sorted).map(tuple),
    kl_factor=st.floats(0, 1),
    weight=st.one_of(st.just("auto"), st.floats(1e-300, 1e300)),
    stop=st.none() | st.floats(1e-9, 1e9),
    name=st.text(st.characters(codec="utf-8")),
    fast=st.booleans(),
)
def test_what_is_written_as_toml_is_read_back_the_same(**values: object) -> None:
    settings = Settings(**values)  # type: ignore[arg-type]
    assert build(Settings, [tomllib.loads(to_toml(settings))], owner="toy") == settings


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "toy_presets"
    folder.mkdir()
    (folder / "qwen2.5-7b.toml").write_text("# why\nlayers = [3]\nkl_factor = 0.5\n", encoding="utf-8")
    (folder / "nested.toml").write_text("[section]\nlayers = [3]\n", encoding="utf-8")
    (folder / "broken.toml").write_text("layers = \n", encoding="utf-8")
    (folder / "README.md").write_text("not a preset", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "toy_presets"


def test_presets_are_the_toml_files_of_a_package(presets: str) -> None:
    assert list_presets(presets) == ("broken", "nested", "qwen2.5-7b")
    assert list_presets(None) == ()
    assert load_preset(presets, "qwen2.5-7b") == {"layers": [3], "kl_factor": 0.5}


def test_an_unknown_preset_lists_those_that_exist(presets: str) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown preset 'qwen2\.5-7'.*Did you mean 'qwen2\.5-7b'\?"):
        load_preset(presets, "qwen2.5-7")
    with pytest.raises(UnknownNameError, match="Available: none"):
        load_preset(None, "x")
    with pytest.raises(UnknownNameError):
        load_preset(presets, "../toy_presets/nested")


def test_a_preset_must_be_a_flat_table(presets: str) -> None:
    with pytest.raises(HParamsError, match=r"must be a flat table, found the section \[section\]"):
        load_preset(presets, "nested")
    with pytest.raises(HParamsError, match="'broken' of toy_presets is not valid TOML"):
        load_preset(presets, "broken")


def test_a_missing_package_of_presets_is_the_plugins_fault() -> None:
    with pytest.raises(PluginError, match="'no_such_presets' cannot be found"):
        list_presets("no_such_presets")
