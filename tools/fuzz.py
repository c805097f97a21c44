"""Feed damaged and odd files to every reader: python tools/fuzz.py [--inputs N] [--target NAME] [--seconds S]

A reader may accept a file or refuse it with an error of ours; any other exception is a bug and is shown with the input
that caused it. Inputs are good files, changed: bytes flipped, cut and doubled, JSON values replaced by others, and
checksums made to fit again, so that what stands behind them is reached. Where atheris is installed, ``--seconds S``
lets it look for inputs by coverage instead.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore import (
    Attachment,
    Changes,
    DenseDelta,
    EditcoreError,
    EditEvidence,
    FactoredDelta,
    KnownTarget,
    Observation,
    Plugins,
    VectorDelta,
    Verdict,
    Written,
)
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

if TYPE_CHECKING:
    from editcore.evaluation import Measure

__all__ = ["TARGETS", "Target", "fuzz", "main"]


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    seeds: Callable[[Path], Sequence[bytes]]
    """Good ones; a folder to make them in is given."""
    read: Callable[[Path, bytes], object]
    """Reads one, in a folder of its own, as the product does."""
    fit: Callable[[bytes], bytes] = bytes
    """Makes checksums fit the content again."""


def fuzz(target: Target, folder: Path, inputs: int, *, seed: int | None = None) -> None:
    """Read ``inputs`` changed files; an exception that is not ours comes out with the input in its notes."""
    seeds = list(target.seeds(folder))

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(which=st.sampled_from(seeds), number=st.integers(0, 2**64), refit=st.booleans())
    def run(which: bytes, number: int, refit: bool) -> None:
        content = _mutated(which, random.Random(f"{seed}:{number}"))
        _read(target, folder, target.fit(content) if refit else content)

    run()


def _read(target: Target, folder: Path, content: bytes) -> None:
    try:
        target.read(folder, content)
    except EditcoreError as error:
        if not str(error).strip():
            raise AssertionError("an error without a sentence") from error
    except Exception as error:
        error.add_note(f"input: {content[:2000]!r}")
        raise


# Changes

_ODD: tuple[object, ...] = (
    None, True, 0, -1, 1, 2**70, 1e308, -0.5, "", "a", "{}", "Infinity", "NaN", "../../x", "\u0000", "\udc80",
    "é" * 300, [], [[]], {}, {"a": {}}, [None], "0" * 64, "batch-00000.safetensors",
)  # fmt: skip


def _mutated(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        content = rng.choice((_flip, _cut, _double, _insert, _swap_value, _swap_value, _swap_value))(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    return content[:start] + content[min(len(content), start + rng.choice((1, 8, 64, 10**9))) :]


def _double(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    return content[:start] + content[max(0, start - rng.choice((1, 9, 200))) :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    pieces = (
        b"\n",
        b"\x00",
        b"\xff\xfe",
        b"[" * 3000,
        b'"',
        b"{}",
        b"1e999",
        b"9" * 5000,
        b"&a *a",
        b"'''",
        rng.randbytes(8),
    )
    return content[:start] + rng.choice(pieces) + content[start:]


def _swap_value(content: bytes, rng: random.Random) -> bytes:
    """Replace something inside the JSON of one line by something else."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    prefix, brace, rest = lines[at].partition(b"{")
    with contextlib.suppress(ValueError, RecursionError, UnicodeDecodeError):
        value = json.loads(brace + rest)
        _replace_somewhere(value, rng)
        lines[at] = prefix + json.dumps(value).encode()
    return b"\n".join(lines)


def _replace_somewhere(value: Any, rng: random.Random) -> None:
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.3:
            if isinstance(value, dict) and rng.random() < 0.2:
                del value[key]
            else:
                value[key] = rng.choice(_ODD)
            return
        value = value[key]


# Files


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _records(folder: Path) -> list[bytes]:
    from editcore.testing import tiny_requests

    plain = [request.model_dump(mode="json", exclude={"tags"}) for request in tiny_requests(3)]
    counterfact = {
        "case_id": 1,
        "requested_rewrite": {
            "subject": "Rome", "prompt": "{} is in", "target_new": {"str": "France"}, "target_true": {"str": "Italy"},
            "relation_id": "P1",
        },
        "paraphrase_prompts": ["Rome lies in"],
        "neighborhood_prompts": ["Milan is in"],
    }  # fmt: skip
    zsre = {
        "subject": "Rome",
        "src": "Where is Rome?",
        "alt": "France",
        "answers": ["Italy"],
        "rephrase": "Rome is where?",
    }
    chain = {"case_id": 2, "requested_rewrite": [counterfact["requested_rewrite"]]}
    lines = "".join(f"{json.dumps(record)}\n" for record in (*plain, counterfact, zsre, chain)).encode()
    table = b'subject,prompt,target_new\nRome,{} is in,France\n"a\nb",{} x,y\n'
    return [b"jsonl:" + lines, b"json:" + json.dumps([*plain, counterfact]).encode(), b"csv:" + table]


def _read_records(folder: Path, content: bytes) -> None:
    from editcore.datasets import load_records

    kind, _, rest = content.partition(b":")
    suffix = {b"json": "json", b"csv": "csv"}.get(kind, "jsonl")
    load_records(_written(folder, f"facts.{suffix}", rest), plugins=_plugins())
    if len(content) % 7 == 0:
        load_records(_written(folder, f"facts.{suffix}.gz", gzip.compress(rest)[: len(rest)]), plugins=_plugins())


def _ledger(folder: Path) -> list[bytes]:
    """A ledger with everything that can be in one; its tensor files stay in the folder."""
    import torch
    from editcore.interfaces.history import LedgerEntry
    from editcore.ledger.ledger import Ledger
    from editcore.ledger.lines import HeaderLine
    from editcore.ledger.states import LeftOut
    from editcore.testing import tiny_requests

    facts = tiny_requests(4)
    thin = FactoredDelta(torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64))
    changes: Changes = {"w": thin, "stack[1]": DenseDelta(torch.ones(2, 2)), "bias": VectorDelta(torch.ones(3))}
    beside = Attachment(kind="memory", tensors={"codes": torch.ones(2, 3)}, fields={"radius": 1.5, "texts": ["a"]})
    known = KnownTarget(keys={"w": torch.ones(5)}, values={"w": torch.ones(3)})
    ledger = Ledger(folder, HeaderLine(model="tiny", fingerprint="0" * 64, editor="toy"))
    for index in range(2):
        requests = facts[2 * index : 2 * index + 2]
        ledger.append(
            LedgerEntry(
                batch=index,
                requests=requests,
                weights=(1.0, 1.0),
                num_new=2,
                changes=changes,
                attachment=beside,
                known={request.id: known for request in requests},
                memory={"count": torch.ones(())},
                diagnostics={"condition": float("inf")},
                evidence=tuple(EditEvidence(request_id=request.id, figures={"steps": 3.0}) for request in requests),
                verdicts={"gate": Verdict(action="accept", reason="fine", figures={"a": 1.0})},
            )
        )
    ledger.append(LedgerEntry(batch=2, requests=(), weights=(), num_new=0, scale=0))
    rest = {**changes, "w": FactoredDelta(thin.left[:, :1], thin.right[:1])}
    ledger.revise(0, LeftOut(frozenset({(0, facts[0].id)})), Written(changes=rest, attachment=beside))
    ledger.mark("undo", [(0, facts[0].id)])
    ledger.mark("redo", [(0, facts[0].id)])
    return [(folder / "ledger.jsonl").read_bytes()]


