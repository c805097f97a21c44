"""``editctl compare``: installed editors as the arms of one sweep, and the unedited model in their tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from editcore import HParamsError, Plugins
from editcore.sweeps import UNEDITED, Plan, SweepFile, load_sweep, make_comparison, make_plan

Call = Callable[..., SimpleNamespace]

pytestmark = pytest.mark.usefixtures("toys", "plain_pictures")

AN_EDITOR = "the name of an editor"
REQUIRED = {"ft": {"layer": 1}, "retrieval": {}, "ultra": {"weights": [["mlp.up_proj", [1]]]}}
"""What editors require; the others require layers."""


@pytest.fixture
def options(small: Path, facts: Path, corpus_file: Path, tmp_path: Path) -> list[object]:
    """Quick trials of the small model, which ``toy`` and ``dead-editor`` have a preset for."""
    return [
        "--model", small, "--dataset", facts, "--edits", 4, "--set", f"corpus={corpus_file}",
        "--set", "corpus_tokens=2000", "--out", tmp_path / "out", "--executor", "inline",
    ]  # fmt: skip


@pytest.fixture
def base(small: Path, facts: Path, corpus_file: Path) -> Mapping[str, Any]:
    """The same as options of a sweep."""
    return {"model": str(small), "dataset": str(facts), "edits": 4, "corpus": str(corpus_file), "corpus_tokens": 2000}


def changed(file: SweepFile, base: Mapping[str, Any], *, grid: Mapping[str, Any] | None = None) -> SweepFile:
    """The sweep with other options, and with layers for all its editors."""
    settings = required([arm["editor"] for arm in file.sweep.arms])
    sweep = file.sweep.changed(base=base, settings=settings, grid=grid or {}, seeds=(), arms=())
    return SweepFile(sweep=sweep, text=file.text)


def required(editors: Sequence[str]) -> dict[str, dict[str, object]]:
    """Settings with which each editor can run."""
    return {name: found for name in editors if (found := REQUIRED.get(name, {"layers": [1]}))}


def printed_rows(output: str) -> list[str]:
    """The first cell of every line that is printed."""
    return [line.split()[0] for line in output.splitlines() if line.strip()]


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False)


# The arms


def test_every_installed_editor_is_an_arm_without_being_told(base: Mapping[str, Any]) -> None:
    plugins = Plugins.load()
    made = make_plan(changed(make_comparison(plugins), base), plugins)
    assert set(made.arms) == set(plugins.editors())
    assert made.arms[0] == "retrieval", "the baseline"
    others = [name for name in plugins.editors() if name != "retrieval"]
    assert list(made.arms[1:]) == others, "in the order of the registry"
    assert {"toy", "toy-needy", "dead-editor"} <= set(made.arms)
    assert made.axes == ("batch_size",)
    assert {point.batch_size for point in made.points if point.arm == "toy"} == {1, 10, 40}
    assert {trial.config.editor for trial in made.trials.values()} == set(plugins.editors())


def test_what_an_editor_needs_comes_with_it(base: Mapping[str, Any]) -> None:
    plugins = Plugins.load()
    made = make_plan(changed(make_comparison(plugins, editors=["toy-needy"]), base), plugins)
    assert {(trial.config.plugins, trial.config.backend) for trial in made.trials.values()} == {(("first",), "half")}


@pytest.mark.parametrize(
    ("editors", "arms", "expected"),
    [
        (["toy-any", "toy"], [], [("toy", "toy", ()), ("toy-any", "toy-any", ())]),
        ([], ["toy-any", "toy"], [("toy-any", "toy-any", ()), ("toy", "toy", ())]),
        ([], ["mine=toy+second+first"], [("mine", "toy", ("second", "first"))]),
        (["toy-any"], ["mine=toy+first"], [("toy-any", "toy-any", ()), ("mine", "toy", ("first",))]),
        ([], ["toy+gate"], [("toy+gate", "toy", ("gate",))]),
        ([], [' my "own" = toy + gate '], [('my "own"', "toy", ("gate",))]),
    ],
)
def test_editors_are_chosen_and_arms_are_added(
    base: Mapping[str, Any], editors: list[str], arms: list[str], expected: list[tuple[str, str, tuple[str, ...]]]
) -> None:
    plugins = Plugins.load()
    made = make_plan(
        changed(make_comparison(plugins, editors=editors, arms=arms), base, grid={"batch_size": [2]}), plugins
    )
    configs = [made.trials[point.key].config for point in made.points]
    assert [(p.arm, c.editor, c.plugins) for p, c in zip(made.points, configs, strict=True)] == expected


def test_a_backend_of_an_arm_is_a_plugin_too(base: Mapping[str, Any]) -> None:
    plugins = Plugins.load()
    made = make_plan(changed(make_comparison(plugins, arms=["toy+half+first"]), base), plugins)
    assert {(trial.config.plugins, trial.config.backend) for trial in made.trials.values()} == {(("first",), "half")}


def test_the_file_of_a_comparison_makes_the_same_sweep(tmp_path: Path) -> None:
    file = make_comparison(Plugins.load(), editors=["toy"], arms=['my "own"=toy+first'])
    (tmp_path / "other.toml").write_text(file.text, encoding="utf-8")
    assert load_sweep(tmp_path / "other.toml").sweep == file.sweep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editor", "nullspace"], "Unknown editor 'nullspace'. Available: "),
        (["--editor", "toi"], "Did you mean 'toy'?"),
        (["--editor", "toy", "--editor", "toy"], "An editor is named twice: --editor toy --editor toy."),
        (["--arm", "nullspace"], "Unknown editor 'nullspace'. Available: "),
        (["--arm", "mine=toi+first"], "Unknown editor 'toi'. "),
        (["--arm", "mine=toy+fist"], "Unknown plugin 'fist'. "),
        (["--arm", "mine=first"], "Unknown editor 'first'. "),
        (["--arm", "mine=toy+toy-any"], "Unknown plugin 'toy-any'. "),
        (["--arm", "mine=toy+first+first"], "Arm 'mine': A plugin is named twice: --plugin first --plugin first."),
        (["--arm", "mine=toy+half+dead-backend"], "Arm 'mine': The backends half and dead-backend were asked for"),
        (["--arm", "a=toy", "--arm", "a=toy+gate"], "Two arms are named 'a'. Give one another name: --arm 'NAME=toy+"),
        (["--editor", "toy", "--arm", "toy"], "Two arms are named 'toy'. Give one another name: --arm 'NAME=toy'."),
        (["--arm", "unedited=toy"], "'unedited' names the model without edits in tables; choose another name."),
        *(
            (["--arm", text], f"--arm takes NAME=EDITOR, NAME=EDITOR+PLUGIN+PLUGIN or {AN_EDITOR}, found '{text}'.")
            for text in ("", "=toy", "mine=", "mine=+first", "mine=toy+", "toy++first", "mine= ")
        ),
    ],
)  # fmt: skip
def test_a_wrong_arm_is_refused_in_a_sentence(
    editctl: Call, options: list[object], tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = editctl("compare", *options, *arguments)
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_without_editors_there_is_nothing_to_compare() -> None:
    with pytest.raises(
        HParamsError, match=r"^No editor is installed, so there is nothing to compare\. See: editctl plugins$"
    ):
        make_comparison(Plugins.load(entry_points=[]))


# What cannot run


def test_a_dry_run_shows_the_arms_and_says_why_others_are_left_out(
    editctl: Call, options: list[object], small: Path, tmp_path: Path
) -> None:
    done = editctl("compare", *options, "--dry-run")
    assert done.code == 0, done.err
    arms = [line.split()[1] for line in done.out.splitlines() if "waiting" in line]
    assert arms == ["retrieval"] * 3 + ["toy"] * 3 + ["dead-editor"] * 3
    said = " ".join(done.out.split())
    assert (
        "Note: toy-pairs is left out: layers is required (list of int, not empty, each ≥ 0), and it has no presets. "
        f"Set it with --set toy-pairs.layers=[3], or let 'editctl onboard {small}' find it."
    ) in said
    assert "rome is left out: layers is required" in said
    assert "and no preset is named like the model" in said
    assert not (tmp_path / "out").exists()


def test_what_the_note_says_helps(editctl: Call, options: list[object]) -> None:
    done = editctl("compare", *options, "--set", "toy-pairs.layers=[1]", "--dry-run")
    assert done.code == 0, done.err
    arms = {line.split()[1] for line in done.out.splitlines() if "waiting" in line}
    assert arms == {"dead-editor", "retrieval", "toy", "toy-pairs"}
    assert "toy-pairs is left out" not in done.out


@pytest.mark.parametrize("arguments", [["--editor", "toy", "--editor", "toy-pairs"], ["--arm", "toy-pairs"]])
def test_an_editor_that_was_asked_for_is_not_left_out(
    editctl: Call, options: list[object], small: Path, arguments: list[str]
) -> None:
    done = editctl("compare", *options, *arguments, "--dry-run")
    assert done.code == 2
    assert done.err == (
        "Error: Arm 'toy-pairs': toy-pairs: layers is required (list of int, not empty, each ≥ 0), and it has no "
        f"presets. Set it with --set toy-pairs.layers=[3], or let 'editctl onboard {small}' find it.\n"
    )


def test_nothing_left_is_an_error(
    editctl: Call, options: list[object], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITCORE_DISABLE_PLUGINS", "retrieval")  # it requires nothing
    options[1] = small.rename(tmp_path / "other")
    done = editctl("compare", *options, "--dry-run")
    assert done.code == 2
    assert done.err.startswith("Error: The sweep 'comparison' has no trials. ")
    for name in Plugins.load().editors():
        [setting] = REQUIRED.get(name, {"layers": [1]})
        assert f"{name} is left out: {setting} is required" in done.err


@pytest.fixture
def without_subject(facts: Path) -> Path:
    """The facts, the last of them as a prompt without a subject."""
    lines = [json.loads(line) for line in facts.read_text(encoding="utf-8").splitlines()]
    lines[3] = {"prompt": "The old town lies by the", "target_new": "river"}
    facts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return facts


def test_an_editor_that_looks_for_subjects_is_left_out_where_there_are_none(
    base: Mapping[str, Any], without_subject: Path
) -> None:
    plugins = Plugins.load()
    file = make_comparison(plugins)
    made = make_plan(changed(file, base), plugins)
    assert set(made.arms) == {"toy-any", "ft", "retrieval", "ultra"}
    [note] = [note for note in made.notes if note.startswith("toy is left out")]
    assert note == (
        "toy is left out: The editor 'toy' needs a subject in every request; 1 of 4 have none, the first being 'The "
        "old town lies by the'. Name it and put {} in its place in the prompt."
    )
    # Of the first three each has one.
    assert len(make_plan(changed(file, {**base, "edits": 3}), plugins).arms) == len(plugins.editors())


def test_arms_that_all_need_subjects_leave_out_the_facts_without(
    editctl: Call, options: list[object], without_subject: Path
) -> None:
    done = editctl("compare", *options, "--editor", "toy", "--set", "edits=5", "--dry-run")
    assert done.code == 0, done.err
    why = "Line 4: It names no subject, and the editor 'toy' needs one in every request."
    assert f"Note: {without_subject}: 1 record cannot be used and is left out. {why}" in " ".join(done.out.split())
    assert [line.split()[-2] for line in done.out.splitlines() if "waiting" in line] == ["5"] * 3
    strict = editctl("compare", *options, "--editor", "toy", "--set", "edits=5", "--strict", "--dry-run")
    assert strict.code == 2
    assert strict.err == f"Error: {without_subject}, line 4: {why.partition(': ')[2]}\n"


def test_a_backend_that_does_not_fit_leaves_the_editor_out(base: Mapping[str, Any]) -> None:
    plugins = Plugins.load()
    made = make_plan(changed(make_comparison(plugins), {**base, "backend": "half"}), plugins)
    assert "toy" in made.arms
    assert "toy-any" not in made.arms
    assert any(note.startswith("toy-any is left out: The editor 'toy-any' gives changes that") for note in made.notes)


def test_an_unknown_option_leaves_nobody_out(editctl: Call, options: list[object]) -> None:
    done = editctl("compare", *options, "--set", "toy.v_lr=fast", "--dry-run")
    assert done.code == 2
    assert "Arm 'toy': toy: v_lr" in done.err


def test_a_preset_that_some_have_leaves_the_others_out(base: Mapping[str, Any], tmp_path: Path) -> None:
    """And one that leaves out what is required, those who have it."""
    plugins = Plugins.load()
    own = tmp_path / "cache" / "presets" / "toy"
    own.mkdir(parents=True)
    (own / "bare.toml").write_text("v_lr = 0.5\n", encoding="utf-8")
    sweep = make_comparison(plugins).sweep

    def planned(preset: str) -> Plan:
        changed = sweep.changed(base={**base, "preset": preset}, settings={}, grid={}, seeds=(), arms=())
        return make_plan(SweepFile(sweep=changed, text=""), plugins)

    made = planned("small")
    assert made.arms == ("toy", "dead-editor")
    without = "retrieval, toy-pairs, toy-any, toy-needy, toy-remembering"
    assert f"{without} are left out: Unknown preset 'small'. Available: none." in made.notes
    with pytest.raises(
        HParamsError, match=r"toy is left out: .*, and the preset 'bare' does not set it\. Set it with "
    ):
        planned("bare")


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs a package with two editors whose hyperparameters cannot be imported."""
    info = tmp_path / "strangers" / "edit_strange-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-strange\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[editcore]\nstrange = edit_strange\n", encoding="utf-8")
    (info.parent / "edit_strange.py").write_text(
        "from editcore import EditorSpec, hookimpl\n\n\n@hookimpl\ndef editcore_editors():\n"
        "    return [EditorSpec(name, 'nowhere:Editor', hparams='nowhere:HParams', summary='Broken.')\n"
        "            for name in ('strange', 'stranger')]\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(info.parent))


@pytest.mark.usefixtures("strangers")
def test_a_broken_package_costs_its_editors_and_no_others(base: Mapping[str, Any]) -> None:
    plugins = Plugins.load()
    sweep = make_comparison(plugins).sweep
    assert {"strange", "stranger"} <= {arm["name"] for arm in sweep.arms}
    editors = [name for name in plugins.editors() if "strange" not in name]
    settings = required(editors)
    file = SweepFile(sweep=sweep.changed(base=base, settings=settings, grid={}, seeds=(), arms=()), text="")
    made = make_plan(file, plugins)
    assert set(made.arms) == set(editors)
    assert "strange, stranger are left out: Cannot load 'nowhere:HParams': ModuleNotFoundError: No module named " in (
        " ".join(made.notes)
    )


# What comes out


def test_the_unedited_model_is_the_first_row(toys: Any, editctl: Call, options: list[object], tmp_path: Path) -> None:
    """Of what is printed, of the means and of the report."""
    done = editctl("compare", *options, "--editor", "toy", "--arm", "mine=toy+first", "--batch-size", 2)
    assert done.code == 0, done.err
    assert ("first", "after_run", 4) in toys.CALLS
    first_cells = printed_rows(done.out)
    start = first_cells.index("arm")
    assert first_cells[start : start + 4] == ["arm", "unedited", "toy", "mine"]
    folder = tmp_path / "out" / "comparison"
    means = read(folder / "comparison_mean.csv")
    table = read(folder / "comparison.csv")
    assert list(means["arm"]) == [UNEDITED, "toy", "mine"]
    assert list(table["arm"]) == ["toy", "mine"]
    shown = ["ES", "PS", "NS", "score", "facts_said", "paraphrases_said", "unchanged", "distinct_bigrams"]
    assert {path.name for path in folder.glob("*.png")} == {f"{name}_by_arm.png" for name in shown}
    assert set(means["consequences_said"]) == {""}  # these facts have none, and there is no figure of nothing
    unedited, edited = means.loc[0], means.loc[1]
    assert (unedited["batch_size"], unedited["retention"], unedited["seeds"], unedited["interval"]) == (
        "",
        "",
        1,
        "facts",
    )
    summary = json.loads((tmp_path / "out" / "trials" / table["key"][0] / "summary.json").read_text(encoding="utf-8"))
    for name in ("ES", "PS", "NS", "score"):
        assert float(unedited[name]) == pytest.approx(summary["before"][name])
        assert float(edited[name]) == pytest.approx(summary["after"][name])
    assert float(unedited["PS"]) != float(edited["PS"])
    # Of four facts, so that its interval says how little that is.
    assert float(unedited["ES_low"]) <= float(unedited["ES"]) < float(unedited["ES_high"])
    assert float(unedited["ES_high"]) - float(unedited["ES_low"]) > 20

    assert editctl("report", tmp_path / "out").code == 0
    report = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line[:1] == "|"]
    starts = [row[0] for row in rows]
    place = starts.index(UNEDITED)
    assert starts[place + 1 : place + 3] == ["toy", "mine"]
    assert f"{float(unedited['ES']):.1f}" in rows[place]


