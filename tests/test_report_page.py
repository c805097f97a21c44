"""The report's page in headless Chromium: it renders, sorts, searches and prints, and its console stays empty."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACTS = "document.getElementById('facts').parentElement.querySelector('table')"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chromium", ROOT / "tools" / "chromium.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chromium"] = module
    spec.loader.exec_module(module)
    return module


CHROMIUM = load_tool()

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM.find_chromium() is None,
        reason="no Chromium: install chromium-headless-shell or chromium, or name one with $CHROMIUM",
    ),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no Playwright: requirements.txt has it"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path) -> Path:
    """The page about a run of six facts in a tiny model, two of which were undone."""
    from editcore import Plugins
    from editcore.figures import draw_run
    from editcore.report import make_report
    from editcore.runs.config import RunConfig
    from editcore.runs.job import RunOptions, run
    from editcore.runs.reopening import open_session

    folder = tmp_path_factory.mktemp("report")
    values = {
        "editor": "emmet", "model": str(tiny_folder), "dataset": str(tiny_facts), "batch_size": 2,
        "corpus": str(tiny_corpus), "corpus_tokens": 1000,
        "settings": {"emmet": {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 2}},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(folder / "cache"))
        plugins = Plugins.load()
        run(RunConfig.create(values, plugins), folder / "run", RunOptions(plugins=plugins, draw=draw_run))
        open_session(folder / "run", plugins=plugins).undo(batches=[1])
    return make_report(folder / "run").page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with CHROMIUM.browser(CHROMIUM.find_chromium()) as chromium:
        yield chromium


@pytest.fixture
def show(browser: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Opens the report in a window; nothing may have reached the console, nor asked the network, at the end."""
    problems: list[str] = []

    def call(width: int = 1400, **look: bool) -> Any:
        return CHROMIUM.open_page(browser, report, width=width, problems=problems, **look)

    yield call
    assert problems == []


def place(page: Any, heading: str) -> int:
    """Which column of the table of facts has this heading."""
    heads: list[str] = page.evaluate(f"[...{FACTS}.tHead.rows[0].cells].map(element => element.textContent.trim())")
    return heads.index(heading)


def column(page: Any, heading: str) -> list[str]:
    """The texts of a column of the table of facts, of the rows that are shown."""
    number = place(page, heading)
    rows = f"[...{FACTS}.tBodies[0].rows].filter(row => row.offsetParent)"
    found: list[str] = page.evaluate(f"{rows}.map(row => row.cells[{number}].textContent)")
    return found


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_window_in_light_and_dark(show: Callable[..., Any], width: int, dark: bool) -> None:
    page = show(width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 25, 29)" if dark else "rgb(255, 255, 255)")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.querySelector('.notice').textContent").startswith("The measurements are older")
    assert page.evaluate("document.querySelectorAll('[id]').length") == page.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(element => element.id)).size"
    )
    assert page.screenshot().startswith(b"\x89PNG")


@pytest.mark.parametrize("dark", [False, True])
def test_its_text_can_be_read(show: Callable[..., Any], dark: bool) -> None:
    """WCAG AA: a contrast of 4.5 of every text to what is behind it."""
    page = show(dark=dark)
    lowest = page.evaluate("""
        (() => {
          const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
          const behind = (node) => {
            const colour = numbers(getComputedStyle(node).backgroundColor);
            return colour.length === 3 ? colour : node.parentElement ? behind(node.parentElement) : [255, 255, 255];
          };
          const texts = [...document.body.querySelectorAll("*")].filter((node) =>
            node.tagName !== "SCRIPT" && [...node.childNodes].some((text) => text.nodeType === 3 && text.data.trim()));
          return Math.min(...texts.map((node) => {
            const pair = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
            return (pair[0] + 0.05) / (pair[1] + 0.05);
          }));
        })()
    """)
    assert lowest >= 4.5


def test_a_click_sorts_a_column_and_a_second_one_the_other_way(show: Callable[..., Any]) -> None:
    page = show()
    head = f"{FACTS}.tHead.rows[0].cells"
    subjects = column(page, "subject")
    assert len(subjects) == 6
    page.evaluate(f"{head}[0].querySelector('button').click()")
    assert page.evaluate(f"{head}[0].getAttribute('aria-sort')") == "ascending"
    assert column(page, "subject") == sorted(subjects, key=str.lower)
    page.evaluate(f"{head}[0].querySelector('button').click()")
    assert column(page, "subject") == sorted(subjects, key=str.lower, reverse=True)
    # Numbers by their size, the largest first; what was undone since is told apart.
    number = place(page, "Neighbourhood (NS)")
    page.evaluate(f"{head}[{number}].querySelector('button').click()")
    assert page.evaluate(f"{head}[{number}].getAttribute('aria-sort')") == "descending"
    assert page.evaluate(f"[...{head}].map(element => element.getAttribute('aria-sort'))").count("descending") == 1
    after = [float(text.split(" → ")[1]) for text in column(page, "Neighbourhood (NS)")]
    assert after == sorted(after, reverse=True)
    assert len(set(after)) > 1
    assert sorted(column(page, "state")) == ["active"] * 4 + ["undone"] * 2


def test_the_keyboard_sorts(show: Callable[..., Any]) -> None:
    page = show()
    button = f"{FACTS}.tHead.rows[0].cells[{place(page, 'batch')}].querySelector('button')"
    page.evaluate(f"{button}.focus()")
    page.keyboard.press("Enter")
    assert column(page, "batch") == ["2", "2", "1", "1", "0", "0"]


def test_the_search_keeps_the_rows_with_all_words(show: Callable[..., Any]) -> None:
    page = show(400)
    [subject, *_] = column(page, "subject")
    page.evaluate("document.querySelector('#facts ~ .search input').focus()")
    page.keyboard.insert_text(f"{subject.upper()} active")
    assert column(page, "subject") == [subject]
    assert page.evaluate("document.querySelector('#facts ~ .search output').textContent") == "1 of 6"
    page.keyboard.insert_text(" nothing of the kind")
    assert column(page, "subject") == []


def test_without_scripts_the_tables_are_there(show: Callable[..., Any]) -> None:
    page = show(scripts=False)
    # Scripts of the page are off, those of Playwright are not.
    assert len(column(page, "subject")) == 6
    assert page.evaluate("document.querySelectorAll('thead button').length") == 0
    assert page.evaluate("[...document.querySelectorAll('.search')].every(element => !element.offsetParent)")


def test_it_prints_in_black_on_white(show: Callable[..., Any]) -> None:
    page = show(dark=True)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for hidden in ("nav", ".search", ".skip"):
        assert page.evaluate(f"document.querySelector('{hidden}').offsetParent === null")
    assert page.evaluate("getComputedStyle(document.querySelector('.long')).maxHeight") == "none"
    assert CHROMIUM.print_pdf(page).startswith(b"%PDF-")


def test_the_tool_takes_its_pictures(report: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "chromium.py"), str(report), "--out", str(tmp_path / "pictures")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    names = {
        f"{width}-{look}-{part}.png" for width in (400, 1400) for look in ("light", "dark") for part in ("top", "whole")
    }
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {*names, "printed.pdf"}