def _read_ledger(folder: Path, content: bytes) -> None:
    from editcore.ledger.ledger import Ledger
    from editcore.ledger.verify import verify

    _written(folder, "ledger.jsonl", content)
    verify(folder)
    ledger = Ledger.read(folder)
    ledger.facts()
    for entry in ledger.history():
        list(entry.changes.items())
        list(entry.known.items())
        list(entry.memory.items())
        if entry.attachment is not None:
            list(entry.attachment.tensors.items())


def _fit_lines(content: bytes) -> bytes:
    def fit(line: bytes) -> bytes:
        body = line.partition(b" ")[2]
        return hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body if body else line

    return b"\n".join(map(fit, content.split(b"\n")))


def _tensor_files(folder: Path) -> list[bytes]:
    _ledger(folder)
    return [(folder / "deltas" / "batch-00000.safetensors").read_bytes()]


def _read_tensor_file(folder: Path, content: bytes) -> None:
    """With a line that says that the file is as it was written."""
    path = folder / "ledger.jsonl"
    lines = path.read_bytes().split(b"\n")
    record = json.loads(lines[1].partition(b" ")[2])
    record["file"] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    lines[1] = b"x " + json.dumps(record).encode()
    (folder / "deltas" / "batch-00000.safetensors").write_bytes(content)
    _read_ledger(folder, _fit_lines(b"\n".join(lines)))


def _packs(folder: Path) -> list[bytes]:
    path = folder / "good.editpack"
    path.write_bytes(b"")
    for manifest in _manifests(folder):
        _write_pack(path, manifest.decode())
    return [path.read_bytes()]


