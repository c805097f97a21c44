"""Readers of files take what is odd or damaged, or refuse it with an error of ours. ``tools/fuzz.py`` tries more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "fuzz.py"
KINDS = ["requests", "ledgers", "tensors", "packs", "manifests", "configs", "hparams", "runs", "tables"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_kind_of_file_is_tried(tool: ModuleType) -> None:
    assert list(tool.TARGETS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read(tool: ModuleType, kind: str, tmp_path: Path) -> None:
    """Otherwise changed ones would be refused for what they were before."""
    target = tool.TARGETS[kind]
    for seed in target.seeds(tmp_path):
        target.read(tmp_path, seed)
        target.read(tmp_path, target.fit(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_raise_nothing_but_our_errors(tool: ModuleType, kind: str, tmp_path: Path) -> None:
    tool.fuzz(tool.TARGETS[kind], tmp_path, 60)


def test_a_bug_comes_out_with_its_input(tool: ModuleType, tmp_path: Path) -> None:
    def read(_folder: Path, content: bytes) -> None:
        if b"x" not in content:
            raise KeyError("a bug")

    with pytest.raises(KeyError) as caught:
        tool.fuzz(tool.Target(lambda _folder: [b"xx"], read), tmp_path, 500)
    assert any(note.startswith("input: b'") for note in caught.value.__notes__)
