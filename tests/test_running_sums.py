"""The file of running sums: a model has the same bits with it and without it, and it is never trusted blindly."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from editcore import DenseDelta, EditBatch, EditRequest, FactoredDelta, KnownTarget, Plugins, VectorDelta, Written
from editcore._util.files import remove_leftovers
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.values import HeldKey
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import HeaderLine
from editcore.ledger.states import LeftOut
from editcore.ledger.undo import change
from editcore.models.edited import EditedModel
from editcore.runs import running_sums
from editcore.runs.backends import RawBackend, rebuild
from editcore.runs.running_sums import SUMS_NAME, keep_sums
from editcore.testing import tiny_model
from hypothesis import HealthCheck, given, settings, strategies as st

MODEL = tiny_model(dtype=torch.bfloat16)
MATRICES = [MODEL.layout.weight_name(layer) for layer in (0, 1)]
VECTOR = "model.norm.weight"
HEADER = HeaderLine(model="tiny", fingerprint=MODEL.base_fingerprint, editor="toy")
PLUGINS = Plugins.load()


def written(seed: int) -> Written:
    """What a batch writes: thin changes of one or both matrices, sometimes a whole matrix or a vector."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=draw, dtype=torch.float64)

    changes: dict[str, Any] = {}
    for number, name in enumerate(MATRICES):
        d_out, d_in = MODEL.as_out_in(name, MODEL.weight(name)).shape
        if seed % 7 == 6:
            changes[name] = DenseDelta(random(d_out, d_in))
        elif number == 0 or seed % 3:
            changes[name] = FactoredDelta(random(d_out, 2), random(2, d_in))
    if seed % 5 == 4:
        changes[VECTOR] = VectorDelta(random(*MODEL.weight(VECTOR).shape))
    return Written(changes=changes)


def entry(batch: int, held: tuple[HeldKey, ...] = ()) -> LedgerEntry:
    requests = tuple(
        EditRequest(subject=f"S{batch}", prompt="{} is in", target_new="Rome", id=f"{batch}{i}") for i in "ab"
    )
    draw = torch.Generator().manual_seed(batch)
    keys = {name: torch.randn(64, generator=draw, dtype=torch.float64) for name in MATRICES}
    return LedgerEntry(
        batch=batch,
        requests=requests,
        weights=(1.0, 1.0),
        num_new=2,
        changes=written(batch).changes,
        known={request.id: KnownTarget(keys=keys, values={}) for request in requests},
        held=held,
    )


def opened(ledger: Ledger) -> EditedModel:
    """The model of a ledger, as a new process opens it."""
    backend = RawBackend()
    backend.open(MODEL)
    edited = EditedModel(MODEL, backend, spec=PLUGINS.backend("raw"), plugins=PLUGINS)
    rebuild(edited, ledger)
    return edited


def bits(edited: EditedModel) -> list[torch.Tensor]:
    found = [MODEL.weight(name).detach().clone() for name in (*MATRICES, VECTOR)]
    edited.rebuild([])
    return found


