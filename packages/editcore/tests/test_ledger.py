"""The ledger keeps a batch whole or not at all, and names what was damaged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editcore import (
    Attachment,
    DenseDelta,
    EditRequest,
    FactoredDelta,
    KnownTarget,
    RunError,
    StorageError,
    VectorDelta,
    Written,
)
from editcore._util.files import remove_leftovers, replacing
from editcore.interfaces.history import LedgerEntry
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import HeaderLine
from editcore.ledger.states import LeftOut

HEADER = HeaderLine(model="tiny", fingerprint="f" * 64, editor="toy")
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def entry(batch: int, *, ids: tuple[str, ...] = ("a", "b")) -> LedgerEntry:
    """A batch of two facts, the second one replayed, with numbers that depend on ``batch``."""
    generator = torch.Generator().manual_seed(batch)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    requests = tuple(EditRequest(subject=f"S{i}", prompt="{} is in", target_new="Rome", id=i) for i in ids)
    return LedgerEntry(
        batch=batch,
        requests=requests,
        weights=(1.0, 0.5),
        num_new=1,
        changes={WEIGHT: FactoredDelta(random(4, 2), random(2, 6))},
        known={r.id: KnownTarget(keys={WEIGHT: random(6)}, values={WEIGHT: random(4)}) for r in requests},
        diagnostics={"layer_1_condition": 1.5},
        scale=0.25,
    )


def assert_same(found: LedgerEntry, expected: LedgerEntry) -> None:
    """Equal, the tensors to the bit."""
    for name in ("batch", "requests", "weights", "num_new", "diagnostics", "scale"):
        assert getattr(found, name) == getattr(expected, name), name
    assert list(found.changes) == list(expected.changes)
    for address, change in expected.changes.items():
        assert found.changes[address].kind == change.kind
        assert_equal_tensors(found.changes[address].tensors(), change.tensors())
    assert_equal_tensors(found.memory, expected.memory)
    assert (found.attachment is None) == (expected.attachment is None)
    if found.attachment is not None and expected.attachment is not None:
        assert found.attachment.kind == expected.attachment.kind
        assert dict(found.attachment.fields) == dict(expected.attachment.fields)
        assert_equal_tensors(found.attachment.tensors, expected.attachment.tensors)
    assert list(found.known) == list(expected.known)
    for identity, known in expected.known.items():
        for kind in ("keys", "values"):
            assert_equal_tensors(getattr(found.known[identity], kind), getattr(known, kind))


def assert_equal_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory with batches 0, 1 and 3; batch 2 was rejected."""
    ledger = Ledger(tmp_path, HEADER)
    for batch in (0, 1, 3):
        ledger.append(entry(batch))
    return tmp_path


