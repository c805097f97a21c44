"""A folder is made whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from editcore import StorageError
from editcore.runs import new_folder, refuse_existing


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "made"
    with new_folder(target) as folder:
        (folder / "file").write_text("text", encoding="utf-8")
        assert not target.exists()
    assert (target / "file").read_text(encoding="utf-8") == "text"
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["made"]


@pytest.mark.parametrize(("failure", "shown"), [(ValueError("no"), ValueError), (OSError("full"), StorageError)])
def test_nothing_is_left_of_one_that_failed(tmp_path: Path, failure: Exception, shown: type[Exception]) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "made") as folder:
            (folder / "file").write_text("text", encoding="utf-8")
            raise failure

    with pytest.raises(shown):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty")
    refuse_existing(tmp_path / "nothing")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(StorageError, match="is already there"), new_folder(taken):
            raise AssertionError("entered")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match="is already there"):
        refuse_existing(tmp_path / "link")
