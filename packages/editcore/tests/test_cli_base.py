"""The frame of ``editctl``: help without heavy imports, listings, plugin commands, and errors of one paragraph."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from editcore.cli import main
from editcore.cli.app import COMMANDS
from editcore.cli.console import TerminalProgress, make_console, print_table
from rich.console import Console

HEAVY = ("torch", "transformers", "peft", "pandas", "matplotlib", "numpy")
REPORT = f"""
import sys
from editcore.cli import main
try:
    main()
finally:
    print("HEAVY:", *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""
PLUGIN = """
from editcore import BackendSpec, CommandSpec, EditorSpec, hookimpl

@hookimpl
def editcore_editors():
    return [EditorSpec("toy", target="toy:Editor", hparams="toy_hparams:ToyHParams", summary="A toy.",
                       presets="toy_presets")]

@hookimpl
def editcore_commands():
    return [
        CommandSpec("greet", target="toy_greet:app", summary="Say hello."),
        CommandSpec("lost", target="toy_lost:app", summary="Cannot be imported."),
        CommandSpec("wrong", target="json:dumps", summary="Is no application."),
    ]
"""
HPARAMS = '''
from typing import Annotated
from pydantic import Field
from editcore import HParams

class ToyHParams(HParams):
    layers: tuple[int, ...]
    """Blocks [of the model]."""
    kl_factor: Annotated[float, Field(ge=0)] = 0.0625
    """Weight of the drift term."""
'''
GREET = """
import typer

app = typer.Typer()

@app.command()
def greet(name: str, loud: bool = False) -> None:
    print(f"hello {name}".upper() if loud else f"hello {name}")
"""
FAILING = """
import typer
from editcore import HParamsError

app = typer.Typer()

@app.command()
def sentence() -> None:
    raise HParamsError("toy: layers is required.")

@app.command()
def bug() -> None:
    raise ZeroDivisionError("ours")

@app.command()
def interrupted() -> None:
    raise KeyboardInterrupt
"""


def editctl(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``editctl`` in a process of its own, which reports the heavy modules that it imported."""
    variables = {**os.environ, "COLUMNS": "200", **environment}
    if path:
        variables["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", REPORT, *arguments], capture_output=True, text=True, env=variables, timeout=120
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed plugin and a broken one, for ``PYTHONPATH``."""
    site = tmp_path_factory.mktemp("site")
    sources = {"toy": PLUGIN, "toy_hparams": HPARAMS, "toy_greet": GREET, "toy_fail": FAILING, "bad": "import nowhere"}
    for name, source in sources.items():
        (site / f"{name}.py").write_text(source, encoding="utf-8")
    (site / "toy_presets").mkdir()
    (site / "toy_presets" / "small.toml").write_text("layers = [1]\n", encoding="utf-8")
    for name in ("toy", "bad"):
        info = site / f"edit_{name}-0.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: edit-{name}\nVersion: 0.5\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[editcore]\n{name} = {name}\n", encoding="utf-8")
    return site


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--help",),
        ("plugins",),
        ("editors",),
        ("describe", "raw"),
        ("describe", "counterfact", "--json"),
        ("describe", "generation"),
        ("--version",),
    ],
)
def test_looking_around_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = editctl(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr.strip() == "HEAVY:"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("edit --prompt {} --target x --subject y --editor nope", "Unknown editor 'nope'"),
        ("edit --prompt x --target x --subject y", "must contain {} exactly once"),
        ("edit --prompt {} --target x --subject y --model ./nowhere", "There is no model folder './nowhere'."),
        ("run --editor toy --set layers=[1] --model ./nowhere", "There is no model folder './nowhere'."),
        ("run --editor toy", "toy: layers is required"),
        ("run --editor toy --set layer=[1]", "toy: unknown setting 'layer'"),
        ("run --editor toy --set layers=[1] --dtype float23", "Unknown dtype 'float23'"),
        ("run --editor toy --set layers=[1] --corpus nowhere.txt", "Corpus 'nowhere.txt' is neither"),
        ("run --editor toy --set layers=[1] --eval-every 1 --eval-text no.txt", "Corpus 'no.txt' is neither"),
        ("run --editor toy --set layers=[1] --dataset nowhere.jsonl", "There is no file nowhere.jsonl."),
        (
            "run --editor toy --set layers=[1] --dataset ./counterfact.json",
            "'editctl data pull counterfact' fetches it to ",
        ),
        ("stats compute --layer 1 --corpus nowhere.txt", "Corpus 'nowhere.txt' is neither"),
        ("onboard ./nowhere", "There is no model folder './nowhere'."),
        ("trace ./nowhere", "There is no model folder './nowhere'."),
        ("models show ./nowhere", "There is no model folder './nowhere'."),
        ("generate nowhere hello", "nowhere is not a run directory"),
        ("pack nowhere out.editpack", "nowhere is not a run directory"),
        ("report nowhere", "nowhere is neither a run"),
    ],
)
def test_what_is_wrong_with_the_input_is_said_before_anything_heavy_is_imported(
    toy: Path, arguments: str, sentence: str
) -> None:
    done = editctl(*arguments.split(), path=toy)
    error, heavy = done.stderr.strip().split("\n")[-2:]
    assert sentence in error, done.stderr
    assert error.startswith("Error: ")
    assert heavy.removesuffix(" numpy") == "HEAVY:"


