"""What can be asked of ledgers: differences, the batch that broke an answer, blame, packs, compositions."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from editcore import (
    Attachment,
    DenseDelta,
    EditRequest,
    FactoredDelta,
    KnownTarget,
    LanguageModel,
    Plugins,
    RequestError,
    RunError,
    Signature,
)
from editcore.interfaces.history import LedgerEntry
from editcore.ledger.bisect import bisect
from editcore.ledger.blame import blame
from editcore.ledger.compare import compare
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import HeaderLine, encode
from editcore.ledger.states import LeftOut
from editcore.ledger.verify import verify
from editcore.models import EditedModel
from editcore.report import make_report
from editcore.runs.backends import RawBackend
from editcore.runs.pack import read_pack
from editcore.runs.reopening import open_run
from editcore.testing import tiny_model, tiny_requests
from safetensors import safe_open
from safetensors.torch import save_file

Call = Callable[..., SimpleNamespace]

FACTS = tiny_requests(8)
HEADER = HeaderLine(model="tiny", fingerprint="f" * 64, editor="toy")


def entry_of(
    model: LanguageModel,
    batch: int,
    requests: tuple[EditRequest, ...],
    *,
    size: float = 0.3,
    layers: tuple[int, ...] = (1,),
) -> LedgerEntry:
    """A batch of random factors, one column a request."""
    generator = torch.Generator().manual_seed(batch)
    changes, names = {}, [model.layout.weight_name(layer) for layer in layers]
    for name in names:
        d_out, d_in = model.as_out_in(name, model.weight(name)).shape
        left = size * torch.randn(d_out, len(requests), generator=generator, dtype=torch.float64)
        changes[name] = FactoredDelta(
            left, torch.randn(len(requests), d_in, generator=generator, dtype=torch.float64) / 8
        )
    known = KnownTarget(keys={}, values={})
    return LedgerEntry(
        batch=batch,
        requests=requests,
        weights=(1.0,) * len(requests),
        num_new=len(requests),
        changes=changes,
        known={request.id: known for request in requests},
        diagnostics={},
    )


def in_charge(model: LanguageModel) -> EditedModel:
    """The model in the charge of the backend ``raw``."""
    plugins, backend = Plugins.load(), RawBackend()
    backend.open(model)
    return EditedModel(model, backend, spec=plugins.backend("raw"), plugins=plugins)


def ledger_of(*batches: tuple[EditRequest, ...]) -> Ledger:
    ledger, model = Ledger(), tiny_model()
    for index, requests in enumerate(batches):
        ledger.append(entry_of(model, index, requests))
    return ledger


# Differences


def test_facts_that_were_added_removed_and_changed() -> None:
    anew = FACTS[0].model_copy(update={"target_new": "Oslo", "id": "anew"})
    first, second = ledger_of(FACTS[:3]), ledger_of(FACTS[1:2], (anew, FACTS[4]))
    found = compare(first, second)
    assert (found.added, found.removed, found.same) == (((FACTS[4], None),), ((FACTS[2], None),), 1)
    assert found.corrected == ((FACTS[0], anew, None),)
    assert (found.same_batches, found.only_first, found.only_second, found.same_weights) == (0, 1, 2, False)
    by = Signature(author="Ada", time="2026-03-01T00:00:00+00:00")
    second.mark("undo", [(1, "anew"), (1, FACTS[4].id)], by)
    assert compare(first, second).removed == ((FACTS[0], None), (FACTS[2], None))
    third = ledger_of(FACTS[:3])
    third.mark("undo", [(0, fact.id) for fact in FACTS[:3]], by)
    assert compare(first, third).removed == tuple((fact, by) for fact in FACTS[:3])


def test_a_fact_edited_anew_counts_where_it_was_edited_last() -> None:
    anew = FACTS[0].model_copy(update={"target_new": "Oslo", "id": "anew"})
    ledger = ledger_of(FACTS[:2], (anew,))
    assert ledger.facts() == (FACTS[1], anew)
    ledger.mark("undo", [(1, "anew")])
    assert ledger.facts() == FACTS[:2]


# Bisect


@pytest.mark.parametrize("broken", [0, 3, 6])
def test_the_batch_that_changed_an_answer_is_found(broken: int) -> None:
    model = tiny_model()
    history = [
        entry_of(model, index, (fact,), size=20.0 if index == broken else 1e-6, layers=(0, 1, 2))
        for index, fact in enumerate(FACTS[:7])
    ]
    edited = in_charge(model)
    prompt = "Emmy Noether was born in"
    [said] = model.generate([prompt], max_new_tokens=3)
    found = bisect(edited, history, prompt, said)
    assert (found.entry.batch, found.tried <= 5) == (broken, True)
    assert found.before.strip().startswith(said.strip())
    assert not found.after.strip().startswith(said.strip())
    expected = tiny_model()
    in_charge(expected).rebuild([entry.written for entry in history])
    name = model.layout.weight_name(1)
    assert torch.equal(model.weight(name), expected.weight(name))


def test_an_answer_that_an_edit_brought_is_searched_from_there() -> None:
    model = tiny_model()
    edited = in_charge(model)
    sizes = [1e-6, 20.0, 1e-6, 1e-6, 20.0, 1e-6]
    history = [
        entry_of(model, index, (fact,), size=size, layers=(0, 1, 2))
        for index, (fact, size) in enumerate(zip(FACTS, sizes, strict=False))
    ]
    edited.rebuild([entry.written for entry in history[:2]])
    [brought] = model.generate([FACTS[1].text], max_new_tokens=3)
    found = bisect(edited, history, FACTS[1].text, brought)
    assert found.entry.batch == 4


def test_what_cannot_be_searched_is_said() -> None:
    model = tiny_model()
    edited = in_charge(model)
    history = [entry_of(model, 0, FACTS[:1], size=1e-6)]
    [said] = model.generate(["Emmy Noether"], max_new_tokens=3)
    with pytest.raises(RequestError, match="There is nothing to search for: the model says"):
        bisect(edited, history, "Emmy Noether", said)
    with pytest.raises(RequestError, match=r"No known state of the model says 'Zzyzx' .* no batch wrote this fact"):
        bisect(edited, history, "Emmy Noether", "Zzyzx")
    with pytest.raises(RequestError, match="--expect is empty"):
        bisect(edited, history, "Emmy Noether", " ")


# Blame


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_blame_is_what_leaving_an_edit_out_takes(family: str) -> None:
    """Against weights without the edit's columns, on Linear, Conv1D and a projection of flattened tokens."""
    model = tiny_model(family)
    edited = in_charge(model)
    again = replace(entry_of(model, 2, (FACTS[5], FACTS[0]), layers=(0, 1)), num_new=1)  # the second one is replayed
    history = [entry_of(model, 0, FACTS[:3], layers=(0, 1)), entry_of(model, 1, FACTS[3:5]), again]
    edited.rebuild([entry.written for entry in history])
    prompt, answer = "Emmy Noether was born in", "Vienna"
    found = blame(edited, history, prompt, answer=answer)
    assert len(found.contributions) == 6
    assert [abs(contribution.logit) for contribution in found.contributions] == sorted(
        (abs(contribution.logit) for contribution in found.contributions), reverse=True
    )
    ids = model.encode([prompt])
    token = model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0]
    assert model.tokenizer.decode([token]) == found.token

    def scores(active: list[LedgerEntry]) -> torch.Tensor:
        edited.rebuild([entry.written for entry in active])
        with torch.inference_mode():
            return model.hf(input_ids=ids.input_ids).logits[0, -1].double()

    full = scores(history)
    assert found.probability == pytest.approx(float(full.softmax(0)[token]), rel=1e-4)
    for contribution in found.contributions:
        [request] = contribution.requests
        left_out = scores([_without(entry, request.id) for entry in history])
        assert contribution.batches == tuple(entry.batch for entry in history if request in entry.requests)
        # Two float32 forward passes with logits of size 10.
        assert contribution.logit == pytest.approx(float(full[token] - left_out[token]), abs=2e-4)
        expected = full.log_softmax(0)[token] - left_out.log_softmax(0)[token]
        assert contribution.log_probability == pytest.approx(float(expected), abs=2e-4)