def test_there_is_a_figure_for_every_metric_that_has_values(
    editctl: Call, options: list[object], tmp_path: Path
) -> None:
    done = editctl(
        "compare", *options, "--editor", "toy", "--batch-size", 2, "--set", 'evaluators=["rewrites", "lengths"]'
    )
    assert done.code == 0, done.err
    pictures = {path.name for path in (tmp_path / "out" / "comparison").glob("*.png")}
    assert pictures == {"won_by_arm.png", "rewrites.length_by_arm.png", "lengths.length_by_arm.png"}
    assert "is not drawn" not in done.out


def test_several_batch_sizes_have_a_figure_of_the_objective(
    editctl: Call, options: list[object], tmp_path: Path
) -> None:
    sizes = ["--batch-size", 1, "--batch-size", 2]
    done = editctl("compare", *options, "--editor", "toy", *sizes, "--set", "evaluators=rewrites")
    assert done.code == 0, done.err
    folder = tmp_path / "out" / "comparison"
    assert {path.name for path in folder.glob("*.png")} == {
        "won_by_arm.png", "length_by_arm.png", "objective_by_batch_size.png",
    }  # fmt: skip
    means = read(folder / "comparison_mean.csv")
    assert list(zip(means["arm"], means["batch_size"], strict=True)) == [(UNEDITED, ""), ("toy", "1"), ("toy", "2")]