def test_help_lists_every_command_and_is_what_editctl_alone_prints(toy: Path) -> None:
    shown = editctl("--help", path=toy)
    for name in [*(row.name for row in COMMANDS), "plugins", "editors", "describe", "greet"]:
        assert f"\n  {name} " in shown.stdout
    assert "Say hello." in shown.stdout
    assert editctl(path=toy).stdout.strip() == shown.stdout.strip()


def test_plugins_shows_what_is_broken_and_why(toy: Path) -> None:
    done = editctl("plugins", path=toy)
    lines = {line.split()[0]: " ".join(line.split()) for line in done.stdout.splitlines()}
    assert lines["bad"] == "bad edit-bad 0.5 broken ModuleNotFoundError: No module named 'nowhere'"
    assert lines["toy"].startswith("toy edit-toy 0.5 active editors: toy; commands: greet, lost, wrong")
    assert lines["builtin"].startswith("builtin editcore")


def test_plugins_as_json_may_be_narrowed_to_a_hook(toy: Path) -> None:
    done = editctl("plugins", "--hook", "editcore_editors", "--json", path=toy)
    row = next(row for row in json.loads(done.stdout) if row["name"] == "toy")
    assert row == {
        "name": "toy",
        "distribution": "edit-toy",
        "version": "0.5",
        "status": "active",
        "reason": "",
        "offers": {"editcore_editors": ["toy"]},
    }
    unknown = editctl("plugins", "--hook", "editcore_editor")
    assert unknown.returncode == 2
    assert "Did you mean 'editcore_editors'?" in unknown.stderr


def test_a_blocked_plugin_is_shown_as_blocked(toy: Path) -> None:
    done = editctl("plugins", "--json", path=toy, EDITCORE_DISABLE_PLUGINS="toy")
    row = next(row for row in json.loads(done.stdout) if row["name"] == "toy")
    assert (row["status"], row["offers"]) == ("blocked", {})


def test_editors_lists_methods_and_presets(toy: Path) -> None:
    done = editctl("editors", path=toy)
    assert any(line.split() == ["toy", "small", "A", "toy."] for line in done.stdout.splitlines())


def test_describe_prints_type_default_range_and_meaning(toy: Path) -> None:
    done = editctl("describe", "toy", path=toy)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:2] == ["toy (editor): A toy.", "Presets: small"]
    assert "layers list of int required Blocks [of the model]." in lines
    assert "kl_factor float 0.0625 ≥ 0 Weight of the drift term." in lines