def _without(entry: LedgerEntry, name: str) -> LedgerEntry:
    kept = [row for row, request in enumerate(entry.requests) if request.id != name]
    changes = {key: FactoredDelta(change.left[:, kept], change.right[kept]) for key, change in factored(entry).items()}
    return replace(entry, changes=changes)


def factored(entry: LedgerEntry) -> dict[str, FactoredDelta]:
    """Its changes, all of which are thin."""
    return {key: change for key, change in entry.changes.items() if isinstance(change, FactoredDelta)}


def test_factors_that_are_not_one_per_fact_are_blamed_by_batch() -> None:
    model = tiny_model()
    entry = entry_of(model, 0, FACTS[:3])
    merged = {name: FactoredDelta(change.left[:, :2], change.right[:2]) for name, change in factored(entry).items()}
    edited, history = in_charge(model), [replace(entry, changes=merged)]
    edited.rebuild([entry.written for entry in history])
    [contribution] = blame(edited, history, "Emmy Noether").contributions
    assert contribution.requests == FACTS[:3]


def beside(model: LanguageModel, batch: int, requests: tuple[EditRequest, ...], *, size: float) -> LedgerEntry:
    """A batch that changes logits and no weight."""
    generator = torch.Generator().manual_seed(batch)
    shift = size * torch.randn(model.layout.vocab_size, generator=generator)
    attachment = Attachment(kind="toy-logits", tensors={"shift": shift})
    return replace(entry_of(model, batch, requests), changes={}, attachment=attachment)