def test_the_best_arm_is_never_the_unedited_model(editctl: Call, options: list[object], tmp_path: Path) -> None:
    """Even where nothing is better than to leave it alone."""
    done = editctl("compare", *options, "--editor", "toy", "--batch-size", 2)
    assert done.code == 0, done.err
    path = tmp_path / "out" / "comparison" / "comparison_mean.csv"
    means = read(path)
    assert means["arm"][0] == UNEDITED
    means.loc[0, "score"] = 99.9
    means.to_csv(path, index=False)
    assert editctl("report", tmp_path / "out").code == 0
    report = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    assert ": arm toy, batch\\_size 2." in report
    assert "arm unedited" not in report


def test_each_data_has_an_unedited_model_of_its_own(editctl: Call, options: list[object], tmp_path: Path) -> None:
    """Told apart by the axis that makes the difference; means are over seeds, as those of other rows."""
    axes = ["--grid", "edits=[2, 4]", "--batch-size", 2, "--seed", 0, "--seed", 1]
    done = editctl("compare", *options, "--arm", "toy+gate", *axes)  # it rejects the second batch
    assert done.code == 0, done.err
    folder = tmp_path / "out" / "comparison"
    means, table = read(folder / "comparison_mean.csv"), pd.read_csv(folder / "comparison.csv")
    columns = ["arm", "batch_size", "edits", "seeds", "interval"]
    assert means[columns].to_numpy().tolist() == [
        [UNEDITED, "", 2, 2, "seeds"],
        [UNEDITED, "", 4, 2, "seeds"],
        ["toy+gate", "2", 2, 2, "seeds"],
        ["toy+gate", "2", 4, 2, "seeds"],
    ]
    assert table["rejected"].tolist() == [0, 0, 2, 2]
    for row, edits in ((0, 2), (1, 4)):
        own = table[table["edits"] == edits]
        assert float(means["NS"][row]) == pytest.approx(own["before_NS"].mean())


