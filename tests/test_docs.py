"""The documentation says what the code does: hooks, fields, commands, options and shapes; and its code runs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from xml.etree import ElementTree

import editcore
import pytest
from editcore import EditSession, Plugins, SessionConfig
from editcore.evaluation import Average, GenerationHParams, Measure
from editcore.evaluation.summaries import COLUMNS
from editcore.interfaces import hookspecs as _hookspecs
from editcore.interfaces.history import LedgerEntry
from editcore.ledger.lines import FORMAT, BatchLine, HeaderLine, RevisionLine
from editcore.locate_then_edit import LayerProblem
from editcore.runs.results import Tally
from editcore.testing import tiny_model, tiny_records, tiny_requests
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
HOOKS = (DOCS / "plugins" / "hooks.md").read_text(encoding="utf-8")
CHAPTERS = {
    "editors": "EditorContract",
    "attachments": "AttachmentContract",
    "backends": "BackendContract",
    "extensions": "ExtensionContract",
    "evaluators": "EvaluatorContract",
    "datasets": "DatasetContract",
    "executors": "ExecutorContract",
}
"""One for each kind of plugin, with its contract suite."""
GUIDES = {name: (DOCS / "plugins" / f"{name}.md").read_text(encoding="utf-8") for name in ("write-a-plugin", *CHAPTERS)}
"""The pages whose code is run."""
GUIDE = GUIDES["write-a-plugin"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def hooks_of(family: type) -> list[str]:
    return [name for name in vars(family) if name.startswith("editcore_")]


REGISTRATION = hooks_of(_hookspecs.RegistrationHooks)
LIFECYCLE = hooks_of(_hookspecs.LifecycleHooks)


def section(page: str, heading: str) -> str:
    """From a heading to the next of its level or above."""
    level = heading.split(" ")[0]
    start = page.index(f"\n{heading}\n") + 1
    following = re.search(rf"^#{{1,{len(level)}}} ", page[start + len(heading) :], re.MULTILINE)
    return page[start : start + len(heading) + following.start()] if following else page[start:]


def classes_of(hook: str) -> list[type]:
    """The event of a hook, and the dataclasses that it returns."""
    family = _hookspecs.RegistrationHooks if hook in REGISTRATION else _hookspecs.LifecycleHooks
    hints = typing.get_type_hints(getattr(family, hook))
    waiting, found = [hints["event"], hints["return"]], []
    while waiting:
        hint = waiting.pop(0)
        waiting += typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            found.append(typing.cast("type", hint))
    return found


def fields_in(text: str) -> set[str]:
    """The names in the first column of a text's tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def field_names(described: type) -> set[str]:
    if issubclass(described, BaseModel):
        return set(described.model_fields)
    return {field.name for field in dataclasses.fields(described)}


# Hooks


def test_every_hook_has_its_heading_in_the_order_of_the_code() -> None:
    headings = re.findall(r"^### (.*)$", HOOKS, re.MULTILINE)
    assert headings == [f"{hook}(event)" for hook in [*REGISTRATION, *LIFECYCLE]]


@pytest.mark.parametrize("hook", LIFECYCLE)
def test_a_lifecycle_hook_answers_the_five_questions_and_lists_every_field(hook: str) -> None:
    text = section(HOOKS, f"### {hook}(event)")
    assert re.findall(r"^\* \*(.*?):\*", text, re.MULTILINE) == ["When", "How often", "Order", "May change", "Returns"]
    documented = classes_of(hook)
    tables = re.findall(r"^\| field of `(\w+)`", text, re.MULTILINE)
    assert tables == [shape.__name__ for shape in documented]
    for shape in documented:
        table = text.split(f"| field of `{shape.__name__}` |")[1].split("\n\n")[0]
        assert fields_in(table) == field_names(shape)


@pytest.mark.parametrize("hook", REGISTRATION)
def test_a_registration_hook_names_its_spec_and_lists_its_own_fields(hook: str) -> None:
    text = section(HOOKS, f"### {hook}(event)")
    [event, spec] = classes_of(hook)
    assert event is editcore.Registration
    assert f"*Returns:* a list of `{spec.__name__}`" in text
    expected = field_names(spec) - {"name", "target", "summary"}
    if "capabilities" in expected:
        expected |= field_names(editcore.Capabilities)
    assert fields_in(text) == expected