def test_what_is_beside_the_weights_is_blamed_by_batch(toys: Any) -> None:
    model = tiny_model()
    edited = in_charge(model)
    dense = {name: DenseDelta(change.dense()) for name, change in entry_of(model, 2, FACTS[4:6]).changes.items()}
    history = [
        entry_of(model, 0, FACTS[:2]),
        beside(model, 1, FACTS[2:4], size=1.0),
        replace(entry_of(model, 2, FACTS[4:6]), changes=dense),
    ]
    edited.rebuild([entry.written for entry in history])
    prompt, answer = "Emmy Noether was born in", "Vienna"
    found = blame(edited, history, prompt, answer=answer)
    by_batch = {
        contribution.batches: contribution
        for contribution in found.contributions
        if contribution.requests != contribution.requests[:1]
    }
    assert set(by_batch) == {(1,), (2,)}
    assert sorted(len(contribution.requests) for contribution in found.contributions) == [1, 1, 2, 2]
    ids = model.encode([prompt]).input_ids
    token = model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0]

    def score(active: list[LedgerEntry]) -> float:
        edited.rebuild([entry.written for entry in active])
        with torch.inference_mode():
            return float(model.hf(input_ids=ids).logits[0, -1, token])

    full = score(history)
    for (batch,), contribution in by_batch.items():
        assert contribution.requests == history[batch].requests
        expected = full - score([entry for entry in history if entry.batch != batch])
        assert contribution.logit == pytest.approx(expected, abs=2e-4)


def test_the_batch_that_changed_an_answer_may_be_beside_the_weights(toys: Any) -> None:
    model = tiny_model()
    edited = in_charge(model)
    history = [entry_of(model, index, FACTS[index : index + 1], size=1e-6) for index in range(5)]
    history[3] = beside(model, 3, FACTS[3:4], size=100.0)
    [said] = model.generate(["Emmy Noether was born in"], max_new_tokens=3)
    found = bisect(edited, history, "Emmy Noether was born in", said)
    assert found.entry.batch == 3
    assert len(edited.attachments) == 1, "all of the history is active at the end"