@pytest.fixture
def write(base: Mapping[str, Any], tmp_path: Path) -> Callable[[str], Path]:
    """Writes a sweep file with the quick base."""

    def call(more: str) -> Path:
        path = tmp_path / "own.toml"
        lines = [f"{name} = {json.dumps(value)}" for name, value in {"editor": "toy", "batch_size": 2, **base}.items()]
        path.write_text("\n".join(["[base]", *lines, more]), encoding="utf-8")
        return path

    return call


def test_arms_on_different_data_have_no_common_unedited_model(
    editctl: Call, write: Callable[[str], Path], tmp_path: Path
) -> None:
    arms = '[[arms]]\nname = "few"\nedits = 2\n[[arms]]\nname = "more"\nedits = 4\n'
    done = editctl("sweep", write(arms), "--out", tmp_path / "out", "--executor", "inline")
    assert done.code == 0, done.err
    assert list(read(tmp_path / "out" / "own" / "own_mean.csv")["arm"]) == ["few", "more"]
    said = " ".join(done.out.split())
    assert "Note: The means have no row of the unedited model, because the arms do not share data, model and" in said
    assert "before_METRIC of own.csv" in said


def test_any_sweep_has_the_unedited_model_in_its_means(
    editctl: Call, write: Callable[[str], Path], tmp_path: Path
) -> None:
    """Arms that differ in what edits, and in settings, see one and the same; a trial that failed shows nothing."""
    arms = '[[arms]]\nname = "plain"\n[[arms]]\nname = "half"\nbackend = "half"\n'
    arms += '[[arms]]\nname = "fails"\ntoy.fails_at = 0\n'
    done = editctl("sweep", write(arms), "--out", tmp_path / "out", "--executor", "inline")
    assert done.code == 1
    assert list(read(tmp_path / "out" / "own" / "own_mean.csv")["arm"]) == [UNEDITED, "plain", "half"]


