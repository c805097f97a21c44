"""``editctl data``: what is wrong with a data set, fetching from a local server, converting; all without torch."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from editcore import DatasetError, Plugins
from editcore.datasets import Published, content_hash, findings_in, load_records, pull_file
from editcore.datasets.published import published_files

Call = Callable[..., SimpleNamespace]

ROME = {"subject": "Rome", "prompt": "{} is the capital of", "target_new": "France", "target_true": "Italy"}
LINES: tuple[object, ...] = (
    ROME,
    {**ROME, "target_new": "Spain", "subject": "ROME"},  # the same subject
    {**ROME, "subject": "Oslo", "prompt": "{}, Norway's town, is in", "target_new": "Norway"},
    {**ROME, "subject": "Bern", "target_new": "italy"},
    {**ROME, "subject": "Kent", "prompt": "{} in Italy is in", "neighborhood_prompts": ["Near Kent is", "Kentish is"]},
    {**ROME, "subject": "Kiel", "locality_prompt": "Kiel lies in", "locality_ground_truth": "Spain"},
    {**ROME, "subject": "Lund", "locality": {"Forgetfulness": [{"prompt": "Lund is", "ground_truth": ["Italy"]}]}},
    {**ROME, "subject": "Nice"},
    {**ROME, "subject": "Nice"},
    {**ROME, "subject": "Pisa", "prompt": "Paris is in"},
)  # fmt: skip


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in LINES) + "{\n[1]\n", encoding="utf-8")
    return path


def test_what_is_wrong_is_found_with_its_lines(facts: Path) -> None:
    found = findings_in(str(facts), plugins=Plugins.load())
    assert [(finding.kind, finding.line, finding.others) for finding in found.findings] == [
        ("unusable", 10, ()),
        ("unusable", 11, ()),
        ("unusable", 12, ()),
        ("contradiction", 1, (2,)),
        ("duplicate", 8, (9,)),
        ("target in prompt", 3, ()),
        ("target is true", 4, ()),
        ("true object in prompt", 5, ()),
        ("subject in neighborhood", 5, ()),
        ("edited fact in locality", 7, ()),
    ]
    about = {finding.kind: finding.about for finding in found.findings}
    assert about["contradiction"] == "'Rome is the capital of': 'France' or 'Spain'"
    assert about["subject in neighborhood"] == "'Near Kent is': 'Kent'"
    assert (found.records, found.faults) == (9, 4)
    assert found.formats == (("plain", 7), ("EasyEdit", 1), ("KnowEdit", 1))


def test_check_prints_kinds_with_lines_and_ends_with_1(editctl: Call, facts: Path) -> None:
    done = editctl("data", "check", facts)
    assert done.code == 1
    assert f"{facts}: 9 facts, format plain 7, EasyEdit 1, KnowEdit 1." in done.out
    rows = {line[:24].strip(): line[24:].split() for line in done.out.splitlines()}
    assert rows["contradiction"][:2] == ["1", "1+2"]
    assert rows["unusable"][:4] == ["3", "10,", "11,", "12"]
    told = json.loads(editctl("data", "check", facts, "--json").out)
    assert (told["faults"], len(told["findings"])) == (4, 10)


def test_flaws_that_are_no_faults_end_with_0(editctl: Call, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(LINES[2]), encoding="utf-8")
    done = editctl("data", "check", path)
    assert (done.code, "target in prompt" in done.out) == (0, True)
    clean = editctl("data", "check", "worldfacts")
    assert (clean.code, "Nothing was found that is wrong with it." in clean.out) == (0, True)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("gone.jsonl", "There is no file gone.jsonl."),
        ("worldfact", "Unknown data set 'worldfact'. Available: profiles, worldfacts."),
        ("counterfact.json", "'editctl data pull counterfact' fetches it to "),
    ],
)
def test_data_that_is_not_there_is_one_sentence(editctl: Call, data: str, sentence: str) -> None:
    done = editctl("data", "check", data)
    assert (done.code, sentence in done.err, done.out) == (2, True, "")


def test_convert_keeps_every_record_and_question(editctl: Call, facts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "ours.jsonl"
    done = editctl("data", "convert", facts, out)
    assert done.code == 0
    assert done.out.endswith(f"Wrote 9 facts to {out}.\n")
    assert "3 records cannot be used and are left out" in done.out
    plugins = Plugins.load()
    before = load_records(facts, plugins=plugins)
    assert content_hash(load_records(out, plugins=plugins)) == content_hash(before)
    assert findings_in(str(out), plugins=plugins).formats == (("a run's requests", 9),)
    first = tmp_path / "first.jsonl"
    assert "Wrote 2 facts" in editctl("data", "convert", facts, first, "--first", 2).out


def test_convert_writes_nothing_that_it_cannot_finish(editctl: Call, facts: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.jsonl"
    for arguments, sentence in (
        ((facts, tmp_path / "ours.csv"), "give a name that ends with .jsonl"),
        ((facts, out, "--strict"), "3 records cannot be used"),
        ((facts, facts), "is already there"),
    ):
        done = editctl("data", "convert", *arguments)
        assert (done.code, sentence in done.err) == (2, True), done.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["facts.jsonl"]


def test_list_has_data_sets_files_and_formats(editctl: Call) -> None:
    out = editctl("data", "list").out
    for word in ("worldfacts", "facts_per_subject", "zsre_mend_eval", "size and SHA-256", "hallueditbench"):
        assert word in out
    told = json.loads(editctl("data", "list", "--json").out)
    assert {"name", "file", "url", "licence", "size", "sha256", "summary"} == set(told["published"][0])
    assert {entry["name"] for entry in told["published"]} == set(published_files())


def test_nothing_but_pull_needs_torch_or_a_network(facts: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'numpy', 'pandas'): sys.modules[name] = None\n"
        "from editcore.cli import main\n"
        "main()\n"
    )
    for arguments in (["list"], ["check", str(facts)], ["convert", str(facts), str(tmp_path / "o.jsonl")]):
        done = subprocess.run([sys.executable, "-c", code, "data", *arguments], capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        assert "Traceback" not in done.stderr


# Fetching

CONTENT = bytes(range(256)) * 2000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file with ranges. ``cut`` ends answers after so many bytes; ``tag`` is its version."""

    content: ClassVar[bytes]
    cut: ClassVar[int | None]
    tag: ClassVar[str | None]
    asked: ClassVar[list[str | None]]

    def do_GET(self) -> None:
        kind = type(self)
        wanted = self.headers.get("Range")
        kind.asked.append(wanted)
        if self.path != "/facts.json":
            self.send_error(404)
            return
        start = 0
        if wanted and self.headers.get("If-Range") == kind.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start > len(kind.content) or (start and start == len(kind.content)):
            self.send_error(416)
            return
        body = kind.content[start:]
        self.send_response(206 if start else 200)
        if kind.tag is not None:
            self.send_header("ETag", kind.tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: kind.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    Server.content, Server.cut, Server.tag, Server.asked = CONTENT, None, '"one"', []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        Server.url = f"http://127.0.0.1:{listening.server_port}/facts.json"  # type: ignore[attr-defined]
        yield Server
        listening.shutdown()
        thread.join()


def entry_of(server: Any, content: bytes | None = CONTENT) -> Published:
    known = {} if content is None else {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return Published(name="facts", url=server.url, summary="", licence="MIT", **known)  # type: ignore[arg-type]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_file_is_fetched_verified_and_not_fetched_again(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "data" / "facts.json"
    pulled = pull_file(entry_of(server), path)
    assert (pulled.path, pulled.verified, pulled.fetched) == (path, True, True)
    assert path.read_bytes() == CONTENT
    assert left_in(path.parent) == ["facts.json"]
    assert pull_file(entry_of(server), path).fetched is False
    assert len(server.asked) == 1
    path.write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"is not the official file of facts: its size is 1 bytes, .*Delete it"):
        pull_file(entry_of(server), path)


def test_an_interrupted_fetch_is_continued(server: Any, tmp_path: Path) -> None:
    path, server.cut = tmp_path / "facts.json", 100_000
    with pytest.raises(DatasetError, match=r"cannot be fetched from http.*: IncompleteRead"):
        pull_file(entry_of(server), path)
    assert not path.exists()
    server.cut = None
    assert pull_file(entry_of(server), path).verified
    assert server.asked == [None, "bytes=100000-"]
    assert path.read_bytes() == CONTENT
    assert left_in(tmp_path) == ["facts.json"]


@pytest.mark.parametrize(("first", "tag"), [('"one"', '"two"'), (None, None), ('W/"one"', 'W/"one"')])
def test_a_fetch_begins_again_if_the_file_may_have_changed(
    server: Any, tmp_path: Path, first: str | None, tag: str | None
) -> None:
    path, server.cut, server.tag = tmp_path / "facts.json", 100_000, first
    with pytest.raises(DatasetError):
        pull_file(entry_of(server), path)
    server.cut, server.tag, server.content = None, tag, CONTENT[::-1]
    pull_file(entry_of(server, CONTENT[::-1]), path)
    assert path.read_bytes() == CONTENT[::-1]


def test_a_part_that_is_already_whole_is_fetched_again(server: Any, tmp_path: Path) -> None:
    (tmp_path / ".facts.json.part").write_bytes(CONTENT)
    (tmp_path / ".facts.json.part.version").write_text('"one"')
    assert pull_file(entry_of(server), tmp_path / "facts.json").verified
    assert server.asked == [f"bytes={len(CONTENT)}-", None]


@pytest.mark.parametrize(
    ("content", "what"), [(CONTENT[:-1] + b"!", "its SHA-256 is"), (CONTENT[:-1], "its size is 511999 bytes")]
)
def test_another_file_is_refused_and_removed(server: Any, tmp_path: Path, content: bytes, what: str) -> None:
    server.content = content
    with pytest.raises(DatasetError, match=f"is not the official file of facts: {what}.*It was removed"):
        pull_file(entry_of(server), tmp_path / "facts.json")
    assert left_in(tmp_path) == []


def test_what_cannot_be_fetched_is_one_sentence(server: Any, tmp_path: Path) -> None:
    for url, reason in (
        (server.url.replace("facts.json", "other.json"), "the server says 404 Not Found"),
        ("http://127.0.0.1:9/facts.json", "Connection refused"),
        ("file:///etc/passwd", "give an address with http or https"),
    ):
        with pytest.raises(DatasetError, match=reason):
            pull_file(entry_of(server), tmp_path / "new" / "facts.json", url=url)
    assert left_in(tmp_path / "new") == []


def test_pull_says_what_was_verified(
    server: Any, editctl: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    sizes = {"counterfact": entry_of(server), "unke": entry_of(server, None)}
    monkeypatch.setattr("editcore.datasets.published.published_files", lambda: sizes)
    done = editctl("data", "pull", "counterfact")
    path = tmp_path / "cache" / "data" / "facts" / "facts.json"
    assert (done.code, done.out) == (0, f"{path}\n"), done.err
    assert "Its size and SHA-256 are those that are recorded." in done.err
    assert "is already here" in editctl("data", "pull", "counterfact").err
    unrecorded = editctl("data", "pull", "unke", "--out", tmp_path / "u.json", "--url", server.url)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert f"Not verified: no size and SHA-256 are recorded for it. Its SHA-256 is {digest}." in unrecorded.err
    assert (tmp_path / "u.json").read_bytes() == CONTENT
    assert "Unknown published data set 'unkee'" in editctl("data", "pull", "unkee").err