def names(directory: Path) -> list[str]:
    """Every file, hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_what_was_written_is_read(written: Path) -> None:
    ledger = Ledger.read(written)
    assert [found.batch for found in ledger.entries] == [0, 1, 3]
    for found in ledger.entries:
        assert_same(found, entry(found.batch))
    files = ["batch-00000.safetensors", "batch-00001.safetensors", "batch-00003.safetensors"]
    assert names(written) == [*(f"deltas/{name}" for name in files), "ledger.jsonl"]
    record = json.loads((written / "ledger.jsonl").read_text().splitlines()[3].partition(" ")[2])
    assert (record["batch"], record["file"]["name"], record["num_new"], record["scale"]) == (3, files[2], 1, 0.25)


def test_a_ledger_in_memory_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger()
    ledger.append(entry(0))
    assert (len(ledger.active()), names(tmp_path)) == (1, [])


def test_a_directory_without_a_ledger_has_an_empty_one(tmp_path: Path) -> None:
    assert Ledger.open(tmp_path / "new", HEADER).entries == []
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match=r"is not a run directory: ledger\.jsonl cannot be read"):
        Ledger.read(tmp_path / "new")


def test_batch_numbers_increase(written: Path) -> None:
    with pytest.raises(ValueError, match="batch 3 cannot follow batch 3"):
        Ledger.read(written).append(entry(3))


def test_ids_may_have_slashes(tmp_path: Path) -> None:
    odd = entry(0, ids=("a", "a/b"))
    Ledger(tmp_path, HEADER).append(odd)
    assert_same(Ledger.read(tmp_path).entries[0], odd)


def test_facts_may_share_a_tensor(tmp_path: Path) -> None:
    key, value = torch.ones(6), torch.ones(4)
    known = KnownTarget(keys={WEIGHT: key}, values={WEIGHT: value})
    plain = entry(0)
    shared = LedgerEntry(
        batch=0, requests=plain.requests, weights=plain.weights, num_new=1, changes=plain.changes,
        known={"a": known, "b": known}, diagnostics={},
    )  # fmt: skip
    Ledger(tmp_path, HEADER).append(shared)
    assert_same(Ledger.read(tmp_path).entries[0], shared)


def with_everything() -> LedgerEntry:
    """A batch with all that a proposal may hold."""
    made = entry(0)
    kinds = {
        "a.weight": DenseDelta(torch.arange(12.0).reshape(3, 4).T),  # not contiguous
        "b.bias": VectorDelta(torch.linspace(0, 1, 5, dtype=torch.float64)),
        "c.scale": VectorDelta(torch.tensor(0.1)),
        "d.experts[17]": FactoredDelta(torch.ones(3, 1), torch.full((1, 2), 0.3)),
    }
    beside = Attachment(
        kind="notes", tensors={"ids": torch.tensor([3, 4]), "keys/0": torch.ones(2, 3)}, fields={"texts": ["a", "ß"]}
    )
    memory = {"count": torch.tensor(7), "sum/of/keys": torch.eye(2, dtype=torch.float64)}
    return replace(made, changes={**kinds, **made.changes}, attachment=beside, memory=memory)


def test_every_kind_of_change_attachments_and_memory_come_back(tmp_path: Path) -> None:
    made = with_everything()
    Ledger(tmp_path, HEADER).append(made)
    read = Ledger.read(tmp_path)
    assert_same(read.entries[0], made)
    assert_same(replace(made, changes=read.active()[0].changes, memory=read.active()[0].memory), made)


def test_a_revision_may_hold_all_of_it(tmp_path: Path) -> None:
    made = replace(with_everything(), num_new=2)
    rest = Written(
        changes={"b.bias": VectorDelta(torch.ones(5))},
        attachment=Attachment(kind="notes", fields={"texts": []}),
        memory={"count": torch.tensor(1)},
    )
    ledger = Ledger(tmp_path, HEADER)
    ledger.append(made)
    ledger.revise(0, LeftOut(frozenset({(0, "a")})), rest)
    ledger.mark("undo", [(0, "a")])
    expected = [ledger.history()[0], *Ledger.read(tmp_path).history()]
    for found in expected:
        assert [request.id for request in found.requests] == ["b"]
        assert_same(replace(found, known={}), replace(expected[0], known={}))
        assert_equal_tensors(found.memory, rest.memory)
        assert found.attachment is not None
        assert (found.attachment.kind, found.attachment.fields) == ("notes", {"texts": []})


def test_a_batch_may_be_all_beside_the_weights(tmp_path: Path) -> None:
    """Without a tensor there is no file."""
    made = replace(entry(0), changes={}, known={}, attachment=Attachment(kind="notes", fields={"texts": ["a"]}))
    Ledger(tmp_path, HEADER).append(made)
    assert names(tmp_path) == ["ledger.jsonl"]
    assert_same(Ledger.read(tmp_path).entries[0], made)


@pytest.mark.parametrize("lost", [1, 40, 10_000])
def test_a_torn_last_line_is_left_out_and_written_over(written: Path, lost: int) -> None:
    path = written / "ledger.jsonl"
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: max(last, len(content) - lost)])
    ledger = Ledger.read(written)
    assert [found.batch for found in ledger.entries] == [0, 1]
    ledger.append(entry(4))
    assert [found.batch for found in Ledger.read(written).entries] == [0, 1, 4]


def test_a_flipped_bit_in_a_line_is_named(written: Path) -> None:
    path = written / "ledger.jsonl"
    content = path.read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for place in range(0, len(content), 23):
        for bit in (0, 1, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            line = 1 + sum(end < place for end in ends)
            with pytest.raises(RunError, match=rf"ledger\.jsonl, line {line}: "):
                Ledger.read(written)
    for line, place in enumerate(ends, start=1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=rf"ledger\.jsonl, line {line}: "):
            Ledger.read(written)


@pytest.mark.parametrize("place", [0, 9, 60, -1])
def test_a_flipped_bit_in_a_tensor_file_is_named(written: Path, place: int) -> None:
    path = written / "deltas" / "batch-00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(RunError, match=r"line 3: .*batch-00001\.safetensors is not the file that was written"):
        Ledger.read(written).entries[1].changes[WEIGHT]


def test_a_missing_tensor_file_is_named(written: Path) -> None:
    (written / "deltas" / "batch-00003.safetensors").unlink()
    with pytest.raises(RunError, match=r"line 4: .*batch-00003\.safetensors cannot be read \(No such file"):
        Ledger.read(written).active()[2].changes[WEIGHT]


def test_tensors_are_on_the_disk_before_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").resolve().name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    Ledger(tmp_path, HEADER).append(entry(0))
    tensors, folder, line, root = synced
    assert tensors.startswith(".batch-00000.safetensors.")
    assert (folder, line, root) == ("deltas", "ledger.jsonl", tmp_path.name)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_ledger_as_it_was(written: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """At the tensors, at their folder, at the line, at the run's folder."""
    ledger = Ledger.read(written)
    before = (written / "ledger.jsonl").read_bytes()
    calls = 0

    def full(_handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"Cannot write .*: No space left on device\."):
            ledger.append(entry(4))
    assert len(ledger.entries) == 3
    assert (written / "ledger.jsonl").read_bytes() == before
    assert [path for path in names(written) if "/." in path] == []
    if call > 2:
        assert not (written / "deltas" / "batch-00004.safetensors").exists()
    ledger.append(entry(4))  # once there is room
    assert [found.batch for found in Ledger.read(written).entries] == [0, 1, 3, 4]


