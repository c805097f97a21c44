"""Hyperparameter files of other frameworks become ours; whatever they hold, the answer is TOML or a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from editcore.interfaces.errors import EditcoreError, HParamsError, UnknownNameError
from editcore.plugins.registry import Plugins
from editcore.settings.reference import Imported, import_file
from hypothesis import given, settings, strategies as st

PLUGIN = """
from editcore import BackendSpec, EditorSpec, ExtensionSpec, hookimpl

@hookimpl
def editcore_editors():
    return [EditorSpec("toy", "none:Toy", hparams="import_toy_hparams:Toy", summary="A toy."),
            EditorSpec("bare", "none:Bare", hparams="import_toy_hparams:Bare", summary="A bare toy.")]

@hookimpl
def editcore_backends():
    return [BackendSpec("overlay", "none:Overlay", hparams="import_toy_hparams:Overlay", summary="Over it.")]

@hookimpl
def editcore_extensions():
    return [ExtensionSpec("guard", "none:Guard", hparams="import_toy_hparams:Guard", summary="A guard.")]
"""
HPARAMS = """
from collections.abc import Mapping
from typing import Literal
from editcore import HParams
from editcore.locate_then_edit import LocateThenEditHParams

class Toy(LocateThenEditHParams):
    left_to_code = {**LocateThenEditHParams.left_to_code, "clamp_norm": ("stream", "so it is there")}
    also_named = {"r-toy": {"key_mode": "mean", "toy_lambda": 2.0}}

    toy_lambda: float = 0.0
    key_mode: Literal["mean", "prompt", "original"] = "original"

class Bare(HParams):
    speed: float = 1.0
    name: str | None = "x"
    layers: tuple[int, ...] = ()

class Overlay(HParams):
    rank: int = 8
    overlay_alpha: float = 1.0
    allow_fallback: bool = True
    guard_scale: float = 1.0

class Guard(HParams):
    scale: float = 1.0
    guard_threshold: float | None = 0.5
    guard_weights: Mapping[str, float] | None = None
"""
TOY = """
alg_name: "TOY"
model_name: "./hugging_cache/llama-2-7b"
stats_dir: "./data/stats"
device: 0
layers: [4, 5]
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
clamp_norm_factor: 4
mom2_adjustment: false
mom2_update_weight: 15000
context_template_length_params: [[5, 10], [10, 11]]
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
ln_f_module: "model.norm"
mom2_n_samples: 100000
toy_lambda: 1E-1
fp16: true
prob_cutoff: 0
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugins]:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "import_toy_plugin.py").write_text(PLUGIN)
    (folder / "import_toy_hparams.py").write_text(HPARAMS)
    sys.path.insert(0, str(folder))
    try:
        modules = {"builtin": "editcore.runs.builtins", "toys": "import_toy_plugin"}
        entries = [EntryPoint(name, module, "editcore") for name, module in modules.items()]
        yield Plugins.load(entry_points=entries, disabled=[])
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def read(tmp_path: Path, plugins: Plugins) -> object:
    def read(text: str, name: str = "model.yaml", editor: str | None = None) -> Imported:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return import_file(path, plugins, editor=editor)

    return read


def test_a_yaml_file_becomes_settings(read) -> None:
    imported = read(TOY)
    assert tomllib.loads(imported.toml()) == {
        "editor": "toy",
        "toy": {
            "layers": [4, 5],
            "layer_selection": "all",
            "fact_token": "subject_last",
            "context_count": 21,
            "context_length": [*10 * [5], *11 * [10]],
            "v_num_grad_steps": 25,
            "v_lr": 0.5,
            "v_weight_decay": 0.001,
            "clamp_norm_factor": 4.0,
            "clamp_norm": "stream",
            "kl_position": "lookup",
            "mom2_adjustment": False,
            "mom2_update_weight": 15000.0,
            "toy_lambda": 0.1,
        },
    }
    assert list(imported.added) == ['kl_position = "lookup"', 'clamp_norm = "stream"']
    dropped = "model_name stats_dir device rewrite_module_tmp ln_f_module mom2_n_samples fp16 prob_cutoff v_loss_layer"
    assert set(imported.dropped) == set(dropped.split())
    assert "--model" in imported.dropped["model_name"]
    assert "the model's own logits" in imported.dropped["v_loss_layer"]
    assert "finds the modules by itself" in imported.dropped["rewrite_module_tmp"]
    assert "such a setting" in imported.dropped["prob_cutoff"]