def _read_pack(folder: Path, content: bytes) -> None:
    from editcore.runs.pack import read_pack

    _ = read_pack(_written(folder, "some.editpack", content)).requests


def _manifests(folder: Path) -> list[bytes]:
    from editcore.ledger.entries import batch_line
    from editcore.ledger.ledger import Ledger
    from editcore.runs.pack_file import Manifest

    _ledger(folder)
    manifest = Manifest(
        model="tiny",
        fingerprint="0" * 64,
        dtype="float32",
        chat_template=False,
        editor="toy",
        settings={"toy": {"layers": [1]}},
        versions={"editcore": "1"},
        batches=tuple(batch_line(entry, None) for entry in Ledger.read(folder).history()),
    )
    return [manifest.model_dump_json().encode()]


def _read_manifest(folder: Path, content: bytes) -> None:
    """In a pack whose hash fits."""
    from editcore.runs.pack import read_pack

    path = folder / "some.editpack"
    _write_pack(path, content.decode("utf-8", errors="replace"))
    _ = read_pack(path).requests


def _write_pack(path: Path, manifest: str) -> None:
    import torch
    from editcore._util.files import tensors_hash, write_tensors
    from editcore.runs.pack_file import HASH, MANIFEST

    axes_of = {"left/w": 2, "right/w": 2, "dense/stack[1]": 2, "vector/bias": 1, "attachment/codes": 2}  # axes of each
    tensors = {f"{batch}/{name}": torch.ones((2,) * axes) for batch in (0, 1) for name, axes in axes_of.items()}
    write_tensors(path, tensors, {MANIFEST: manifest, HASH: tensors_hash(manifest, tensors)})


def _configs(folder: Path) -> list[bytes]:
    return [
        b'editor = "emmet"\nplugins = ["replay"]\nedits = 100\nbatch-size = 20\n\n[emmet]\nlayers = [3]\n'
        b'clamp_norm_factor = 2.0\nmom2_update_weight = "auto"\n\n[replay]\nreplay_rate = 1.0\n',
        b'editor = "memit"\n[memit]\nlayers = [1, 2]\nv_lr = 1e-1\nfact_token = "subject_last"\n',
    ]


def _read_configuration(folder: Path, content: bytes) -> None:
    """As ``--config`` reads it, and as a preset is read."""
    from editcore.cli.run import _config
    from editcore.plugins.calls import resolve
    from editcore.settings.hparams import build
    from editcore.settings.toml import read_toml, run_values

    values = run_values(read_toml(_written(folder, "run.toml", content)))
    config = _config(values, ["v_lr=0.5"], _plugins(), None, resume=False)
    owners: Mapping[str, Any] = {**_plugins().editors(), **_plugins().extensions()}
    for name, given_values in config.settings.items():
        if name in owners:
            build(resolve(owners[name].hparams), [given_values], owner=name)


def _hparams(folder: Path) -> list[bytes]:
    return [
        b'json:{"alg_name": "EMMET", "layers": [3], "v_lr": 5e-1, "mom2_dataset": "wikipedia", "fact_token": '
        b'"subject_last", "context_template_length_params": [[5, 10], [10, 10]], "model_name": "x"}',
        b"yaml:alg_name: MEMIT\nlayers: [3, 4]\nv_lr: 5e-1\nclamp_norm_factor: 4\nlayer_module_tmp: transformer.h.{}\n",
        b'yaml:alg_name: "ROME"\nlayers:\n  - 5\nv_loss_layer: 11\nenable_prompt_keys: true\nkl_factor: 0.0625\n',
    ]


def _read_hparams(folder: Path, content: bytes) -> None:
    from editcore.settings.reference import import_file

    kind, _, rest = content.partition(b":")
    import_file(_written(folder, "hparams.json" if kind == b"json" else "hparams.yaml", rest), _plugins()).toml()


