"""``editctl report``: what the page and the summary say, that nothing on them runs, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from editcore import EditRequest
from editcore.evaluation import COUNTERFACT, measures_of
from editcore.report import make_report
from editcore.report.cells import change, number, records_table
from editcore.report.document import Cell, Column, Document, Notice, Section, Table, one_line
from editcore.report.html import page
from editcore.report.markdown import summary
from editcore.runs import open_session

Call = Callable[..., SimpleNamespace]

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)> & \"quoted\" | `c` $\\no{$"


class Parsed(HTMLParser):
    """A page as its elements: tags with attributes, texts of rows and tables, and that what is opened is closed."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.codes: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.rows.append([])
            self.tables[-1].append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag == "code":
            self.codes.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.headings[-1] += data
        if "code" in self.open:
            self.codes[-1] += data

    def row(self, first: str) -> list[str]:
        """The one row whose first cell is this."""
        [row] = [row for row in self.rows if row and row[0] == first]
        return row

    def under(self, *heads: str) -> list[dict[str, str]]:
        """The rows of the tables whose first headings are these, by heading."""
        tables = [table for table in self.tables if table[0][: len(heads)] == list(heads)]
        assert tables, heads
        return [dict(zip(table[0], row, strict=True)) for table in tables for row in table[1:]]

    def pictures(self) -> list[bytes]:
        """The content of every image."""
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]