def test_describe_as_json(toy: Path) -> None:
    [found] = json.loads(editctl("describe", "toy", "--json", path=toy).stdout)
    assert (found["kind"], found["name"], found["presets"]) == ("editor", "toy", ["small"])
    assert found["capabilities"]["max_batch"] is None
    assert found["capabilities"]["gives"] == ["factored"]
    assert [setting["name"] for setting in found["settings"]] == ["layers", "kl_factor"]


def test_describe_of_an_unknown_or_broken_name_is_one_paragraph(toy: Path) -> None:
    unknown = editctl("describe", "tooy", path=toy)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("Error: Unknown name 'tooy'. Available: ")
    assert "Did you mean 'toy'?" in unknown.stderr
    broken = editctl("describe", "bad", path=toy)
    assert broken.returncode == 2
    assert "(edit-bad 0.5) is installed but broken: ModuleNotFoundError: No module named 'nowhere'." in broken.stderr
    assert "Traceback" not in broken.stderr


def test_a_plugins_command_runs_like_our_own(toy: Path) -> None:
    assert editctl("greet", "you", "--loud", path=toy).stdout == "HELLO YOU\n"
    shown = editctl("greet", "--help", path=toy)
    assert shown.stdout.startswith("Usage: editctl greet [OPTIONS]")
    assert "--install-completion" not in shown.stdout
    assert editctl("greet", path=toy).returncode == 2


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("lost", "Error: Cannot load 'toy_lost:app': ModuleNotFoundError: No module named 'toy_lost'."),
        ("wrong", "Error: The command 'wrong' cannot run: 'json:dumps' is not a typer.Typer but of type function."),
    ],
)
def test_a_plugins_command_that_cannot_be_loaded_is_one_sentence(toy: Path, command: str, sentence: str) -> None:
    done = editctl(command, path=toy)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == sentence


@pytest.mark.parametrize(("typo", "meant"), [("pluginz", "plugins"), ("modles", "models"), ("gret", "greet")])
def test_a_misspelt_command_gets_a_suggestion(toy: Path, typo: str, meant: str) -> None:
    done = editctl(typo, path=toy)
    assert done.returncode == 2
    assert f"No such command '{typo}'. Did you mean '{meant}'" in done.stderr