def test_without_a_finished_trial_there_is_no_row(editctl: Call, write: Callable[[str], Path], tmp_path: Path) -> None:
    figures = '[[figures]]\nfile = "{metric}.png"\nkind = "bars"\n'
    done = editctl("sweep", write(f"toy.fails_at = 0\n{figures}"), "--out", tmp_path / "out", "--executor", "inline")
    assert done.code == 1
    assert read(tmp_path / "out" / "own" / "own_mean.csv").empty
    assert "no row of the unedited model" not in " ".join(done.out.split())
    assert "Note: {metric}.png is not drawn: no trial is finished." in done.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[arms]]\nname = "unedited"',
            "arms: 'unedited' names the model without edits in tables; choose another name",
        ),
        ('[[figures]]\nfile = "{metric}.png"\nkind = "bars"\nmetric = "ES"', "do not name a metric as well"),
        ('[[figures]]\nfile = "{metric}.png"\nkind = "forgetting"', "draws every metric, as bars or lines"),
        ('[[figures]]\nfile = "{other}.png"\nkind = "bars"', "figures.0.file"),
    ],
)
def test_names_that_have_a_meaning_are_refused_elsewhere(write: Callable[[str], Path], text: str, message: str) -> None:
    with pytest.raises(HParamsError) as caught:
        load_sweep(write(text))
    assert message in str(caught.value)


def test_lines_along_an_axis_that_is_fixed_are_not_asked_for() -> None:
    sweep = make_comparison(Plugins.load(), editors=["toy"]).sweep
    assert [figure.kind for figure in sweep.figures] == ["bars", "lines"]

    def kinds(base: Mapping[str, Any], grid: Mapping[str, Any]) -> list[str]:
        made = sweep.changed(base=base, settings={}, grid=grid, seeds=(), arms=())
        return [figure.kind for figure in made.figures]

    assert kinds({"batch_size": 2}, {}) == kinds({}, {"batch_size": [2]}) == ["bars"]
    assert kinds({}, {"batch_size": [2, 4]}) == kinds({"edits": 2}, {}) == ["bars", "lines"]