def _run_files(folder: Path) -> list[bytes]:
    record = {
        "config": {"editor": "emmet"}, "settings": {"emmet": {"layers": [1]}}, "provenance": {},
        "model": {"name": "a", "folder": None, "fingerprint": "0"}, "versions": {"editcore": "1"}, "notes": [],
    }  # fmt: skip
    text = {"source": "self:ancestral:1", "tokens": 2, "window": 256, "perplexity": 5.5, "ids": [1, 2]}
    lock = {"pid": 1, "host": "a", "started": 1, "since": "b", "token": "c"}
    figures = {"a": 1, "b": None}
    log = {
        "batch": 0, "applied": True, "reason": "",
        "verdicts": {"gate": {"action": "accept", "reason": "", "scale": 1.0, "figures": figures}},
        "rejected": [{"id": "1", "prompt": "a", "target_new": "b", "by": "c", "reason": "d", "figures": figures}],
        "new": 1, "replayed": 0, "seconds": 1.0, "stages": {}, "notes": [], "diagnostics": figures,
        "evidence": [{"request_id": "0", "replayed": False, "figures": figures}],
    }  # fmt: skip
    _written(folder, "before.parquet", _before_tables(folder)[0])
    return [json.dumps(document).encode() for document in (record, {"said": ["a"], "text": text}, lock, log)]


def _read_run_files(folder: Path, content: bytes) -> None:
    from editcore._util.lock import LOCK_NAME, _Holder
    from editcore.ledger.ledger import Ledger
    from editcore.runs.log import BatchLog
    from editcore.runs.record import RunRecord, read_requests

    for name in ("run.json", "before.json", LOCK_NAME, "batches.jsonl", "requests.jsonl"):
        _written(folder, name, content)
    for read in (RunRecord.read, _read_before, read_requests, lambda run: _Holder.read(run / LOCK_NAME)):
        with contextlib.suppress(EditcoreError):
            read(folder)
    BatchLog(folder, Ledger())


def _before_tables(folder: Path) -> list[bytes]:
    """What was observed of the unedited model, with everything that an observation can have."""
    from editcore.evaluation import Measurement

    told = {"request_id": "1", "prompt": "Rome is in"}
    scores = [Observation(metric=name, value=0.5, **told) for name in ("ES", "EM", "rewrite_nll_new")]
    said = Observation(metric="facts_said", value=1.0, text=" France", **told)
    frame = Measurement(measures=_measures(), observations={"counterfact": scores, "generation": [said]}).frame({})
    path = folder / "good.parquet"
    frame.to_parquet(path, index=False)
    return [path.read_bytes()]


def _read_before_table(folder: Path, content: bytes) -> None:
    _written(folder, "before.json", b'{"said": ["a"], "text": null}')
    _written(folder, "before.parquet", content)
    _read_before(folder)


def _read_before(folder: Path) -> object:
    """What a resumed run takes from them."""
    from editcore.runs.before import UneditedMeasurement

    before = UneditedMeasurement.read(folder, _measures())
    return None if before is None else before.measured.summary.values()


def _measures() -> tuple[Measure, ...]:
    from editcore.evaluation import COUNTERFACT, GENERATION, measures_of

    return measures_of([COUNTERFACT, GENERATION])


@cache
def _plugins() -> Plugins:
    return Plugins.load()


TARGETS: Mapping[str, Target] = {
    "requests": Target(_records, _read_records),
    "ledgers": Target(_ledger, _read_ledger, _fit_lines),
    "tensors": Target(_tensor_files, _read_tensor_file),
    "packs": Target(_packs, _read_pack),
    "manifests": Target(_manifests, _read_manifest),
    "configs": Target(_configs, _read_configuration),
    "hparams": Target(_hparams, _read_hparams),
    "runs": Target(_run_files, _read_run_files),
    "tables": Target(_before_tables, _read_before_table),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if nothing but errors of ours came up."""
    parser = argparse.ArgumentParser(prog="fuzz.py", description="Feed damaged and odd files to every reader.")
    parser.add_argument("--inputs", type=int, default=10_000, metavar="N", help="files in all, shared by the targets")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, metavar="S", help="let atheris look for S seconds; takes one --target")
    given_arguments = parser.parse_args(arguments)
    names = given_arguments.target or list(TARGETS)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        if given_arguments.seconds is not None:
            return _with_atheris(TARGETS[names[0]], Path(name), given_arguments.seconds)
        each = -(-given_arguments.inputs // len(names))
        for target in names:
            folder = Path(name) / target
            folder.mkdir()
            fuzz(TARGETS[target], folder, each, seed=given_arguments.seed)
            print(f"{target}: {each} inputs", flush=True)
    print("Nothing but errors of ours came up.")
    return 0


def _with_atheris(target: Target, folder: Path, seconds: int) -> int:
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    corpus = folder / "corpus"
    corpus.mkdir()
    with atheris.instrument_imports(include=["editcore"]):  # readers import their modules when they first read
        for number, seed in enumerate(target.seeds(folder)):
            (corpus / str(number)).write_bytes(seed)
            _read(target, folder, seed)
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", str(corpus)],
        lambda content: _read(target, folder, target.fit(content)),
    )
    atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