def test_a_json_file_says_the_same(read) -> None:
    fields = {"alg_name": "TOY", "layers": [4], "v_lr": 5e-1, "v_weight_decay": "1e-3", "v_num_grad_steps": 20.0}
    [values] = read(json.dumps(fields), "model.json").settings.values()
    assert (values.v_lr, values.v_weight_decay, values.v_num_grad_steps) == (0.5, 0.001, 20)


@pytest.mark.parametrize("name", ["TOY/gpt2-xl.json", "toy/gpt2-xl.json"])
def test_the_folder_names_the_editor_where_the_file_does_not(read, name: str) -> None:
    assert read('{"layers": [1]}', name).editor == "toy"


def test_the_option_wins(read) -> None:
    assert read("alg_name: TOY\nspeed: 2", "TOY/model.yaml", "bare").editor == "bare"


def test_fields_of_companions_go_into_their_tables(read) -> None:
    text = "alg_name: TOY\nlayers: [1]\nedit_mode: overlay_native\noverlay_rank: 16\noverlay_alpha: 3\n"
    text += "allow_fallback: false\nguard_threshold: null\nguard_weights: {gain: 7e-1, other: 3e-1}\noverlay_none: 1\n"
    imported = read(text)
    table = tomllib.loads(imported.toml())
    assert (table["backend"], table["plugins"]) == ("overlay", ["guard"])
    assert table["overlay"] == {"rank": 16, "overlay_alpha": 3.0, "allow_fallback": False}
    assert table["guard"] == {"guard_threshold": "none", "guard_weights": {"gain": 0.7, "other": 0.3}}
    assert imported.dropped == {"overlay_none": "the backend overlay has no such setting"}


def test_the_name_in_front_of_a_field_says_whose_it_is(read) -> None:
    table = tomllib.loads(read("alg_name: TOY\nlayers: [1]\nguard_scale: 2\n").toml())
    assert (table["guard"], "overlay" in table) == ({"scale": 2.0}, False)


def test_what_the_file_says_is_not_left_to_its_code(read) -> None:
    imported = read("alg_name: TOY\nlayers: [1]\nkl_position: last\n")
    assert list(imported.added) == ['clamp_norm = "stream"']
    assert tomllib.loads(imported.toml())["toy"]["kl_position"] == "last"


def test_settings_of_a_backend_that_is_not_used_are_dropped(read) -> None:
    imported = read("alg_name: TOY\nlayers: [1]\nedit_mode: raw\noverlay_rank: 16\n")
    assert imported.backend is None
    assert imported.dropped == {"overlay_rank": 'edit_mode is "raw", not overlay'}


def test_a_backend_that_is_not_installed_is_said(read) -> None:
    imported = read("alg_name: TOY\nlayers: [1]\nedit_mode: other_native\nother_rank: 16\n")
    assert imported.dropped["edit_mode"] == 'no installed backend is "other_native"'
    assert "install" in imported.dropped["other_rank"]


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ("", "original"),
        ("enable_random_prefix_keys: true", "mean"),
        ("enable_prompt_keys: true", "prompt"),
        ("enable_prompt_keys: true\nenable_random_prefix_keys: false", "prompt"),
    ],
)
def test_flags_that_choose_the_key(read, flags: str, mode: str) -> None:
    imported = read(f"alg_name: TOY\nlayers: [1]\n{flags}\n")
    [values] = imported.settings.values()
    assert values.key_mode == mode
    told = {name: why for name, why in imported.added.items() if name.startswith("key_mode")}
    if flags:
        assert told == {f'key_mode = "{mode}"': f"{flags.split(':')[0]} is set"}
    else:
        assert not told


@pytest.mark.parametrize(("text", "name"), [("alg_name: R-Toy", "model.yaml"), ("", "R-TOY/model.yaml")])
def test_a_variant_that_a_file_is_for_becomes_settings(read, text: str, name: str) -> None:
    imported = read(f"{text}\nlayers: [1]\ntoy_lambda: 1\n", name)
    [values] = imported.settings.values()
    assert imported.editor == "toy"
    assert (values.key_mode, values.toy_lambda) == ("mean", 1.0), "what the file says stays"
    assert imported.added['key_mode = "mean"'] == f"the file is for {'R-Toy' if text else 'R-TOY'}"
    assert "toy_lambda = 2.0" not in imported.added


