"""What all tests of the repository start from."""

from __future__ import annotations

import importlib
import json
import os

import pytest

# Off a terminal editctl writes whole lines; COLUMNS, which some shells and runners export, would have it break them.
os.environ.pop("COLUMNS", None)

LONGEST = (
    "test_main_job.py",
    "test_wheels.py",
    "test_resume.py",
    "test_measured_by_hand.py",
    "test_third_party.py",
    "test_same_subject.py",
    "test_docs.py",
    "test_more_contracts.py",
    "test_sweep.py",
    "test_contracts.py",
    "test_cli_run.py",
    "test_keep_a_model_current.py",
    "test_sweeps.py",
    "test_new.py",
    "test_ship_an_edit.py",
    "test_report.py",
    "test_checkpoints.py",
    "test_run_directory.py",
    "test_undo_order.py",
)
"""Files whose tests take twenty seconds and more, the longest first. They come before all others, so that no process
works at one when the others have nothing left to do."""


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist give files away in the order below; by itself it begins with those that have the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; the others keep their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures hold what they show, and are not drawn: drawing takes longer than a run of a tiny model."""
    importlib.import_module("editcore.report.run_scores")  # it binds the function when it is imported: the real one

    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    def shown(figure: Figure) -> bytes:
        texts = [text.get_text() for text in figure.findobj(Text)]
        lines = [line.get_xydata().tolist() for line in figure.findobj(Line2D)]
        patches = [patch.get_path().vertices.tolist() for patch in figure.findobj(Patch)]
        return b"\x89PNG" + json.dumps([texts, lines, patches]).encode()

    monkeypatch.setattr("editcore.figures.style.png", shown)