def test_a_line_that_is_written_by_halves_is_taken_back(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real limit on the file's size: the system takes a part of the line, then refuses."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    ledger = Ledger.read(written)
    path = written / "ledger.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr("editcore.ledger.file.write_tensors", lambda path, *_: path.write_bytes(b""))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(StorageError, match=r"ledger\.jsonl: File too large\. The ledger is as it was\."):
            ledger.append(entry(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before


def test_another_process_that_writes_is_noticed(written: Path) -> None:
    ours, theirs = Ledger.read(written), Ledger.read(written)
    theirs.append(entry(4))
    kept = names(written)
    with pytest.raises(RunError, match=r"ledger\.jsonl was changed by another process\."):
        ours.append(entry(4))
    assert names(written) == kept
    assert_same(Ledger.read(written).entries[-1], entry(4))
    (written / "ledger.jsonl").unlink()
    with pytest.raises(RunError, match="was changed by another process"):
        theirs.append(entry(5))
    with pytest.raises(RunError, match="was changed by another process"):
        Ledger(written_again(written), HEADER).append(entry(0))


def written_again(directory: Path) -> Path:
    """A ledger that was not read before it is written to."""
    Ledger(directory, HEADER).append(entry(0))
    return directory


def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    """Temporary files of ours and of safetensors, which writes through one of its own; nothing else."""
    left = [".summary.json.k2_x9abc.json", ".batch-00001.safetensors.abcdefgh.safetensors", ".tmp81iT0v"]
    kept = ["summary.json", ".hidden", ".tmp", "batch-00001.safetensors", "tmp81iT0v"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    with replacing(tmp_path / "table.csv") as temporary:
        name = temporary.name
    (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert not (tmp_path / name).exists(), "the names that replacing takes are those that are removed"