@pytest.mark.parametrize(("params", "length"), [("[[5, 10], [10, 10]]", [5, 10]), ("[[10, 20]]", 10)])
def test_contexts_of_several_lengths_are_mixed(read, params: str, length: object) -> None:
    table = tomllib.loads(read(f"alg_name: TOY\nlayers: [1]\ncontext_template_length_params: {params}\n").toml())
    assert (table["toy"]["context_count"], table["toy"]["context_length"]) == (20, length)


@pytest.mark.parametrize("params", ["[]", "5", "[[5]]", "[[a, 1]]", "[[5, 10], 3]", "{}"])
def test_contexts_in_another_form_are_dropped(read, params: str) -> None:
    imported = read(f"alg_name: TOY\nlayers: [1]\ncontext_template_length_params: {params}\n")
    assert "context_template_length_params" in imported.dropped


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("layers: [1]", "model.yaml", ["model.yaml", "alg_name", "--editor", "bare, toy"]),
        ("alg_name: Q-TOY", "model.yaml", ['"Q-TOY"', "not installed"]),
        ("alg_name: [1]", "model.yaml", ['["1"]']),
        ("alg_name: TOY", "model.yaml", ["model.yaml", "layers is required"]),
        ("alg_name: TOY\nlayers: 5", "model.yaml", ["model.yaml", "layers", "wrong type"]),
        ("alg_name: TOY\nlayers: [1]\nv_lr: -1", "model.yaml", ["v_lr", "out of range"]),
        ("alg_name: TOY\nlayers: [1]\nv_lr: fast", "model.yaml", ['v_lr = "fast"']),
        ("alg_name: TOY\nlayers: [2, 1]", "model.yaml", ["layers must ascend"]),
        ("alg_name: TOY\nlayers: [4, 5]\nv_loss_layer: 4", "model.yaml", ["v_loss_layer is 4", "its last block"]),
        ("alg_name: TOY\nlayers: [4]\nv_loss_layer: last", "model.yaml", ['v_loss_layer is "last"', "be left out"]),
        ('{"alg_name": "TOY", "layers": [1], "v_lr": null}', "model.json", ["v_lr = null"]),
        ('{"layers": [1],}', "model.json", ["model.json is not a JSON file"]),
        ("layers: [1", "model.yaml", ["model.yaml is not a YAML file"]),
        ("a: &x [1]\nb: *x", "model.yaml", ["alias"]),
        ('a: "\\UFFFFFFFF"', "model.yaml", ["not a YAML file"]),
        ("[1, 2]", "model.json", ["model.json has no fields"]),
        ("", "model.yaml", ["has no fields"]),
        ("[" * 3000, "model.json", ["model.json"]),
        ("[" * 3000 + "]" * 3000, "model.yaml", ["nested too deeply"]),
    ],
)
def test_what_cannot_be_imported_is_said_in_a_sentence(read, text: str, name: str, words: list[str]) -> None:
    with pytest.raises(HParamsError) as raised:
        read(text, name)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith((".", "]"))
    assert all(word in message for word in words), message


def test_an_editor_that_is_not_installed(read) -> None:
    with pytest.raises(UnknownNameError, match="Unknown editor 'toi'"):
        read("layers: [1]", editor="toi")


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path, plugins: Plugins) -> None:
    with pytest.raises(HParamsError, match="Cannot read"):
        import_file(tmp_path / "none.json", plugins)
    with pytest.raises(HParamsError, match="Cannot read"):
        import_file(tmp_path, plugins)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(HParamsError, match="not a text file"):
        import_file(tmp_path / "binary.yaml", plugins)