def test_blame_asks_as_the_edit_was_asked() -> None:
    """In the chat's form, and with what the fact's own request puts between prompt and answer."""
    model = tiny_model()
    glued = FACTS[0].model_copy(update={"join": ""})
    history = [entry_of(model, 0, (glued,))]
    edited = in_charge(model)
    edited.rebuild([entry.written for entry in history])
    found = blame(edited, history, glued.text, answer="Paris")
    assert not found.token.startswith(" ")
    assert blame(edited, history, FACTS[1].text, answer="Paris").token.startswith(" ")
    model.tokenizer.chat_template = "{% for turn in messages %}[{{ turn.content }}]\n{% endfor %}"
    model.use_chat_template()
    logits = model.hf(input_ids=torch.tensor([model.read_prompt(glued.text)[0]])).logits[0, -1].double()
    asked = blame(edited, history, glued.text)
    assert asked.probability == pytest.approx(float(logits.softmax(0).max()), rel=1e-4)
    assert asked.probability != pytest.approx(found.probability, rel=1e-2)


def test_blame_needs_edits_and_tokens() -> None:
    model = tiny_model()
    edited = in_charge(model)
    with pytest.raises(RequestError, match="No edit is active"):
        blame(edited, [], "A")
    with pytest.raises(RequestError, match="no token"):
        blame(edited, [entry_of(model, 0, FACTS[:1])], "")


# Verify and the format


def test_verify_holds_the_tensors_of_the_file_before_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    ledger, model = Ledger(tmp_path, HEADER), tiny_model()
    for index in range(4):
        ledger.append(entry_of(model, index, FACTS[2 * index : 2 * index + 2]))
    left_out = FACTS[0].id
    ledger.revise(0, LeftOut(frozenset({(0, left_out)})), ledger.entries[1].written)
    read: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = safetensors.torch.load

    def watched(raw: bytes) -> dict[str, torch.Tensor]:
        alive.append(sum(reference() is not None for reference in read))
        found = load(raw)
        read.append(weakref.ref(next(iter(found.values()))))
        return found

    monkeypatch.setattr(safetensors.torch, "load", watched)
    monkeypatch.setattr("editcore.ledger.reading._MAX_BYTES", 1)
    found = verify(tmp_path)
    assert (found.problems, found.files) == ((), 5)
    assert alive == [0, 1, 1, 1, 1]