@pytest.fixture
def failing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a command of ours that fails in one way or another."""
    from editcore.cli import app as _app, lazy as _lazy

    monkeypatch.syspath_prepend(str(toy))
    group = _lazy.lazy_group((_lazy.CommandRow("fail", "toy_fail:app", "Fails."),))
    monkeypatch.setattr(_app.app.info, "cls", group)


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize(("command", "code"), [("sentence", 2), ("interrupted", 130)])
def test_what_the_user_can_cure_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["editctl", "fail", command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err == ("Error: toy: layers is required.\n" if command == "sentence" else "")


def test_ctrl_c_while_the_commands_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        @property
        def app(self) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "editcore.cli.app", Interrupted())  # type: ignore[misc]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


@pytest.mark.usefixtures("failing")
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["editctl", "fail", "bug"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_closed_pipe_is_quiet() -> None:
    code = "from editcore.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "plugins", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_two_plugins_with_one_command_leave_help_standing(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text((toy / "toy.py").read_text(), encoding="utf-8")
    info = tmp_path / "edit_twin-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-twin\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[editcore]\ntwin = twin\n", encoding="utf-8")
    both = Path(f"{toy}{os.pathsep}{tmp_path}")
    shown = editctl("--help", path=both)
    assert shown.returncode == 0
    assert "  plugins " in shown.stdout
    assert "Warning: Two plugins offer the command 'greet'" in shown.stderr
    assert editctl("greet", "you", path=both).returncode == 2


def test_off_a_terminal_a_table_is_plain_and_keeps_long_cells_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    print_table(("name", "value"), [("[bold]x", "y" * 300), ("short", 1)], right=("value",))
    heading, first, second = stream.getvalue().splitlines()
    assert heading.split() == ["name", "value"]
    assert first.split() == ["[bold]x", "y" * 300]
    assert second.rstrip().endswith(" 1")
    assert "\x1b" not in stream.getvalue()


def test_in_eighty_columns_words_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    meaning = "Where the fact is written, and how far the change of a weight may go before it is cut off."
    rows = [("layer_selection", "list of int", "required", "not empty, each at least nought", meaning)]
    print_table(("setting", "type", "default", "allowed", "meaning"), rows)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["layer_selection", "  type: list of int", "  default: required"]
    assert " ".join(line.strip() for line in lines[4:]) == f"meaning: {meaning}"
    assert all(len(line) <= 80 for line in lines)
    stream.truncate(0)
    print_table(("prompt", "value"), [(meaning, "layer_selection"), ("short", 1)], right=("value",))
    heading, *lines = stream.getvalue().lstrip("\0").splitlines()
    assert heading.split() == ["prompt", "value"], "there is room beside each other"
    assert [line.split()[-1] for line in lines if "layer" in line] == ["layer_selection"]
    assert max(map(len, lines)) <= 80
    assert " ".join(line[:63].strip() for line in lines[:-1]) == meaning


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert make_console().no_color


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_finished_step_yet_says_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    with TerminalProgress(Console(file=stream, width=200), clock=clock).task("solving", 4) as advance:
        clock.now = 60.0
        advance(0)
        assert stream.getvalue() == ""


def test_off_a_terminal_progress_is_a_line_now_and_then_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = TerminalProgress(Console(file=stream, width=200), clock=clock)
    with progress.task("keys", 40) as advance:
        for _ in range(40):
            clock.now += 1
            advance(1)
    assert stream.getvalue().splitlines() == [
        "keys: 10/40, 1.0/s, 30 s left",
        "keys: 20/40, 1.0/s, 20 s left",
        "keys: 30/40, 1.0/s, 10 s left",
        "keys: 40/40 in 40 s, 1.0/s",
    ]


def test_slow_work_says_seconds_per_step_and_interrupted_work_how_far_it_came() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = TerminalProgress(Console(file=stream, width=200), clock=clock)

    def interrupted() -> None:
        with progress.task("targets", 3) as advance:
            clock.now = 95.0
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().splitlines() == [
        "targets: 1/3, 95.0 s each, 3 min 10 s left",
        "targets: 1/3 in 1 min 35 s, 95.0 s each",
    ]


def test_on_a_terminal_progress_is_a_bar_and_tasks_may_be_nested() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, width=120, force_terminal=True))
    with progress.task("batches", 2) as outer:
        with progress.task("targets [bold]", 5) as inner:
            inner(5)
        outer(1)
    with progress.task("again", 1) as advance:
        advance(1)
    shown = stream.getvalue()
    assert "batches" in shown
    assert "again" in shown
    assert "1/1" in shown
    assert "-:--:--" not in shown, "what is not known yet is not shown"


EVERY = """
from editcore import (
    AttachmentSpec, BackendSpec, Capabilities, CommandSpec, ComponentSpec, DatasetSpec, EditorSpec, EvaluatorSpec,
    ExecutorSpec, ExtensionSpec, MetricSpec, ModelFamilySpec, hookimpl,
)

given = ("every", "every_parts:Part")
settings = "toy_hparams:ToyHParams"

@hookimpl
def editcore_editors():
    can = Capabilities(max_batch=3, gives=frozenset({"dense", "attachment"}), needs_plugins=("replay",))
    return [EditorSpec(*given, hparams=settings, summary="Edits.", capabilities=can)]

@hookimpl
def editcore_backends():
    return [BackendSpec(*given, summary="Keeps changes.", hparams=settings, writes_weights=False)]