@pytest.fixture
def finished(
    toys: Any, editctl: Call, small: Path, facts: Path, corpus_file: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Runs the toy editor on the small model, and gives the run directory."""

    def call(*more: object, name: str = "out") -> Path:
        options = ["--model", small, "--dataset", facts, "--corpus", corpus_file, "--corpus-tokens", 2000]
        options += ["--batch-size", 2, "--out", tmp_path / name]
        done = editctl("run", "--editor", "toy", *options, *more)
        assert done.code == 0, done.err
        return tmp_path / name

    return call


def parsed(run: Path) -> Parsed:
    return Parsed(make_report(run).page.read_text(encoding="utf-8"))


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


# A run


def test_a_report_has_everything_that_is_asked_of_it(editctl: Call, finished: Callable[..., Path]) -> None:
    run = finished("--plugin", "gate", "--set", "gate.batch=1")
    done = editctl("report", run)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == f"Page: {run / 'report' / 'index.html'}"
    found = Parsed((run / "report" / "index.html").read_text(encoding="utf-8"))
    assert found.headings == [
        "Summary", "Checklist", "Relations", "Gates", "Facts", "Generations", "Batches", "Counts", "Cost", "Settings",
        "Reproduce", "Notes",
    ]  # fmt: skip
    results = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    # Every metric that is for readers, by evaluator: its means, how many facts they are of, and what it says.
    measured = {row["measure"]: row for row in found.under("measure", "before")}
    known = [
        metric for metric in results["metrics"]
        if metric["show"] != "data" and any(results[phase][metric["key"]] is not None for phase in ("before", "after"))
    ]  # fmt: skip
    assert list(measured) == [metric["label"] for metric in known]
    assert {"Efficacy (ES)", "Efficacy accuracy", "Facts said"} <= measured.keys()
    for metric in known:
        row = measured[metric["label"]]
        values = [results[phase][metric["key"]] for phase in ("before", "after")]
        assert [row["before"], row["after"]] == [
            "n/a" if value is None else f"{round(value, 1) + 0.0:.1f}" for value in values
        ]
        averaged = results["averages"]["after"].get(metric["key"])
        assert (row["facts"], row["unit"]) == ("" if averaged is None else str(averaged["facts"]), metric["unit"])
        assert row["what it says"] == metric["meaning"]
    assert measured["Efficacy (ES)"]["facts"] == "4"
    tally = f"{results['tallies'][0]['held']} of 4 facts are said"
    assert tally in (run / "report" / "report.md").read_text(encoding="utf-8")
    requests = [json.loads(line) for line in (run / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = {row["prompt"]: row for row in found.under("subject", "prompt")}
    frame = pd.read_parquet(run / "results.parquet")
    after = frame[frame["phase"] == "after"]
    held = {row["request_id"]: row["value"] for row in after[after["metric"] == "ES"].to_dict(orient="records")}
    said = {row["request_id"]: row["text"] for row in after[after["metric"] == "facts_said"].to_dict(orient="records")}
    assert held.keys() == said.keys() == {"0", "1", "4", "5"}
    for index, record in enumerate(requests):
        request, refused = record["request"], index in (2, 3)
        row = facts[request["prompt"].replace("{}", request["subject"])]
        given = (request["subject"], request["target_new"], request["target_true"], record["relation"])
        assert (row["subject"], row["edited to"], row["instead of"], row["relation"]) == given
        assert (row["state"], row["batch"]) == ("refused" if refused else "active", str(index // 2))
        assert row["Efficacy (ES)"].endswith("n/a") == refused  # it was not measured again
        if refused:
            assert row["it says"] == ""
            continue
        assert row["Efficacy (ES)"].split(" → ")[1] == ("100" if held[request["id"]] else "0 lost")
        assert row["it says"] == "".join(
            character for character in one_line(said[request["id"]]) if character.isprintable()
        )
    assert {row["Efficacy (ES)"][-4:] for row in facts.values()} == {"lost", " 100", " n/a"}
    # The gate's verdict with its figures, and the facts that it cost.
    assert ["1", "gate", "reject", "it looks odd", "oddness 0.75, ratio inf"] in [row[:5] for row in found.rows]
    assert (
        sum(row[4:] == ["gate", "it looks odd", "oddness 0.75, ratio inf"] for row in found.rows if len(row) == 7) == 2
    )


def test_a_fact_that_a_session_added_is_there(finished: Callable[..., Path]) -> None:
    run = finished("--edits", 2)
    added = EditRequest(subject="Ada Lovelace", prompt="{} lives in", target_new="Paris")
    open_session(run).edit([added])
    made = make_report(run)
    found = Parsed(made.page.read_text(encoding="utf-8"))
    facts = {row["prompt"]: row for row in found.under("subject", "prompt")}
    assert len(facts) == 3
    assert [facts[added.text][name] for name in ("subject", "edited to", "state", "batch")] == [
        "Ada Lovelace", "Paris", "active", "1",
    ]  # fmt: skip
    text = made.summary.read_text(encoding="utf-8")
    assert "2 edits of facts.jsonl and 1 more" in text
    assert "2 facts of facts.jsonl and 1 more written into small by toy" in text
    assert "edits were added, undone or redone after the facts were measured" in text
    assert "A session added 1 fact more, which these commands do not add again." in text


def test_the_figures_are_on_the_page_and_beside_the_summary(finished: Callable[..., Path]) -> None:
    run = finished("--edits", 4)
    (run / "figures" / "drawn_later.png").write_bytes((run / "figures" / "summary.png").read_bytes())
    (run / "figures" / "broken.png").write_bytes(b"not a picture")
    made = make_report(run)
    names = {path.stem for path in made.figures}
    shares = ("ES", "PS", "NS", "facts_said", "paraphrases_said", "unchanged", "distinct_bigrams")
    assert names == {"summary", *(f"relations_{name}" for name in shares), "drawn_later"}
    found = Parsed(made.page.read_text(encoding="utf-8"))
    assert found.pictures() == [path.read_bytes() for path in made.figures]
    assert all(attributes["alt"] for tag, attributes in found.tags if tag == "img")
    text = made.summary.read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((figures/\S+)\)", text)) == {f"figures/{name}.png" for name in names}


def test_the_page_asks_nobody_for_anything(finished: Callable[..., Path]) -> None:
    found = parsed(finished("--edits", 2))
    for tag, attributes in found.tags:
        for name in ("src", "href", "action", "data", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    [policy] = [attributes["content"] for _, attributes in found.tags if attributes.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{}]


def test_what_others_wrote_is_text(finished: Callable[..., Path]) -> None:
    """A hostile subject, relation, generation, answer, note and title can do nothing but be read."""
    run = finished("--edits", 2)
    lines = [json.loads(line) for line in (run / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[0]["request"]["subject"] = HOSTILE
    lines[0]["relation"] = HOSTILE
    (run / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    changed(run / "summary.json", lambda it: {**it, "notes": [HOSTILE]})
    changed(run / "summary.json", lambda it: {**it, "samples": [{**it["samples"][0], "after": HOSTILE + "\n\n"}]})
    changed(run / "summary.json", lambda it: {**it, "tallies": [{**it["tallies"][0], "missing": [HOSTILE]}]})
    changed(run / "run.json", lambda it: {**it, "command": HOSTILE, "config": {**it["config"], "dataset": HOSTILE}})
    frame = pd.read_parquet(run / "results.parquet")
    frame["relation"] = frame["prompt"] = HOSTILE
    frame.loc[frame["text"].notna(), "text"] = HOSTILE
    frame.to_parquet(run / "results.parquet", index=False)
    made = make_report(run)
    found = Parsed(made.page.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in found.tags}
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "evil.example" in "".join(cell for row in found.rows for cell in row)
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in found.tags if tag == "img")
    text = re.sub(r"^```.*?^```$", "", made.summary.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert "<" not in text
    assert "iframe" not in tags
    # No row of a table is cut by a bar in a text.
    lines = [line for line in text.splitlines() if line.startswith("|") and "evil.example" in line]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [11, 5]  # of relations, and of generations


def test_a_run_in_which_nothing_was_written_has_a_report(finished: Callable[..., Path]) -> None:
    found = parsed(finished("--edits", 2, "--plugin", "gate", "--set", "gate.batch=0"))
    efficacy = found.row("Efficacy (ES)")
    assert efficacy[1] != "n/a"
    assert efficacy[2:4] == ["n/a", "n/a"]  # after, and the change
    assert efficacy[4] != ""  # the interval before
    assert efficacy[5:8] == ["", "%", ""]
    assert [row["state"] for row in found.under("subject", "prompt")] == ["refused"] * 2
    assert "Relations" not in found.headings


def test_undoing_after_the_measurement_is_said(editctl: Call, finished: Callable[..., Path]) -> None:
    run = finished()
    assert not any("notice" in (attributes.get("class") or "") for _, attributes in parsed(run).tags)
    assert editctl("ledger", run, "undo", "--batch", 0).code == 0
    found = parsed(run)
    assert any("notice" in (attributes.get("class") or "") for _, attributes in found.tags)
    assert [row["state"] for row in found.under("subject", "prompt")] == ["undone", "undone"] + ["active"] * 4
    assert "older than the ledger" in (run / "report" / "report.md").read_text(encoding="utf-8")
    assert editctl("ledger", run, "redo", "--batch", 0).code == 0
    assert not any("notice" in (attributes.get("class") or "") for _, attributes in parsed(run).tags)


def test_the_file_to_reproduce_a_run_reproduces_it(
    editctl: Call, finished: Callable[..., Path], tmp_path: Path
) -> None:
    run = finished("--edits", 4, "--set", "v_lr=0.75", "--plugin", "gate", "--set", "gate.batch=1")
    [text] = [code for code in parsed(run).codes if code.startswith("# run.toml")]
    tomllib.loads(text)
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    done = editctl("run", "--config", tmp_path / "run.toml", "--out", tmp_path / "again")
    assert done.code == 0, done.err
    again = tmp_path / "again"
    assert (again / "ledger.jsonl").read_bytes() == (run / "ledger.jsonl").read_bytes()
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "results.parquet") for folder in (run, again)))


def test_checkpoints_become_a_section(finished: Callable[..., Path]) -> None:
    run = finished("--edits", 4, "--evaluator", "counterfact")
    more = {
        "checkpoints": [
            {
                "batch": 0,
                "num_edits": 2,
                "facts": 2,
                "values": {"ES": 100.0, "NS": 62.5, "EM": 3.0},
                "before": {"ES": 0.0},
                "interval": {"ES": [34, 100]},
                "perplexity": 20.5,
                "perplexity_ratio": 1.01,
                "relative_change": {"a": 0.1, "b": 0.25},
                "seconds": 1.5,
            },
            {
                "batch": 1,
                "num_edits": 4,
                "facts": 3,
                "values": {"ES": None},
                "before": {"ES": None},
                "interval": {},
                "perplexity": 25.0,
                "perplexity_ratio": 1.25,
                "relative_change": {"a": 0.5, "b": 0.25},
                "seconds": 2.5,
            },
        ],
        "forgetting": {
            "half_life": None,
            "auc": 93.75,
            "retention_by_age": [
                {"first": 0, "last": 0, "age": 0.0, "facts": 4, "retention": 100.0, "interval": [51.0, 100.0]},
                {"first": 1, "last": 2, "age": 2.0, "facts": 2, "retention": 87.5, "interval": [34.2, 98.0]},
            ],
        },
    }
    changed(run / "summary.json", lambda it: {**it, **more})
    (run / "figures" / "forgetting_curve.png").write_bytes((run / "figures" / "summary.png").read_bytes())
    found = parsed(run)
    assert "Forgetting" in found.headings
    heads = [
        "facts edited",
        "facts measured",
        "Efficacy (ES)",
        "Paraphrase (PS)",
        "Neighbourhood (NS)",
        "Score (harmonic mean)",
        "perplexity",
        "perplexity, times the unedited model's",
        "‖ΔW‖/‖W‖",
        "seconds",
    ]
    start = found.rows.index(heads)
    assert found.rows[start + 1 : start + 3] == [
        ["2", "2", "100", "n/a", "62.5", "n/a", "20.5", "1.01", "0.25", "1.5"],
        ["4", "3", "n/a", "n/a", "n/a", "n/a", "25", "1.25", "0.5", "2.5"],
    ]
    start = found.rows.index(["age from", "to", "mean age", "facts", "retention (%)", "95 % interval"])
    assert found.rows[start + 1 : start + 3] == [
        ["0", "0", "0", "4", "100", "51.0 to 100.0"],
        ["1", "2", "2", "2", "87.5", "34.2 to 98.0"],
    ]
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "there is no half-life" in text
    assert "the area under the curve, is 93.8 %." in text
    assert "(figures/forgetting_curve.png)" in text


def test_a_run_with_checkpoints_has_its_curve(finished: Callable[..., Path]) -> None:
    run = finished("--edits", 4, "--eval-every", 2)
    found = parsed(run)
    checkpoints = json.loads((run / "summary.json").read_text(encoding="utf-8"))["checkpoints"]
    shown = found.under("facts edited", "facts measured")
    assert (
        [row["facts edited"] for row in shown]
        == [str(checkpoint["num_edits"]) for checkpoint in checkpoints]
        == ["2", "4"]
    )
    for row, checkpoint in zip(shown, checkpoints, strict=True):
        assert float(row["Efficacy (ES)"]) == pytest.approx(checkpoint["values"]["ES"], abs=0.05)
        assert float(row["Facts said (%)"]) == pytest.approx(checkpoint["values"]["facts_said"], abs=0.05)
    assert (run / "figures" / "forgetting_curve.png").read_bytes() in found.pictures()


def test_five_hundred_facts_are_a_page_of_a_few_megabytes(finished: Callable[..., Path]) -> None:
    run = finished("--edits", 2)
    line = json.loads((run / "requests.jsonl").read_text(encoding="utf-8").splitlines()[0])
    frame = pd.read_parquet(run / "results.parquet")
    frame = frame[frame["request_id"] == "0"]
    parts, lines = [], []
    for index in range(500):
        line["request"]["id"] = str(index)
        line["relation"] = f"relation {index % 30}"
        lines.append(json.dumps(line) + "\n")
        parts.append(frame.assign(request_id=str(index), relation=line["relation"]))
    (run / "requests.jsonl").write_text("".join(lines), encoding="utf-8")
    pd.concat(parts, ignore_index=True).to_parquet(run / "results.parquet", index=False)
    made = make_report(run)
    rows = Parsed(made.page.read_text(encoding="utf-8")).under("subject", "prompt")
    assert len(rows) == 500
    assert all("→" in row["Facts said (%)"] for row in rows)
    assert made.page.stat().st_size < 3_000_000


# What is refused


def test_a_folder_that_is_neither_is_refused(editctl: Call, tmp_path: Path) -> None:
    done = editctl("report", tmp_path)
    assert done.code == 2
    assert done.err == (
        f"Error: {tmp_path} is neither a run (run.json is not there) nor a sweep (plan.json is not there) nor an "
        "evaluation (evaluation.json is not there); give a directory that 'editctl run', 'editctl sweep' or 'editctl "
        "evaluate' wrote.\n"
    )


def test_damage_is_named_and_nothing_is_written(editctl: Call, finished: Callable[..., Path]) -> None:
    run = finished("--edits", 2)
    for name, content, message in [
        ("results.parquet", b"PAR1", "results.parquet is damaged: "),
        ("results.parquet", None, "results.parquet is not there; without it a run has no results."),
        ("summary.json", b"{", "summary.json is damaged ("),
        ("summary.json", b'{"edits": "many"}', "summary.json is damaged ("),
        ("summary.json", None, "has no results yet (summary.json is not there); finish it with: editctl run --resume"),
        ("requests.jsonl", b"{}\n", "requests.jsonl is damaged ("),
        ("ledger.jsonl", b"{}\n", "ledger.jsonl, line 1: "),
        ("run.json", b"[]", "run.json is damaged: "),
    ]:
        kept = (run / name).read_bytes()
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
        done = editctl("report", run)
        assert (done.code, done.err.startswith("Error: "), message in done.err) == (2, True, True), (name, done.err)
        assert len(done.err.splitlines()) == 1
        assert not (run / "report").exists()
        (run / name).write_bytes(kept)
    assert editctl("report", run).code == 0


def test_only_a_report_is_replaced(editctl: Call, finished: Callable[..., Path], tmp_path: Path) -> None:
    run = finished("--edits", 2)
    taken = tmp_path / "other"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine", encoding="utf-8")
    done = editctl("report", run, "--out", taken)
    assert (done.code, done.err) == (
        2, f"Error: The output {taken} is already there and is not a report; give another --out, or remove it.\n",
    )  # fmt: skip
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    assert editctl("report", run, "--out", tmp_path / "new").code == 0
    first = (tmp_path / "new" / "index.html").read_bytes()
    assert editctl("report", run, "--out", tmp_path / "new").code == 0
    assert (tmp_path / "new" / "index.html").read_bytes() == first


# A sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep directory as docs/reference/sweeps.md describes it: two arms, an axis with a value that is missing, two
    seeds, and a trial that failed."""
    folder = tmp_path / "sweep"
    points = [
        ("plain", {"batch_size": 5, "replay.replay_rate": None}, 0, "aaaa1111aaaa"),
        ("plain", {"batch_size": 5, "replay.replay_rate": None}, 1, "bbbb2222bbbb"),
        ("replay", {"batch_size": 5, "replay.replay_rate": 0.5}, 0, "cccc3333cccc"),
        ("replay", {"batch_size": 5, "replay.replay_rate": 0.5}, 1, "dddd4444dddd"),
    ]
    plan = {
        "metrics": [asdict(measure) for measure in measures_of([COUNTERFACT])],
        "title": "does_replay_hold", "summary": "Does replay hold earlier facts?", "arms": ["plain", "replay"],
        "axes": {"batch_size": [5], "replay.replay_rate": [0.5]}, "seeds": [0, 1], "notes": ["An arm was left out."],
        "points": [{"arm": arm, "values": values, "seed": seed, "key": key} for arm, values, seed, key in points],
        "trials": {key: {"config": {"editor": "toy"}, "versions": {}, "contents": {}} for *_, key in points},
    }  # fmt: skip
    tables = folder / "does_replay_hold"
    tables.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    state = {"state": "incomplete", "trials": 4, "finished": 3, "failed": 1, "command": "editctl sweep replay.toml"}
    (folder / "sweep.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "sweep.toml").write_text('title = "does_replay_hold"\n', encoding="utf-8")
    (tables / "does_replay_hold.csv").write_text(
        "arm,batch_size,replay.replay_rate,seed,key,status,error,edits,rejected,ES,PS,NS,score,retention\n"
        "plain,5,,0,aaaa1111aaaa,finished,,10,0,90.0,80.0,70.0,79.2,85.0\n"
        "plain,5,,1,bbbb2222bbbb,finished,,10,0,80.0,80.0,70.0,76.4,75.0\n"
        "replay,5,0.5,0,cccc3333cccc,finished,,10,0,100.0,90.0,70.0,84.6,100.0\n"
        'replay,5,0.5,1,dddd4444dddd,failed,"The disk is <full>, alas.",,,,,,,\n',
        encoding="utf-8",
    )
    (tables / "does_replay_hold_mean.csv").write_text(
        "arm,batch_size,replay.replay_rate,seeds,interval,ES,ES_low,ES_high,score,score_low,score_high\n"
        "plain,5,,2,seeds,85.0,21.5,148.5,77.8,60.0,95.6\n"
        "replay,5,0.5,1,facts,100.0,72.2,100.0,84.6,,\n",
        encoding="utf-8",
    )
    (tables / "timings.csv").write_text(
        "arm,batch_size,replay.replay_rate,seed,key,seconds,seconds_per_edit,peak_memory_bytes\n"
        "plain,5,,0,aaaa1111aaaa,30.0,3.0,1\nplain,5,,1,bbbb2222bbbb,31.0,3.1,1\n",
        encoding="utf-8",
    )
    for *_, key in points[:3]:
        (folder / "trials" / key).mkdir(parents=True)
    return folder


def markdown(sweep: Path) -> str:
    return (sweep / "report" / "report.md").read_text(encoding="utf-8")


def test_a_sweep_has_its_means_failures_and_trials(editctl: Call, sweep: Path) -> None:
    done = editctl("report", sweep)
    assert done.code == 0, done.err
    found = Parsed((sweep / "report" / "index.html").read_text(encoding="utf-8"))
    assert found.headings == ["Summary", "Means", "Failures", "Trials", "Reproduce", "Notes"]
    assert ["plain", "5", "", "2", "85.0", "21.5 to 148.5", "77.8", "60.0 to 95.6"] in found.rows
    assert ["replay", "5", "0.5", "1", "100.0", "72.2 to 100.0", "84.6", ""] in found.rows
    assert ["dddd4444", "arm replay, batch_size 5, replay.replay_rate 0.5", "The disk is <full>, alas."] in found.rows
    trials = [row for row in found.rows if len(row) == 12][1:]
    assert [row[0] for row in trials] == ["aaaa1111", "bbbb2222", "cccc3333", "dddd4444"]
    assert [row[4] for row in trials] == ["0", "1", "0", "1"]
    assert [row[-1] for row in trials] == ["30 s", "31 s", "n/a", "n/a"]
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert [link for link in links if link and not link.startswith("#")] == [
        f"../trials/{key}" for key in ("aaaa1111aaaa", "bbbb2222bbbb", "cccc3333cccc")
    ]
    assert found.row("arm") == [
        "arm", "batch_size", "replay.replay_rate", "seeds", "Efficacy (ES)", "interval", "Score (harmonic mean)",
        "interval",
    ]  # fmt: skip
    assert "Means after the last edit; percent, higher is better." in markdown(sweep)
    assert "The best mean of score is 84.6: arm replay" in markdown(sweep)


def test_the_best_is_the_lowest_where_lower_is_better(sweep: Path) -> None:
    def lower(plan: Any) -> Any:
        metrics = [
            {**metric, "better": "lower" if metric["key"] == "score" else "higher"} for metric in plan["metrics"]
        ]
        return {**plan, "metrics": metrics}

    changed(sweep / "plan.json", lower)
    make_report(sweep)
    assert "higher is better (lower for score)" in markdown(sweep)
    assert "The best mean of score is 77.8 (95 % interval 60.0 to 95.6): arm plain" in markdown(sweep)


def test_a_sweep_links_to_the_reports_of_its_trials(sweep: Path, finished: Callable[..., Path], tmp_path: Path) -> None:
    trial = sweep / "trials" / "aaaa1111aaaa"
    trial.rmdir()
    finished("--edits", 2).rename(trial)
    make_report(trial)
    (sweep / "does_replay_hold" / "scores.png").write_bytes((trial / "figures" / "summary.png").read_bytes())
    made = make_report(sweep, tmp_path / "elsewhere")
    found = Parsed(made.page.read_text(encoding="utf-8"))
    [link] = [href for _, attributes in found.tags if "index.html" in (href := attributes.get("href") or "")]
    assert (made.page.parent / link).resolve() == trial / "report" / "index.html"
    assert [path.name for path in made.figures] == ["scores.png"]


def test_a_sweep_without_tables_is_refused(editctl: Call, sweep: Path) -> None:
    (sweep / "sweep.json").unlink()
    done = editctl("report", sweep)
    assert (done.code, "has no tables yet" in done.err) == (2, True)
    assert not (sweep / "report").exists()


# Parts


def test_numbers_sort_as_numbers_and_say_what_is_missing() -> None:
    assert number(1234.56).text == "1,234.6"
    assert number(None).text == number(float("nan")).text == "n/a"
    assert change(0.0, 100.0) == Cell("0 → 100", order=100.0)
    assert change(float("nan"), 12.0).text == "n/a → 12"


def test_records_keep_what_they_have() -> None:
    table = records_table("x", [{"b": 1, "a": "t", "c": {"no": 1}}, {"b": 2.5, "d": None}], names={"a": "A"})
    assert [column.name for column in table.columns] == ["A", "b", "d"]
    assert [[cell.text for cell in row] for row in table.rows if not isinstance(row, str)] == [
        ["t", "1", "n/a"],
        ["", "2.5", "n/a"],
    ]


def documents() -> Iterator[Document]:
    for text in (HOSTILE, "\x00\x1b[31m\x0b", "a\nb", "$script_hash $x ${title}", "| --- |", "```\n```"):
        table = Table(
            caption=text, columns=[Column(text), Column("n", number=True)], rows=[[text, Cell(text, order=1)]]
        )
        yield Document(
            title=text, lead=text, writer=text, sections=[Section("One", [Notice(text), table]), Section("Two", [])]
        )


@pytest.mark.parametrize("document", list(documents()))
def test_any_text_is_only_text(document: Document) -> None:
    found = Parsed(page(document))
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert len(found.rows) == 2
    lines = summary(document).splitlines()
    [head, rule, row] = [line for line in lines if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, row)}) == 1