def test_verify_names_every_damage(tmp_path: Path) -> None:
    ledger, model = Ledger(tmp_path, HEADER), tiny_model()
    for index in range(5):
        ledger.append(entry_of(model, index, FACTS[index : index + 1]))
    assert verify(tmp_path).problems == ()
    deltas = tmp_path / "deltas"
    (deltas / "batch-00001.safetensors").write_bytes((deltas / "batch-00001.safetensors").read_bytes()[:-8])
    flipped = bytearray((deltas / "batch-00002.safetensors").read_bytes())
    flipped[-1] ^= 1
    (deltas / "batch-00002.safetensors").write_bytes(flipped)
    (deltas / "batch-00003.safetensors").unlink()
    (deltas / "batch-00009.safetensors").write_bytes(b"")
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b"tiny-4", b"tiny-5")
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines) + b"0123456789abcdef {")
    found = verify(tmp_path)
    assert [problem.partition("ledger.jsonl, ")[2].partition(":")[0] for problem in found.problems] == [
        "line 6", "line 3", "line 4", "line 5",
    ]  # fmt: skip
    for what in (
        "the checksum does not fit",
        "were written; it was cut off or changed",
        "sha256 differs",
        "cannot be read",
    ):
        assert sum(what in problem for problem in found.problems) == 1
    assert len(found.notes) == 1
    assert (found.lines, found.files) == (6, 4)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:5]))
    assert [Path(note.partition(":")[0]).name for note in verify(tmp_path).notes] == [
        "batch-00004.safetensors",
        "batch-00009.safetensors",
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"kind": "header", "format": 5, "new": True},
            "the ledger has format 5, this version of editcore reads format 4",
        ),
        ({"kind": "header", "format": 99, "model": "a", "fingerprint": "b", "editor": "c"}, "the ledger has format 99"),
        ({"kind": "batch"}, r"this is not a line of a ledger \(batch\.batch: Field required\)"),
        ({"kind": "sidestep"}, "this is not a line of a ledger"),
        ({"kind": "undo", "edits": [[0, "a"]]}, "a ledger begins with its header"),
        ([1], "this is not a line of a ledger"),
    ],
)
def test_a_first_line_that_is_not_understood(tmp_path: Path, body: Any, message: str) -> None:
    import hashlib

    text = json.dumps(body)
    line = f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n"
    (tmp_path / "ledger.jsonl").write_text(line)
    with pytest.raises(RunError, match=rf"ledger\.jsonl, line 1: {message}"):
        Ledger.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": {"name": "../../x.safetensors", "size": 1, "sha256": "0" * 64}}, "String should match pattern"),
        ({"file": {"name": "batch-00000.safetensors/../a", "size": 1, "sha256": "0" * 64}}, "should match pattern"),
        ({"scale": 0.0}, "batch 0 is scaled by 0 and writes something"),
        ({"weights": []}, "batch 0 has 1 requests, 0 weights"),
        ({"num_new": 2}, "batch 0 has 1 requests, 1 weights and 2 new requests"),
    ],
)
def test_a_line_with_a_good_checksum_and_a_bad_content(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import hashlib

    ledger = Ledger(tmp_path, HEADER)
    ledger.append(entry_of(tiny_model(), 0, FACTS[:1]))
    line = (tmp_path / "ledger.jsonl").read_text().splitlines()[1]
    text = json.dumps({**json.loads(line.partition(" ")[2]), **change})
    changed = f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n"
    (tmp_path / "ledger.jsonl").write_bytes(encode(HEADER) + changed.encode())
    with pytest.raises(RunError, match=rf"ledger\.jsonl, line 2: .*{message}"):
        Ledger.read(tmp_path)


def test_a_ledger_of_another_model_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path, HEADER).append(entry_of(tiny_model(), 0, FACTS[:1]))
    with pytest.raises(
        RunError, match=r"is about another model: .* fingerprint ffffffffffff, those of 'b' have 000000"
    ):
        Ledger.open(tmp_path, HeaderLine(model="b", fingerprint="0" * 64, editor="toy"))


def test_numbers_that_json_has_not_come_back(tmp_path: Path) -> None:
    entry = replace(
        entry_of(tiny_model(), 0, FACTS[:1]), diagnostics={"a": float("inf"), "b": float("-inf"), "c": 5e-324}
    )
    Ledger(tmp_path, HEADER).append(entry)
    assert Ledger.read(tmp_path).entries[0].diagnostics == entry.diagnostics
    assert '"a":"Infinity"' in (tmp_path / "ledger.jsonl").read_text()


def test_opening_reads_no_tensors(tmp_path: Path) -> None:
    Ledger(tmp_path, HEADER).append(entry_of(tiny_model(), 0, FACTS[:1]))
    (tmp_path / "deltas" / "batch-00000.safetensors").unlink()
    ledger = Ledger.read(tmp_path)
    assert ledger.facts() == FACTS[:1]
    with pytest.raises(RunError, match=r"line 2: .* cannot be read"):
        list(ledger.active()[0].changes)


# The command line, on a real run