@hookimpl
def editcore_attachments():
    return [AttachmentSpec(*given, summary="Stands beside.")]

@hookimpl
def editcore_extensions():
    return [ExtensionSpec(*given, summary="Listens.", hparams=settings, settles_conflicts=True)]

@hookimpl
def editcore_evaluators():
    metrics = (
        MetricSpec(name="odd", label="Odd ones", meaning="How odd they are.", unit="nats", better="lower"),
        MetricSpec(name="even", label="Even ones"),
        MetricSpec(name="both", label="Both", meaning="Their mean.", of=("odd", "even"), combine="every_parts:mean"),
    )
    return [EvaluatorSpec(*given, summary="Measures.", metrics=metrics, hparams=settings)]

@hookimpl
def editcore_datasets():
    return [DatasetSpec(*given, summary="Has facts.", hparams=settings, argument="layers")]

@hookimpl
def editcore_executors():
    return [ExecutorSpec(*given, summary="Works elsewhere.", hparams=settings)]

@hookimpl
def editcore_model_families():
    return [ModelFamilySpec("every", "", summary="Odd modules.", model_types=("odd", "odder"), paths={"head": "top"})]

@hookimpl
def editcore_commands():
    return [CommandSpec(*given, summary="Is typed.")]

@hookimpl
def editcore_components():
    return [ComponentSpec(*given, kind="replay.strategy", summary="Is a part.")]
"""


@pytest.fixture(scope="module")
def every(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``toy``, and a package that offers one of each kind under one name; another is for editcore 7 to 8."""
    site = tmp_path_factory.mktemp("every")
    sources = {"every": EVERY, "future": "raise SystemExit('imported')", "toy_hparams": HPARAMS}
    for name, source in sources.items():
        (site / f"{name}.py").write_text(source, encoding="utf-8")
    for name, needs in {"every": "editcore", "future": "editcore<8,>=7"}.items():
        info = site / f"edit_{name}-0.3.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: edit-{name}\nVersion: 0.3\nRequires-Dist: {needs}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[editcore]\n{name} = {name}\n", encoding="utf-8")
    return site


@pytest.fixture(scope="module")
def described(every: Path) -> dict[str, list[str]]:
    """What is said of each kind: the lines, with single spaces."""
    done = editctl("describe", "every", path=every)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "HEAVY:"
    parts = [[" ".join(line.split()) for line in part.splitlines()] for part in done.stdout.split("\n\n")]
    return {lines[0]: lines[1:] for lines in parts}


SETTING = "kl_factor float 0.0625 ≥ 0 Weight of the drift term."
HERE = "Package: edit-every 0.3"
CODE = "Code: every_parts:Part"


@pytest.mark.parametrize(
    ("head", "lines"),
    [
        (
            "every (editor): Edits.",
            {HERE, CODE, "Max batch: 3", "Gives: attachment, dense", "Needs plugins: replay", SETTING},
        ),
        ("every (backend): Keeps changes.", {"Takes: factored", SETTING}),
        ("every (attachment): Stands beside.", {HERE, CODE}),
        ("every (plugin): Listens.", {"Settles conflicts: yes", SETTING}),
        (
            "every (evaluator): Measures.",
            {
                "metric label unit better made of meaning",
                "odd Odd ones nats lower How odd they are.",
                "even Even ones % higher",
                "both Both % higher odd, even Their mean.",
                SETTING,
            },
        ),
        ("every (data set): Has facts.", {"Argument: layers (--dataset every:LAYERS)", SETTING}),
        ("every (executor): Works elsewhere.", {SETTING}),
        ("every (model family): Odd modules.", {"Model types: odd, odder", "Paths: head = top"}),
        ("every (command): Is typed.", {"Options: editctl every --help"}),
        ("every (component of replay.strategy): Is a part.", {CODE}),
    ],
)
def test_everything_that_a_plugin_can_offer_is_described(
    described: dict[str, list[str]], head: str, lines: set[str]
) -> None:
    assert lines <= set(described[head]), described[head]
    assert len(described) == 10


