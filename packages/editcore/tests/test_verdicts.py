"""What a long test of a model found is kept, for the model, the question and the versions that it was made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from editcore import LanguageModel, LoadOptions, ModelError
from editcore.models.verdicts import kept_verdict
from editcore.testing import tiny_model


class Asked:
    """A test that counts how often it is made."""

    def __init__(self, holds: bool) -> None:
        self.holds, self.times = holds, 0

    def __call__(self) -> bool:
        self.times += 1
        return self.holds


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], LanguageModel]:
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save(tmp_path / "tiny")
    return lambda: LanguageModel.load(tmp_path / "tiny")


@pytest.mark.parametrize("holds", [True, False])
def test_it_is_found_once_for_a_model_in_files(load: Callable[[], LanguageModel], holds: bool) -> None:
    find = Asked(holds)
    assert [kept_verdict(load(), "fits", find) for _ in range(3)] == [holds] * 3
    assert find.times == 1


def test_another_question_version_or_model_is_asked_anew(
    load: Callable[[], LanguageModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = Asked(True)
    model = load()
    kept_verdict(model, "fits", find)
    kept_verdict(model, "fits better", find)
    assert find.times == 2
    monkeypatch.setattr("editcore.models.verdicts.version_of", lambda package: f"{package} of tomorrow")
    kept_verdict(model, "fits", find)
    assert find.times == 3
    monkeypatch.undo()
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    tiny_model("gpt2").save(tmp_path / "other")
    kept_verdict(LanguageModel.load(tmp_path / "other"), "fits", find)
    assert find.times == 4


def test_a_model_in_memory_is_asked_every_time(load: Callable[[], LanguageModel]) -> None:
    find, model = Asked(True), tiny_model()
    assert [kept_verdict(model, "fits", find) for _ in range(2)] == [True, True]
    assert find.times == 2


@pytest.mark.parametrize("damaged", ["", "{}", '{"about": {}, "holds": true}', "[1]"])
def test_a_damaged_file_is_found_again(load: Callable[[], LanguageModel], tmp_path: Path, damaged: str) -> None:
    find = Asked(False)
    model = load()
    others = set((tmp_path / "cache" / "verdicts").iterdir())
    kept_verdict(model, "fits", find)
    [path] = set((tmp_path / "cache" / "verdicts").iterdir()) - others
    path.write_text(damaged)
    assert [kept_verdict(load(), "fits", find) for _ in range(2)] == [False, False]
    assert find.times == 2


def test_the_layout_is_checked_once_for_the_same_files(
    load: Callable[[], LanguageModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checked = []
    monkeypatch.setattr("editcore.models.language_model.check_layout", lambda hf, layout: checked.append(layout))
    for _ in range(3):
        load()
    assert len(checked) == 1
    config = tmp_path / "tiny" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    load()
    assert len(checked) == 2
    LanguageModel.load(tmp_path / "tiny", LoadOptions(trust_remote_code=True))
    assert len(checked) == 3


def test_a_layout_that_fails_is_checked_again(
    load: Callable[[], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_hf: object, _layout: object) -> None:
        raise ModelError("it does not fit")

    with monkeypatch.context() as patched:
        patched.setattr("editcore.models.language_model.check_layout", fails)
        for _ in range(2):
            with pytest.raises(ModelError, match="does not fit"):
                load()
    load()