@pytest.fixture
def run(toys: Any, editctl: Call, small: Path, facts: Path, corpus_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """``run(NAME, ...)`` edits the six facts in batches of two into ``tmp_path / NAME``."""

    def call(name: str, *more: object) -> Path:
        options = ["--editor", "toy", "--model", small, "--dataset", facts, "--corpus", corpus_file]
        done = editctl("run", *options, "--corpus-tokens", 2000, "--batch-size", 2, "--out", tmp_path / name, *more)
        assert done.code == 0, done.err
        return tmp_path / name

    return call


def test_the_ledger_of_a_run(run: Callable[..., Path], editctl: Call) -> None:
    out = run("out", "--plugin", "gate")
    shown = json.loads(editctl("ledger", out, "show", "--json").out)
    assert [(row["batch"], row["state"], row["new"]) for row in shown] == [
        (0, "active", 2),
        (1, "rejected", 2),
        (2, "active", 2),
    ]
    assert shown[1]["reason"] == "gate: it looks odd"
    assert "batches: 3, active facts: 4" in editctl("ledger", out, "show").out
    done = editctl("ledger", out, "undo", "0", "--batch", 2)
    assert (done.code, "Active facts: 1." in done.out) == (0, True)
    assert [row["state"] for row in json.loads(editctl("ledger", out, "show", "--json").out)] == [
        "partly undone",
        "rejected",
        "undone",
    ]
    edits = json.loads(editctl("ledger", out, "show", "--edits", "--json").out)
    assert [(row["id"], row["state"]) for row in edits] == [
        ("0", "undone"), ("1", "active"), ("2", "rejected"), ("3", "rejected"), ("4", "undone"), ("5", "undone"),
    ]  # fmt: skip
    assert "as they were written" in editctl("ledger", out, "verify").out
    refused = editctl("ledger", out, "undo", "2")
    assert refused.err.endswith(
        "Error: The edit '2' was rejected with batch 1 (gate: it looks odd); it is not in the model.\n"
    )
    assert "1 edit\n" in editctl("generate", out, "Marie Curie was born in").out
    assert editctl("ledger", out, "redo", "0", "4", "5").code == 0
    assert [row["state"] for row in json.loads(editctl("ledger", out, "show", "--json").out)] == [
        "active",
        "rejected",
        "active",
    ]
    blamed = json.loads(editctl("ledger", out, "blame", "Marie Curie was born in", "--answer", "Paris", "--json").out)
    assert sorted(edit["edit"] for edit in blamed["edits"]) == ["0", "1", "4", "5"]


def test_undoing_a_whole_batch_needs_no_model(
    run: Callable[..., Path], editctl: Call, small: Path, tmp_path: Path
) -> None:
    out = run("out")
    small.rename(tmp_path / "moved")
    done = editctl("ledger", out, "undo", "--batch", 0)
    assert done.code == 0, done.err
    done = editctl("ledger", out, "undo", "2")
    assert (done.code, "Traceback" in done.err) == (2, False)


def test_damage_is_found_and_named(run: Callable[..., Path], editctl: Call) -> None:
    out = run("out")
    path = out / "deltas" / "batch-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = editctl("ledger", out, "verify")
    assert done.code == 2
    assert f"line 3: {path} has" in done.out
    assert "1 problems in 4 lines and 3 files." in done.out
    done = editctl("generate", out, "A")
    assert (done.code, f"line 3: {path} has" in done.err) == (2, True)


def test_one_process_changes_a_ledger(run: Callable[..., Path], editctl: Call) -> None:
    from editcore._util.lock import locked

    out = run("out")
    with locked(out):
        done = editctl("ledger", out, "undo", "0")
        assert (done.code, "is in use by process" in done.err) == (2, True)
        assert editctl("ledger", out, "show").code == 0


def test_a_pack_gives_the_bits_of_the_run(run: Callable[..., Path], editctl: Call, small: Path, tmp_path: Path) -> None:
    out, pack = run("out"), tmp_path / "facts.editpack"
    assert editctl("ledger", out, "undo", "3").code == 0
    done = editctl("pack", out, pack)
    assert (done.code, done.out.startswith(f"5 edits of small in {pack} (")) == (0, True)
    listed = [f"  {request.text} → {request.target_new}" for request in read_pack(pack).requests]
    assert done.out.splitlines()[1:] == listed
    done = editctl("apply", pack, "Marie Curie was born in", "--model", small, "--save", tmp_path / "saved")
    assert done.code == 0, done.err
    assert done.out.splitlines()[:6] == [f"5 edits by toy applied to {small}.", *listed]
    edited, ledger = open_run(out)
    assert LanguageModel.load(str(tmp_path / "saved")).fingerprint() == edited.model.fingerprint()
    manifest = read_pack(pack).manifest
    assert [request.id for request in read_pack(pack).requests] == [fact.id for fact in ledger.facts()]
    assert manifest.versions["editcore"]
    assert manifest.batches[0].evidence[0].request_id == "0"
    again = editctl("pack", out, pack)
    assert (again.code, "is already there" in again.err) == (2, True)


def test_a_pack_takes_along_what_is_beside_the_weights(
    run: Callable[..., Path], editctl: Call, small: Path, tmp_path: Path
) -> None:
    out = run("out", "--editor", "toy-any", "--set", "layers=[1]", "--set", "spoils=beside")
    pack = tmp_path / "facts.editpack"
    done = editctl("pack", out, pack)
    assert done.code == 0, done.err
    there, _ = open_run(out)
    packed = read_pack(pack).apply(LanguageModel.load(str(small)), Plugins.load())
    assert packed.model.fingerprint() == there.model.fingerprint()
    assert packed.model.asked("A") == there.model.asked("A") == "0, 1 2, 3 4, 5 A"
    refused = editctl("apply", pack, "--model", small, "--save", tmp_path / "saved")
    assert (refused.code, "are kept beside the weights (attachment toy-preface)" in refused.err) == (2, True)
    assert not (tmp_path / "saved").exists()


def test_a_pack_on_another_base_is_refused_unless_forced(
    run: Callable[..., Path], editctl: Call, tmp_path: Path
) -> None:
    out, pack = run("out"), tmp_path / "facts.editpack"
    editctl("pack", out, pack)
    tiny_model(seed=1).save(tmp_path / "other")
    tiny_model(config={"intermediate_size": 48}).save(tmp_path / "narrow")
    done = editctl("apply", pack, "--model", tmp_path / "other")
    assert (done.code, "--force applies them anyway" in done.err) == (2, True)
    assert editctl("apply", pack, "--model", tmp_path / "other", "--force").code == 0
    done = editctl("apply", pack, "--model", tmp_path / "narrow", "--force")
    assert (done.code, "is 32 by 64, in " in done.err) == (2, True)


def test_a_pack_that_was_changed_is_refused(run: Callable[..., Path], editctl: Call, tmp_path: Path) -> None:
    pack = tmp_path / "facts.editpack"
    editctl("pack", run("out"), pack)
    content = pack.read_bytes()
    for place in range(0, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[place] ^= 2
        pack.write_bytes(damaged)
        with pytest.raises(
            RunError, match=r"facts\.editpack (was changed or damaged|is not an edit pack|has a manifest)"
        ):
            read_pack(pack)
    for length in (0, 7, 100, len(content) - 1):
        pack.write_bytes(content[:length])
        with pytest.raises(RunError, match="is not an edit pack"):
            read_pack(pack)
    pack.write_bytes(content)
    with safe_open(pack, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["editpack"] = metadata["editpack"].replace('"target_new":"Paris"', '"target_new":"Oslo"')
    save_file(tensors, pack, metadata)
    done = editctl("apply", pack)
    assert (done.code, done.err) == (
        2,
        f"Error: {pack} was changed or damaged after it was written: its content hash differs.\n",
    )


def test_what_is_no_pack_is_named_with_what_takes_it(
    run: Callable[..., Path], editctl: Call, facts: Path, tmp_path: Path
) -> None:
    out, weights, unknown = run("out"), tmp_path / "model.safetensors", tmp_path / "some.thing"
    save_file({"a": torch.zeros(2)}, weights)
    unknown.write_bytes(b"something else")
    for path, sentence in (
        (facts, f"by its name it is a file of records; edit them with: editctl run --editor NAME --dataset {facts}"),
        (out, f"it is a run directory; make a pack of it with: editctl pack {out} FILE.editpack"),
        (tmp_path, "it is a folder; a pack is the one file that 'editctl pack' writes"),
        (weights, "by its name it has the weights of a model or an adapter; a pack is written by 'editctl pack'"),
        (unknown, "a pack is the one file that 'editctl pack' writes"),
    ):
        done = editctl("apply", path)
        assert done.code == 2
        assert done.err.startswith(f"Error: {path} is not an edit pack: {sentence}")
    pack = tmp_path / "facts.editpack"
    assert editctl("pack", out, pack).code == 0
    asked = editctl("run", "--editor", "toy", "--set", "layers=[1]", "--dataset", pack)
    assert (
        asked.err == f"Error: {pack} is not a file of records: it is a pack of edits, which 'editctl apply' applies.\n"
    )
    shown = editctl("generate", pack, "A")
    assert (shown.code, shown.err) == (2, f"Error: {pack} is a file, not a run directory.\n")


def test_composing_solves_the_union(run: Callable[..., Path], editctl: Call, facts: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in facts.read_text().splitlines()]
    for number, record in enumerate(records[:3]):
        record["case_id"] = number + 3  # ids that mean something else in the other run
    records[0]["requested_rewrite"]["target_new"]["str"] = "Madrid"
    other_facts = tmp_path / "other.jsonl"
    other_facts.write_text("".join(json.dumps(record) + "\n" for record in records[:3]))
    first, second = run("first", "--set", "layers=[1]"), run("second", "--dataset", other_facts)
    assert editctl("ledger", first, "undo", "5").code == 0
    refused = editctl("ledger", first, "compose", second, "--out", tmp_path / "both")
    assert refused.code == 2
    assert "contradict each other about 1 fact, the first being 'Marie Curie was born in': 'Paris' (" in refused.err
    assert not (tmp_path / "both").exists()
    done = editctl("ledger", first, "compose", second, "--out", tmp_path / "both", "--on-conflict", "last")
    assert done.code == 0, done.err
    assert "5 edits of 2 runs" in done.out
    ledger = Ledger.read(tmp_path / "both")
    assert ledger.facts()[0].target_new == "Madrid"
    assert len({fact.id for fact in ledger.facts()}) == 5
    # Every fact has the value that it was solved for.
    edited, ledger = open_run(tmp_path / "both")
    model = edited.model
    [entry], name = ledger.entries, model.layout.weight_name(1)
    for known in entry.known.values():
        found = model.projection(1)(known.keys[name].float()).double()
        torch.testing.assert_close(found, known.values[name], rtol=1e-3, atol=1e-3)
    # It can be measured like any run.
    finished = editctl("run", "--resume", "--out", tmp_path / "both")
    assert finished.code == 0, finished.err
    assert json.loads((tmp_path / "both" / "summary.json").read_text())["edits"] == 5
    # And what is said of it names both parts, and no data set that holds but one of them.
    text = make_report(tmp_path / "both").summary.read_text(encoding="utf-8")
    assert "5 edits of first + second" in text
    assert "5 facts of first + second written into small by toy, all together." in text
    assert f"compose {second} --out {tmp_path / 'both'} --on-conflict last" in text
    assert "second, solved together." in text
    assert "run.toml" not in text
    same = editctl("ledger", tmp_path / "both", "diff", second)
    assert "Facts: 0 added, 2 taken out, 0 corrected; 3 are the same in both." in same.out.splitlines()
    assert f"Both are edits of {ledger.header.model}; they have no batch in common." in same.out.splitlines()  # type: ignore[union-attr]


def test_runs_of_different_models_are_not_composed(
    run: Callable[..., Path], editctl: Call, small: Path, tmp_path: Path
) -> None:
    first = run("first")
    shutil.rmtree(small)
    tiny_model(seed=1).save(small)
    second = run("second")
    done = editctl("ledger", first, "compose", second, "--out", tmp_path / "both")
    assert (done.code, "have different base models" in done.err) == (2, True)