def test_what_is_unset_is_not_described(described: dict[str, list[str]]) -> None:
    said = "\n".join(line for lines in described.values() for line in lines)
    assert "Writes weights" not in said
    assert "None" not in said
    assert "Code" not in "\n".join(described["every (model family): Odd modules."])


def test_every_kind_is_described_as_json(every: Path) -> None:
    found = json.loads(editctl("describe", "every", "--json", path=every).stdout)
    assert all((row["name"], row["distribution"], row["version"]) == ("every", "edit-every", "0.3") for row in found)
    rows = {row["kind"]: row for row in found}
    assert list(rows) == ["editor", "backend", "attachment", "plugin", "evaluator", "data set", "executor",
                          "model family", "command", "component"]  # fmt: skip
    assert rows["editor"]["capabilities"]["gives"] == ["attachment", "dense"]
    assert [row["name"] for row in rows["executor"]["settings"]] == ["layers", "kl_factor"]
    odd, _, both = rows["evaluator"]["metrics"]
    assert {key: odd[key] for key in ("name", "label", "unit", "better", "meaning")} == {
        "name": "odd", "label": "Odd ones", "unit": "nats", "better": "lower", "meaning": "How odd they are.",
    }  # fmt: skip
    assert (both["of"], both["combine"]) == (["odd", "even"], "every_parts:mean")
    assert rows["data set"]["argument"] == "layers"
    assert rows["model family"]["paths"] == {"head": "top"}
    assert rows["component"]["extension_point"] == "replay.strategy"


def test_plugins_has_a_line_with_all_that_a_plugin_offers(every: Path) -> None:
    [line] = [
        line for line in editctl("plugins", path=every, COLUMNS="500").stdout.splitlines() if line.startswith("every ")
    ]
    kinds = ("editors", "backends", "attachments", "extensions", "evaluators", "datasets", "executors",
             "model_families", "commands", "components")  # fmt: skip
    assert " ".join(line.split()) == "every edit-every 0.3 active " + "; ".join(f"{kind}: every" for kind in kinds)


def test_a_plugin_for_another_version_is_listed_as_incompatible(every: Path) -> None:
    lines = {
        line.split()[0]: " ".join(line.split())
        for line in editctl("plugins", path=every, COLUMNS="500").stdout.splitlines()
    }
    assert lines["future"].startswith(
        "future edit-future 0.3 incompatible it is made for editcore>=7,<8, and editcore "
    )
    assert lines["future"].endswith('or: pip install "editcore>=7,<8"')
    rows = {row["name"]: row for row in json.loads(editctl("plugins", "--json", path=every).stdout)}
    assert (rows["future"]["status"], rows["future"]["offers"]) == ("incompatible", {})
    asked = editctl("describe", "future", path=every)
    assert asked.returncode == 2
    assert "The plugin 'future' (edit-future 0.3) is installed but incompatible: it is made for" in asked.stderr
    assert editctl("describe", "every", path=every).returncode == 0


def test_a_plugin_that_fails_in_part_is_listed_with_what_it_still_offers(toy: Path, tmp_path: Path) -> None:
    body = PLUGIN + "@hookimpl\ndef editcore_backends():\n    raise KeyError('x')\n"
    (tmp_path / "half.py").write_text(body.replace("greet", "hello").replace('"toy"', '"half"'), encoding="utf-8")
    info = tmp_path / "edit_half-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-half\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[editcore]\nhalf = half\n", encoding="utf-8")
    lines = editctl("plugins", path=tmp_path, COLUMNS="500").stdout.splitlines()
    [line] = [" ".join(line.split()) for line in lines if line.startswith("half ")]
    assert line.startswith("half edit-half 0.1 broken editcore_backends: KeyError: 'x'; editors: half; commands: hello")