def bits_of_all(directory: Path) -> list[torch.Tensor]:
    """Every batch read and added, without the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("editcore.runs.backends.use_sums", lambda *_: None)
        return bits(opened(Ledger.read(directory)))


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def random_solution(entry: LedgerEntry, out: LeftOut) -> tuple[Written, EditBatch | None]:
    return written(1000 + 10 * entry.batch + len(out.edits) + len(out.never)), None


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_sums, "_EVERY", 2)


@pytest.fixture(autouse=True)
def _unedited() -> Iterator[None]:
    before = MODEL.fingerprint()
    yield
    assert MODEL.fingerprint() == before


STEPS = ["edit", "edit", "edit", "undo", "never", "redo", "keep", "keep", "killed", "cut"]
steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99)), max_size=14)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_the_same_bits_with_the_file_and_without_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("run")
    path = directory / SUMS_NAME
    Ledger(directory, HEADER).append(entry(0))
    for what, number in steps:
        ledger = Ledger.read(directory)
        edits = [(e.batch, name) for e in ledger.entries for name in e.new_ids]
        chosen = edits[number % len(edits)]
        undone = chosen[1] in ledger.undone(chosen[0])
        if what == "edit":
            ledger.append(entry(len(ledger.batches)))
        elif what in ("undo", "never") and not undone:
            change(ledger, "undo", [chosen], solve=random_solution, as_if_never=what == "never")
        elif what == "redo" and undone:
            change(ledger, "redo", [chosen], solve=random_solution)
        elif what == "keep":
            edited = opened(ledger)
            keep_sums(edited, ledger)
            edited.rebuild([])
        elif what == "killed":  # while it wrote the file
            (directory / f".{SUMS_NAME}.abcdefgh.safetensors").write_bytes(b"\0" * number)
        elif what == "cut" and path.exists():
            os.truncate(path, path.stat().st_size * number // 100)
        assert same(bits(opened(Ledger.read(directory))), bits_of_all(directory))
    shutil.rmtree(directory)


def ledger_of(directory: Path, batches: int) -> Ledger:
    ledger = Ledger(directory, HEADER)
    for batch in range(batches):
        ledger.append(entry(batch))
    return Ledger.read(directory)


def kept(directory: Path, batches: int = 6) -> Path:
    """A directory whose file has all its batches."""
    ledger = ledger_of(directory, batches)
    edited = opened(ledger)
    keep_sums(edited, ledger)
    edited.rebuild([])
    return directory / SUMS_NAME


def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    load = safetensors.torch.load
    monkeypatch.setattr(safetensors.torch, "load", lambda raw: (read.append("file"), load(raw))[1])
    return read


def test_only_the_batches_that_the_file_lacks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path, 4)
    Ledger.read(tmp_path).append(entry(4))  # the first that changes the vector
    read = files_read(monkeypatch)
    edited = opened(Ledger.read(tmp_path))
    assert len(read) == 1
    with edited.unedited():
        pass
    assert len(read) == 1  # sums are kept while the model is unedited for a moment
    found = bits(edited)
    assert same(found, bits_of_all(tmp_path))


def test_it_is_written_once_for_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_sums, "_EVERY", 4)
    times: list[bytes] = []
    ledger = ledger_of(tmp_path, 1)
    edited = opened(ledger)
    for batch in range(1, 12):
        new = ledger.append(entry(batch))
        edited.apply(new.written)
        keep_sums(edited, ledger)
        path = tmp_path / SUMS_NAME
        if path.exists() and path.read_bytes() not in times:
            times.append(path.read_bytes())
    edited.rebuild([])
    assert len(times) == 3  # with 4, 8 and 12 batches


def test_a_backend_that_does_not_keep_all_sums_writes_no_file(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, 4)
    backend = RawBackend()
    backend.open(MODEL)
    backend._max_sum_bytes = 8 * MODEL.weight(MATRICES[0]).numel()  # one matrix
    edited = EditedModel(MODEL, backend, spec=PLUGINS.backend("raw"), plugins=PLUGINS)
    rebuild(edited, ledger)
    keep_sums(edited, ledger)
    assert not (tmp_path / SUMS_NAME).exists()
    assert same(bits(edited), bits_of_all(tmp_path))


@pytest.mark.parametrize("spoilt", ["other ledger", "a bit", "other base", "other torch"])
def test_a_file_that_does_not_fit_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoilt: str
) -> None:
    path = kept(tmp_path / "run")
    if spoilt == "other ledger":
        other_ledger = Ledger(tmp_path / "other", HEADER)
        for batch in (0, 1, 2, 3, 5, 4):
            other_ledger.append(LedgerEntry(**{**_fields(entry(batch)), "batch": len(other_ledger.batches)}))
        edited = opened(other_ledger)
        keep_sums(edited, other_ledger)
        edited.rebuild([])
        shutil.copy(tmp_path / "other" / SUMS_NAME, path)
    elif spoilt == "a bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif spoilt == "other base":
        monkeypatch.setattr(MODEL, "_base_fingerprint", "0" * 64)
    else:
        monkeypatch.setattr(torch, "__version__", "9.9")
    read = files_read(monkeypatch)
    found = bits(opened(Ledger.read(tmp_path / "run")))
    assert len(read) == 6
    assert same(found, bits_of_all(tmp_path / "run"))
    assert ("was changed or damaged" in caplog.text) == (spoilt == "a bit")


def _fields(entry: LedgerEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in LedgerEntry.__dataclass_fields__}


def test_a_full_disk_costs_the_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = kept(tmp_path, 3)
    before = path.read_bytes()
    ledger = Ledger.read(tmp_path)
    for batch in (3, 4):
        ledger.append(entry(batch))
    edited = opened(ledger)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        keep_sums(edited, ledger)
    edited.rebuild([])
    assert "No space left on device. The edits are kept" in caplog.text
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / name for name in ("deltas", "ledger.jsonl", SUMS_NAME))
    assert same(bits(opened(Ledger.read(tmp_path))), bits_of_all(tmp_path))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".{SUMS_NAME}.abcdefgh.safetensors"
    left.write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert not left.exists()


def test_undo_of_the_last_batch_and_redo_use_the_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path)
    read = files_read(monkeypatch)
    for kind, expected in (("undo", 5), ("redo", 0)):
        ledger = Ledger.read(tmp_path)
        change(ledger, kind, [(5, "5a"), (5, "5b")], solve=random_solution)  # type: ignore[arg-type]
        read.clear()
        bits(opened(Ledger.read(tmp_path)))
        assert len(read) == expected


# Memory


def test_of_the_tensors_that_were_looked_at_only_the_last_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of(tmp_path, 20)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "deltas").iterdir())]
    monkeypatch.setattr("editcore.ledger.reading._MAX_BYTES", sum(sizes[-3:]))
    made: list[weakref.ref[torch.Tensor]] = []
    load = safetensors.torch.load

    def watched(raw: bytes) -> dict[str, torch.Tensor]:
        found = load(raw)
        made.append(weakref.ref(found[f"key/0/{MATRICES[0]}"]))
        return found

    monkeypatch.setattr(safetensors.torch, "load", watched)
    for ledger_entry in ledger.entries:
        for target in ledger_entry.known.values():
            assert len(target.keys[MATRICES[0]]) == 64
        assert ledger_entry.changes[MATRICES[0]].is_finite()
    assert len(made) == 20
    assert [number for number, tensor in enumerate(made) if tensor() is not None] == [17, 18, 19]


# Held keys


def held_of(ledger: Ledger, batches: Callable[[int], range], batch: int) -> tuple[HeldKey, ...]:
    keys = [
        HeldKey(batch=b, request_id=f"{b}a", keys=ledger.batch(b).known[f"{b}a"].keys, weight=0.5)
        for b in batches(batch)
    ]
    return HeldKey.ordered(keys)


def test_held_keys_are_kept_as_differences_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editcore.ledger.held._MAX_CHAIN", 5)
    ledger = Ledger(tmp_path, HEADER)
    wanted = []
    for batch in range(14):
        held = held_of(ledger, lambda b: range(max(0, b - 8), b), batch)
        wanted.append([(key.batch, key.request_id, key.weight) for key in held])
        ledger.append(entry(batch, held))
    read = Ledger.read(tmp_path)
    for each_ledger in (ledger, read):
        assert [[(k.batch, k.request_id, k.weight) for k in e.held] for e in each_ledger.entries] == wanted
    files = files_read(monkeypatch)
    monkeypatch.setattr("editcore.ledger.reading._MAX_BYTES", 1)
    for batch in (12, 13, 13):
        for key in read.batch(batch).held:
            assert set(key.keys) == set(MATRICES)
    assert len(files) == 9  # eight for one batch, and one more for the next
    key = read.batch(13).held[0]
    assert torch.equal(key.keys[MATRICES[0]], read.batch(key.batch).known[key.request_id].keys[MATRICES[0]])
    lines = [line for line, _ in Ledger(tmp_path).lines()]
    whole = [line.batch for line in lines[1:] if line.held is not None and line.held.like is None]  # type: ignore[union-attr]
    assert whole[0] == 1
    assert len(whole) in range(3, 6)