def test_what_registration_hooks_share_is_said_once() -> None:
    text = section(HOOKS, "## Registration hooks").split("\n### ")[0]
    assert re.findall(r"^\* \*(.*?):\*", text, re.MULTILINE) == ["When", "How often", "Order", "May change", "Returns"]
    assert fields_in(text) == field_names(editcore.Registration) | {"name", "target", "summary"}


def test_ledger_entries_are_documented() -> None:
    assert fields_in(section(HOOKS, "## Ledger entries")) == field_names(LedgerEntry)


def test_proposals_are_documented() -> None:
    text = section(HOOKS, "## Proposals")
    for cls in (editcore.Proposal, editcore.EditEvidence):
        table = text.split(f"| field of `{cls.__name__}` |")[1].split("\n\n")[0]
        assert fields_in(table) == field_names(cls)


def test_what_a_layer_is_asked_is_documented() -> None:
    table = GUIDES["editors"].split("| field of `LayerProblem` |")[1].split("\n\n")[0]
    assert fields_in(table) == field_names(LayerProblem)


@pytest.mark.parametrize(
    ("chapter", "described"),
    [
        ("editors", editcore.EditorSpec),
        ("editors", editcore.Capabilities),
        ("editors", editcore.EditBatch),
        ("editors", editcore.EditContext),
        ("attachments", editcore.AttachmentSpec),
        ("attachments", editcore.Attachment),
        ("backends", editcore.BackendSpec),
        ("extensions", editcore.ExtensionSpec),
        ("evaluators", editcore.EvaluatorSpec),
        ("evaluators", editcore.MetricSpec),
        ("evaluators", editcore.Observation),
        ("evaluators", editcore.EvaluationContext),
        ("datasets", editcore.DatasetSpec),
        ("datasets", editcore.FactRecord),
        ("datasets", editcore.Probe),
        ("executors", editcore.ExecutorSpec),
        ("executors", editcore.Outcome),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_chapter_has_every_field_of_what_its_plugins_make_or_are_given(chapter: str, described: type) -> None:
    table = GUIDES[chapter].split(f"| field of `{described.__name__}` |")[1].split("\n\n")[0]
    assert fields_in(table) == field_names(described)


@pytest.mark.parametrize("hook", REGISTRATION)
def test_a_registration_hook_leads_to_the_chapter_of_its_kind(hook: str) -> None:
    """There is none for model families, commands and components, which are no more than their announcement."""
    chapter = hook.removeprefix("editcore_")
    linked = re.findall(r"\]\((\w+)\.md\)", section(HOOKS, f"### {hook}(event)"))
    assert linked == ([chapter] if chapter in CHAPTERS else [])


def test_the_fields_of_results_are_documented() -> None:
    page = (DOCS / "reference" / "results.md").read_text(encoding="utf-8")
    for name, described in (("metrics", Measure), ("averages", Average), ("tallies", Tally)):
        table = page.split(f"| field of `{name}` |")[1].split("\n\n")[0]
        assert fields_in(table) == field_names(described)
    assert fields_in(section(page, "## results.parquet")) == {"phase", *COLUMNS}


def test_the_settings_of_generation_are_documented() -> None:
    page = (DOCS / "how-to" / "measure-an-edit.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S+)", section(page, "### It asks a sample"), re.MULTILINE)
    fields = GenerationHParams.model_fields
    assert [name for name, _ in rows] == list(fields)
    numbers = {name: int(default) for name, default in rows if default.isdigit()}
    assert numbers == {name: field.default for name, field in fields.items() if isinstance(field.default, int | float)}


def test_lines_of_the_ledger_are_documented() -> None:
    text = (DOCS / "reference" / "ledger.md").read_text(encoding="utf-8")
    rows = {
        name: row
        for row in text.splitlines()
        for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    for line in (HeaderLine, BatchLine, RevisionLine):
        kind = line.model_fields["kind"].default
        assert set(re.findall(r"`(\w+)`", rows[kind].split("|")[2])) == line.model_fields.keys() - {"kind"}
    assert f"The `format` is {FORMAT}." in text


def diagram_of_hooks() -> list[str]:
    """The hooks in the page's picture of a run, each as often as it stands there."""
    text = section(HOOKS, "## Lifecycle hooks").split("\n### ")[0]
    return re.findall(r"^ +(editcore_\w+)", text, re.MULTILINE)


def test_extensions_are_called_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last given, first called; in the order of the diagram; no ``after_batch`` for a rejected batch."""
    source = tmp_path / "diary_of_calls.py"
    body = "".join(
        f"    @hookimpl\n    def {hook}(self, event):\n        CALLS.append((self.name, '{hook}'))\n"
        for hook in LIFECYCLE
        if hook != "editcore_before_apply"
    )
    source.write_text(
        f"""
from editcore import ExtensionSpec, Verdict, hookimpl
CALLS = []
class First:
    name = "first"
    reject = False
    def __init__(self, hparams, context): ...
    @hookimpl
    def editcore_before_apply(self, event):
        CALLS.append((self.name, 'editcore_before_apply'))
        return Verdict(action="reject", reason="no") if self.reject and event.batch.index else None
{body}
class Second(First):
    name = "second"
    reject = True
@hookimpl
def editcore_extensions():
    return [ExtensionSpec(c.name, f"diary_of_calls:{{c.__name__}}", summary="Writes down.") for c in (First, Second)]
""",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    session = session_with(tmp_path, monkeypatch, {"diary": "diary_of_calls"}, ["first", "second"])
    records = tiny_records(4)
    session.evaluate_unedited(records)
    results = session.edit([record.request for record in records], batch_size=2)
    session.evaluate(records)
    session.undo(records[0].request.id)
    session.finish()
    calls: list[tuple[str, str]] = sys.modules["diary_of_calls"].CALLS
    assert [result.applied for result in results] == [True, False]
    assert results[1].reason == "second: no"
    drawn = diagram_of_hooks()
    assert set(drawn) == set(LIFECYCLE)
    batch = slice(drawn.index("editcore_before_batch"), drawn.index("editcore_after_batch") + 1)
    rejected = [hook for hook in drawn[batch] if hook != "editcore_after_batch"]
    expected = [*drawn[: batch.start], *drawn[batch], *rejected, *drawn[batch.stop :]]
    assert calls == [(name, hook) for hook in expected for name in ("second", "first")]


# Code of the guide


def blocks(page: str) -> list[tuple[str, str]]:
    """The files of a page: code blocks whose first line is a comment with the path."""
    found = re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [(path, f"# {path}\n{text}") for path, text in found]


GUIDES_FILES = [block for page in GUIDES.values() for block in blocks(page)]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guides' files, and the packages' entry points beside them as an installer would leave them."""
    folder = tmp_path_factory.mktemp("guide")
    for path, text in GUIDES_FILES:
        target = folder / path
        assert not target.exists(), f"two pages have a file {path}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for name in re.findall(r"^edit_(\w+)/plugin\.py$", "\n".join(path for path, _ in GUIDES_FILES), re.MULTILINE):
        info = folder / f"edit_{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: edit-{name}\nVersion: 0.1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[editcore]\n{name} = edit_{name}.plugin\n", encoding="utf-8")
    return folder


def importing_from(folder: Path) -> dict[str, str]:
    """The environment of a process that finds this folder's packages before those of this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def editctl(*arguments: str, path: Path) -> str:
    code = "from editcore.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**importing_from(path), "COLUMNS": "200"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def session_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: dict[str, str], plugins: Sequence[str]
) -> EditSession:
    """A session of the installed emmet on a tiny model, with extensions of modules that are not installed."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    installed = importlib.metadata.entry_points(group="editcore")
    more = [EntryPoint(name, module, "editcore") for name, module in modules.items()]
    return EditSession.open(
        tiny_model(),
        SessionConfig(
            editor="emmet",
            plugins=plugins,
            settings={"emmet": {"layers": [1], "context_templates": ["{}"], "v_num_grad_steps": 2}},
        ),
        registry=Plugins.load(entry_points=[*installed, *more]),
    )


@pytest.mark.parametrize("page", GUIDES)
def test_every_code_block_of_the_guides_is_a_file(page: str) -> None:
    """Nothing is left out of these tests by a forgotten first line."""
    assert len(re.findall(r"^```(?:python|toml)$", GUIDES[page], re.MULTILINE)) == len(blocks(GUIDES[page]))


def test_the_guide_starts_with_a_dozen_lines_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = blocks(GUIDE)[0]
    assert len([line for line in text.splitlines() if line]) <= 12
    (tmp_path / path).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    session = session_with(tmp_path, monkeypatch, {"stopwatch": "stopwatch"}, ["stopwatch"])
    session.edit(tiny_requests(4), batch_size=2)
    printed = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+\.\d\d", "N", line) for line in printed] == ["batch 0: N s per fact", "batch 1: N s per fact"]


def test_the_guides_package_installs(guide: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "stopwatch.py"):
        (source / name).write_text((guide / name).read_text(encoding="utf-8"), encoding="utf-8")
    site = tmp_path / "site"
    done = subprocess.run([*pip, "--target", str(site), str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(editctl("plugins", "--json", path=site))}
    assert rows["stopwatch"]["distribution"] == "edit-stopwatch"
    assert rows["stopwatch"]["status"] == "active"


def test_the_guides_settings_are_described(guide: Path) -> None:
    described = [" ".join(line.split()) for line in editctl("describe", "slow", path=guide).splitlines()]
    assert "limit float 5 > 0 Seconds per fact from which a batch is called slow." in [
        line.replace("5.0", "5") for line in described
    ]


@pytest.fixture(scope="module")
def tests_of_guides(guide: Path) -> tuple[dict[str, list[str]], str]:
    """How the tests in each of the guides' files ended, all run in one process, and what pytest printed."""
    report = guide / "report.xml"
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests"],
        capture_output=True,
        text=True,
        cwd=guide,
        env=importing_from(guide),
        timeout=600,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    ended: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        module = "/".join(case.attrib["classname"].split(".")[:2])  # classes stand behind it
        ended.setdefault(f"{module}.py", []).append(kind)
    return ended, done.stdout


@pytest.mark.parametrize("page", GUIDES)
def test_the_tests_of_a_guide_pass(tests_of_guides: tuple[dict[str, list[str]], str], page: str) -> None:
    """The contract suite of its kind among them."""
    tests = {path: text for path, text in blocks(GUIDES[page]) if path.startswith("tests/")}
    assert f"({CHAPTERS.get(page, 'ExtensionContract')}):\n" in "".join(tests.values())
    ended, printed = tests_of_guides
    for path in tests:
        assert "passed" in ended[path], printed
        assert not {"failure", "error"} & set(ended[path]), printed


# Commands


def test_the_reference_of_the_command_line_is_up_to_date() -> None:
    """Otherwise: python tools/make_cli_reference.py"""
    tool = [sys.executable, str(ROOT / "tools" / "make_cli_reference.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def command_lines() -> list[str]:
    """Every line of a documentation page that runs editctl."""
    pages = [path for path in PAGES if path.name != "cli.md"]
    lines = [line for path in pages for line in path.read_text(encoding="utf-8").splitlines()]
    found = [re.match(r"(?:\$ |    )(editctl .*)", line) for line in lines]
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize("line", command_lines())
def test_a_command_in_the_docs_exists_with_its_options(line: str) -> None:
    reference = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    words = shlex.split(line, comments=True)
    depth = max(n for n in range(1, len(words) + 1) if f"\n## {' '.join(words[:n])}\n" in reference)
    assert depth > 1
    text = section(reference, f"## {' '.join(words[:depth])}")
    for word in words[depth:]:
        if word.startswith("-"):
            option = re.escape(word.partition("=")[0])
            assert re.search(rf"^ .*(?<![\w-]){option}(?![\w-])", text, re.MULTILINE), word


# Pages


def test_the_map_leads_to_every_page() -> None:
    linked = {(DOCS / target).resolve() for target in links(DOCS / "index.md")}
    assert {path for path in PAGES if path.name != "index.md"} <= linked


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path):
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Shapes


def axes_in_the_code() -> set[str]:
    """The names in ````[a, b]```` of docstrings and in comments that end with ``[a, b]``."""
    shape = r"\[([a-z_0-9]+(?:, [a-z_0-9]+)*)\]"
    found: set[str] = set()
    for path in ROOT.glob("packages/*/src/**/*.py"):
        text = path.read_text(encoding="utf-8")
        for axes in re.findall(rf"``(?:\w+ )?{shape}``|#.*{shape}$", text, re.MULTILINE):
            found |= {axis for axis in "".join(axes).split(", ") if not axis.isdigit()}
    return found


def test_the_glossary_has_the_axes_of_the_code_and_no_others() -> None:
    glossary = fields_in((DOCS / "shapes.md").read_text(encoding="utf-8"))
    used = axes_in_the_code()
    assert used - glossary == set(), "axes that docs/shapes.md does not explain"
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("packages/*/src/**/*.py"))
    assert {name for name in glossary if not re.search(rf"\b{name}\b", code)} == set()


def test_every_public_name_in_the_docs_exists() -> None:
    for path in PAGES:
        for name in re.findall(r"`editcore\.(\w+)`", path.read_text(encoding="utf-8")):
            exists = hasattr(editcore, name) or importlib.util.find_spec(f"editcore.{name}") is not None
            assert exists, f"{name_of(path)}: editcore.{name}"
