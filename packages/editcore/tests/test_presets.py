"""Which preset is for which model, and whose wins."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from editcore import EditorSpec, EditRequest, EditSession, HParamsError, Plugins, SessionConfig
from editcore.settings.presets import get_preset, model_stem, own_folder, preset_for, presets_of
from editcore.testing import check_presets, tiny_model


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditorSpec:
    """An editor whose package has presets for three models."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "site" / "models_of_it"
    package.mkdir(parents=True)
    (package / "llama-2-7b.toml").write_text('# from a paper\nnames = ["Llama-2-7b-hf"]\nlayers = [5]\n')
    (package / "gpt2-xl.toml").write_text("# from a paper\nlayers = [17]\n")
    (package / "broken.toml").write_text("names = [")
    monkeypatch.syspath_prepend(str(package.parent))
    return EditorSpec("it", "x:Y", hparams="x:Z", presets="models_of_it", summary="It.")


def own(spec: EditorSpec, name: str, text: str) -> Path:
    path = own_folder(spec.name) / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt2-xl", "gpt2-xl"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("/models/GPT2-XL/", "gpt2-xl"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("llama-2-7B-HF", "llama-2-7b"),
        ("meta-llama/Llama-2-13b-hf", None),
        ("broken", "broken"),
        ("", None),
    ],
)
def test_a_model_finds_its_preset(spec: EditorSpec, model: str, expected: str | None) -> None:
    found = preset_for(spec, model)
    assert (found.name if found else None) == expected


def test_only_what_is_not_plain_is_remarked_on(spec: EditorSpec) -> None:
    plain, named = preset_for(spec, "org/gpt2-xl"), preset_for(spec, "meta-llama/Llama-2-7b-hf")
    assert plain is not None
    assert named is not None
    assert (plain.note, plain.own) == ("", False)
    assert named.note == "it uses the preset 'llama-2-7b', which has 'Llama-2-7b-hf' among its models."
    assert dict(named.values()) == {"layers": [5]}


def test_the_users_own_stands_before_the_packages(spec: EditorSpec) -> None:
    path = own(spec, "gpt2-xl", "layers = [3]\n")
    found = preset_for(spec, "gpt2-xl")
    assert found is not None
    assert dict(found.values()) == {"layers": [3]}
    assert found.note == (
        f"it uses your preset 'gpt2-xl' ({path.parent}), named like the model; "
        "it replaces the package's preset of that name."
    )
    assert get_preset(spec, "gpt2-xl").own
    own(spec, "mine", 'names = ["llama-2-7b"]\nlayers = [1]\n')
    still = preset_for(spec, "llama-2-7b")
    assert still is not None
    assert still.name == "llama-2-7b", "a name of its own counts before one among others"
    assert list(presets_of(spec)) == ["broken", "gpt2-xl", "llama-2-7b", "mine"]


def test_a_folder_is_called_what_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert model_stem(".") == "my-model"
    assert model_stem("org/name") == "name"


@pytest.mark.parametrize("names", ['"a"', "[1]", '[""]', "{ a = 1 }"])
def test_names_are_a_list_of_texts(spec: EditorSpec, names: str) -> None:
    own(spec, "mine", f"names = {names}\nlayers = [1]\n")
    with pytest.raises(HParamsError, match=r"names that are not a list of texts|must be a flat table"):
        get_preset(spec, "mine").values()
    assert preset_for(spec, "gpt2-xl") is not None, "one that cannot be read is in nobody's way"


def test_a_session_takes_the_users_preset_and_says_so(toys: Any, small: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="editcore")
    path = own_folder("toy") / "small.toml"
    path.parent.mkdir(parents=True)
    path.write_text("layers = [0]\n", encoding="utf-8")
    session = EditSession.open(str(small), SessionConfig(editor="toy"))
    assert session.settings["toy"].model_dump()["layers"] == (0,)
    assert [record.message for record in caplog.records] == [
        f"toy uses your preset 'small' ({path.parent}), named like the model; it replaces the package's preset of that "
        "name."
    ]


def test_editors_marks_the_users_own(toys: Any, small: Path, editctl: Callable[..., SimpleNamespace]) -> None:
    path = own_folder("toy") / "other.toml"
    path.parent.mkdir(parents=True)
    path.write_text("layers = [0]\n", encoding="utf-8")
    line = next(line for line in editctl("editors").out.splitlines() if line.startswith("toy "))
    assert "other (yours), small" in line
    assert "Presets: other (yours), small" in editctl("describe", "toy").out


def test_the_shared_check_finds_what_is_wrong(toys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_presets("toy", {"small": {"layers": (1,)}})
    with pytest.raises(AssertionError, match=r"small: layers is \(1,\), published: \(2,\)"):
        check_presets("toy", {"small": {"layers": (2,)}})
    with pytest.raises(AssertionError, match="no preset large"):
        check_presets("toy", {"large": {}})
    with pytest.raises(AssertionError, match="announces no package"):
        check_presets("toy-pairs")


def test_without_a_preset_onboarding_is_offered(toys: Any) -> None:
    with pytest.raises(HParamsError, match="let 'editctl onboard tiny-llama' find it"):
        EditSession.open(tiny_model(), SessionConfig(editor="toy"))


def test_a_saved_edited_folder_has_the_preset_of_its_base(
    toys: Any, small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = EditSession.open(str(small), SessionConfig(editor="toy"), directory=str(tmp_path / "ledger"))
    session.edit([EditRequest(subject="Rome", prompt="{} is in", target_new="France")])
    saved = tmp_path / "by-another-name"
    session.save(str(saved))
    found = json.loads((saved / "editcore.json").read_text())
    assert found == {"base": "small", "base_fingerprint": session.model.base_fingerprint}
    assert str(tmp_path) not in (saved / "editcore.json").read_text()
    again = EditSession.open(str(saved), SessionConfig(editor="toy"), directory=tmp_path / "again")
    assert again.settings["toy"] == session.settings["toy"]
    assert caplog.messages[-1] == f"toy uses the preset 'small', named like the model, the base of '{saved}'."
    again.save(tmp_path / "third")  # of an edited folder the first base is meant
    assert json.loads((tmp_path / "third" / "editcore.json").read_text())["base"] == "small"
    found_for = preset_for(Plugins.load().editor("toy"), str(saved))
    assert found_for is not None
    assert found_for.name == "small"