def parse_back(path: Path, plugins: Plugins, editor: str | None) -> None:
    """Importing gives TOML that can be written and read, or an error for users."""
    try:
        imported = import_file(path, plugins, editor=editor)
    except EditcoreError as error:
        str(error).encode("utf-8", "backslashreplace")
        return
    table = tomllib.loads(imported.toml().encode().decode())
    assert table["editor"] == imported.editor


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars | st.sampled_from(["5e-1", "1_0", "yes", "~", "null", "0x10", "lookup", "auto", "none", "9" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = """alg_name layers v_lr v_loss_layer mom2_update_weight kl_position fact_token key_mode name context_templates
context_template_length_params enable_prompt_keys edit_mode overlay_rank rank guard_weights guard_threshold
allow_fallback mom2_adjustment device speed guard_ overlay_"""
names = st.sampled_from(NAMES.split()) | st.text(max_size=8)
fields = st.dictionaries(names, values, max_size=8).map(lambda made: {"layers": [1], **made})
editors = st.sampled_from(["toy", "bare", None])


@settings(max_examples=300, deadline=None)
@given(fields, editors, st.sampled_from([".json", ".yaml"]))
def test_any_fields_give_toml_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, plugins: Plugins, made: dict[str, object], editor: str | None, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fields{suffix}"
    path.write_text(json.dumps(made), encoding="utf-8")
    parse_back(path, plugins, editor)


PIECES = (
    "layers: [1]\n", "alg_name: TOY\n", "v_lr: 5e-1\n", "- ", ": ", "? ", "!!float x", "!!binary =", "&a ", "*a ",
    "<<: ", "!!python/name:os ", "{", "}", "[", "]", ",", "'", '"', "|\n ", ">-\n ", "%YAML 99\n", "---\n", "...\n",
    "#", "\\x", "\t", "\n", "2001-99-99", "1:60", "0o9", ".inf", "\x07", "\ufeff", "\u2028", "é",
)  # fmt: skip
pieces = st.sampled_from(PIECES)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(pieces | st.text(max_size=6), max_size=12).map("".join).map(lambda text: text.encode("utf-8", "ignore"))
    | st.binary(max_size=40),
    editors,
    st.sampled_from([".json", ".yaml", ""]),
)
def test_any_content_gives_toml_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, plugins: Plugins, content: bytes, editor: str | None, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"content{suffix}"
    path.write_bytes(content)
    parse_back(path, plugins, editor)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the toys installed, for ``PYTHONPATH``."""
    site = tmp_path / "site"
    info = site / "edit_toys-0.5.dist-info"
    info.mkdir(parents=True)
    (site / "import_toy_plugin.py").write_text(PLUGIN)
    (site / "import_toy_hparams.py").write_text(HPARAMS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-toys\nVersion: 0.5\n")
    (info / "entry_points.txt").write_text("[editcore]\ntoys = import_toy_plugin\n")
    return site


def editctl(*arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    code = "from editcore.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(path), "COLUMNS": "200"},
        timeout=60,
    )


def test_the_command_prints_and_says_what_it_dropped(tmp_path: Path, installed: Path) -> None:
    source = tmp_path / "model.yaml"
    source.write_text(TOY)
    done = editctl("hparams", "import", source, path=installed)
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["toy"]["layers"] == [4, 5]
    lines = done.stderr.splitlines()
    assert lines[0].startswith('Added kl_position = "lookup": ')
    assert "Dropped model_name: the model is an option of the run (--model)." in lines
    assert any(line.startswith("Dropped rewrite_module_tmp, ln_f_module: ") for line in lines)


def test_the_command_writes_a_file_and_never_over_another(tmp_path: Path, installed: Path) -> None:
    source, out = tmp_path / "model.yaml", tmp_path / "out.toml"
    source.write_text("speed: 2e0\n")
    arguments = ("hparams", "import", source, "--editor", "bare", "--out", out)
    done = editctl(*arguments, path=installed)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"editctl run --config {out}" in done.stderr
    assert tomllib.loads(out.read_text()) == {"editor": "bare", "bare": {"speed": 2.0}}
    again = editctl(*arguments, path=installed)
    assert again.returncode == 2
    assert again.stderr.startswith(f"Error: --out {out} is already there")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, installed: Path) -> None:
    source = tmp_path / "model.yaml"
    source.write_text("layers: [1]\n")
    done = editctl("hparams", "import", source, path=installed)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {source} does not name its method")
    assert done.stderr.count("\n") == 1
    assert "import" in editctl("hparams", "--help", path=installed).stdout
