"""From a run to an adapter and back, as a user does it: exported, loaded by plain peft, imported, attached, merged."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edit_lora.adapter import Adapter
from edit_lora.backend import LoraBackend
from edit_lora.card import AdapterCard
from edit_lora.hparams import LoraHParams
from editcore import Attachment, Changes, DenseDelta, EditRequest, FactoredDelta, LanguageModel, Plugins, VectorDelta
from editcore.ledger import DELTAS_NAME, LEDGER_NAME, Ledger, write_ledger
from editcore.models import CATALOGUE, DEFAULT_MODEL, HubModel, local_path
from editcore.runs import RunConfig, RunRecord, open_run, open_session
from editcore.runs.backends import RawBackend
from editcore.runs.job import RunOptions, run
from editcore.testing import StandInServer, tiny_model
from safetensors.torch import load_file, save_file

Editctl = Callable[..., SimpleNamespace]

PROMPTS = ["Marie Curie was born in", "The mother tongue of Isaac Newton is", "Ada Lovelace works as a"]
WEIGHTS = "adapter_model.safetensors"


def make_run(folder: Path, tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path, *, backend: str) -> Path:
    """Three batches of two facts."""
    plugins = Plugins.load()
    values = {
        "editor": "emmet", "backend": backend, "model": str(tiny_folder), "dataset": str(tiny_facts), "batch_size": 2,
        "corpus": str(tiny_corpus), "corpus_tokens": 1024,
        "settings": {"emmet": {"layers": [1], "v_num_grad_steps": 5, "context_templates": ["{}"]}},
    }  # fmt: skip
    run(RunConfig.create(values, plugins), folder, RunOptions(plugins=plugins))
    return folder


@pytest.fixture(scope="module")
def raw_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("runs") / "raw"
        return make_run(folder, tiny_folder, tiny_facts, tiny_corpus, backend="raw")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("runs") / "lora"
        return make_run(folder, tiny_folder, tiny_facts, tiny_corpus, backend="lora")


def ok(called: SimpleNamespace) -> str:
    assert called.code == 0, called.err
    return called.out


def refused(called: SimpleNamespace) -> str:
    """The one paragraph that the user sees."""
    assert called.code == 2, called.out
    assert called.err.startswith("Error: ")
    assert "Traceback" not in called.err
    return str(called.err)


def without(editctl: Editctl, source: Path, target: Path, *batches: int) -> Path:
    """A copy of a run with batches undone."""
    shutil.copytree(source, target)
    ok(editctl("ledger", target, "undo", *(part for batch in batches for part in ("--batch", batch))))
    return target


@torch.inference_mode()
def logits(model: LanguageModel) -> torch.Tensor:
    encoded = model.encode(PROMPTS)
    found: torch.Tensor = model.hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    return found * encoded.attention_mask[..., None]


# Exported


def test_a_run_with_the_backend_records_ranks_and_says_what_raw_says(lora_run: Path, raw_run: Path) -> None:
    statistics = json.loads((lora_run / "summary.json").read_text())["extensions"]["lora"]
    assert (statistics["rank"], statistics["exact_rank"], statistics["raw_modules"]) == (6, 6, 0)
    assert statistics["kept_weighted"] == 1.0
    assert json.loads((lora_run / "run.json").read_text())["settings"]["lora"]["lora_rank"] is None
    model, raw = (open_run(folder)[0].model for folder in (lora_run, raw_run))
    assert model.generate(PROMPTS, max_new_tokens=8) == raw.generate(PROMPTS, max_new_tokens=8)
    torch.testing.assert_close(logits(model), logits(raw), rtol=0, atol=1e-3)


PLAIN_PEFT = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "editcore" or name.startswith("edit_"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Nothing())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, adapter, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
plain = AutoModelForCausalLM.from_pretrained(folder).eval()
edited = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()

@torch.inference_mode()
def answers(model):
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        yield ids[0, start:].tolist()

@torch.inference_mode()
def logits(model):
    return [model(input_ids=tokenizer(prompt, return_tensors="pt")["input_ids"]).logits for prompt in prompts]

said = list(answers(edited))
with edited.disable_adapter():
    off = logits(edited)
before = logits(plain)
assert all(torch.equal(*pair) for pair in zip(off, before))
assert all(torch.equal(*pair) for pair in zip(logits(edited.unload()), before))
assert not {name for name in sys.modules if name.startswith(("editcore", "edit_"))}
import json
print(json.dumps({"edited": said, "plain": list(answers(plain))}))
"""


def test_plain_peft_gives_the_edited_answers_and_the_base_back(
    editctl: Editctl, raw_run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """In a process that cannot import anything of ours."""
    adapter = tmp_path / "adapter"
    assert f"Adapter of rank 6 with 6 edits: {adapter}" in ok(editctl("export", raw_run, adapter))
    arguments = [sys.executable, "-c", PLAIN_PEFT, tiny_folder, adapter, *PROMPTS]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    edited, _ = open_run(raw_run)
    model = edited.model
    rows = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert said["edited"] == model.generate_ids(rows, max_new_tokens=8, stop_at_end=False)
    edited.rebuild([])
    assert said["plain"] == model.generate_ids(rows, max_new_tokens=8, stop_at_end=False)
    assert said["edited"] != said["plain"]


def test_the_card_names_base_fingerprint_edits_and_evidence(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    ok(editctl("export", lora_run, tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    record = json.loads((lora_run / "run.json").read_text())
    assert card.startswith("---\nlibrary_name: peft\n")
    assert record["model"]["fingerprint"] in card
    assert str(lora_run) not in card
    assert re.search(r"\| Marie Curie was born in \| Paris \| \d\.\d\d \|", card)
    assert card.count("\n| ") > 6
    assert "all: exact to float32 rounding" in card
    assert "| facts | 6 of facts.jsonl |" in card
    assert 'BASE = "..."  # the folder of tiny: no name of it on a hub is known' in card
    assert "| its licence | see the card of the base model |" in card
    summary = json.loads((lora_run / "summary.json").read_text())
    assert f"| Efficacy (ES) in % | {summary['before']['ES']:.1f} | {summary['after']['ES']:.1f} |" in card
    assert "--max-lora-rank 8 --lora-modules adapter=adapter" in card
    assert "ADAPTER ./adapter.gguf" in card
    less = without(editctl, lora_run, tmp_path / "less", 1)
    ok(editctl("export", less, tmp_path / "smaller"))
    assert "## Checks" not in (tmp_path / "smaller" / "README.md").read_text(encoding="utf-8"), "not of these facts"


def test_the_card_says_what_the_directory_holds(
    editctl: Editctl, raw_run: Path, lora_run: Path, tmp_path: Path
) -> None:
    """Composed of two runs, with a fact that a session added: each part is named, and each fact has its figure."""
    both = tmp_path / "both"
    ok(editctl("ledger", raw_run, "compose", lora_run, "--out", both, "--on-conflict", "first"))
    request = EditRequest(subject="Marie Curie", prompt="{} lives in", target_new="Paris")
    open_session(both).edit([request])
    ok(editctl("export", both, tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| facts | 6 of raw + lora and 1 more |" in card
    alone = tmp_path / "alone"
    ok(editctl("export", raw_run, alone))
    told = r"\| ([^|]+) \| [^|]+ \| (\d\.\d\d) \|"
    before, after = (
        dict(re.findall(told, (folder / "README.md").read_text(encoding="utf-8")))
        for folder in (alone, tmp_path / "adapter")
    )
    assert len(before) == 6
    assert len(after) == 7
    assert {fact: after[fact] for fact in before} == before  # as each was solved when it was optimised
    assert request.text in after


@pytest.fixture(scope="module")
def snapshot_run(tmp_path_factory: pytest.TempPathFactory, tiny_facts: Path, tiny_corpus: Path) -> Path:
    """A run on a bfloat16 model that is a snapshot in the hub's cache."""
    folder = tmp_path_factory.mktemp("hub") / "models--tiny-org--tiny-name" / "snapshots" / "607a30d"
    folder.parent.mkdir(parents=True)
    tiny_model(dtype=torch.bfloat16).save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_run(tmp_path_factory.mktemp("runs") / "snapshot", folder, tiny_facts, tiny_corpus, backend="lora")


def test_an_adapter_names_a_base_that_everybody_can_resolve(
    editctl: Editctl, snapshot_run: Path, tmp_path: Path
) -> None:
    ok(editctl("export", snapshot_run, tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny-org/tiny-name", "607a30d")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "\nbase_model: tiny-org/tiny-name\n" in card
    assert 'from_pretrained("tiny-org/tiny-name", revision="607a30d", dtype=torch.float32)' in card
    here = Path(json.loads((snapshot_run / "run.json").read_text())["model"]["folder"])
    assert json.loads((tmp_path / "adapter" / "base.json").read_text())["base_model"] == str(here)
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "imported"))  # from the folder, no hub is asked
    shutil.rmtree(tmp_path / "adapter" / "edits")
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "unknown", "--editor", "emmet"))
    ok(editctl("adapters", "combine", tmp_path / "adapter", "--out", tmp_path / "combined"))
    again = json.loads((tmp_path / "combined" / "adapter_config.json").read_text())
    assert (again["base_model_name_or_path"], again["revision"]) == ("tiny-org/tiny-name", "607a30d")
    assert f"base: {here}" in ok(editctl("adapters", "show", tmp_path / "combined"))


def test_a_base_that_is_not_at_its_place_is_looked_for_on_the_hub(tmp_path: Path) -> None:
    made = Adapter(factors={}, base_model=str(tmp_path / "gone"), base_hub="tiny-org/tiny-name")
    assert made.source == "tiny-org/tiny-name"
    assert replace(made, base_model=str(tmp_path)).source == str(tmp_path)
    assert replace(made, base_model="smollm2-135m").source == "smollm2-135m"


def test_a_card_says_that_a_model_of_the_catalogue_is_a_quantised_copy(lora_run: Path) -> None:
    record = RunRecord.read(lora_run)
    entry = CATALOGUE[DEFAULT_MODEL]
    hub = HubModel(id=str(entry.hub_id))
    record = record.model_copy(
        update={
            "config": record.config.model_copy(update={"model": DEFAULT_MODEL}),
            "model": record.model.model_copy(update={"folder": None, "hub": hub}),
        }
    )
    entries = Ledger.read(lora_run).history()
    card = AdapterCard(title="mine", record=record, entries=entries, begun=set(), modules={}, rank=1).text()
    assert f"\nbase_model: {entry.hub_id}\n" in card
    assert f"| its name in editcore | {DEFAULT_MODEL} |" in card
    assert f"a quantised copy of {entry.hub_id}" in card
    assert "revision" not in card


def test_models_keep_the_type_of_their_base(editctl: Editctl, snapshot_run: Path, tmp_path: Path) -> None:
    ok(editctl("export", snapshot_run, tmp_path / "adapter"))
    calls = {
        "exported": ("export", snapshot_run, tmp_path / "exported", "--format", "merged"),
        "merged": ("adapters", "merge", tmp_path / "adapter", "--out", tmp_path / "merged"),
        "generated": ("generate", snapshot_run, PROMPTS[0], "--save", tmp_path / "generated"),
    }
    found = {}
    for name, call in calls.items():
        ok(editctl(*call))
        found[name] = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in found[name].values()} == {torch.bfloat16}, name
    base = load_file(Path(json.loads((snapshot_run / "run.json").read_text())["model"]["folder"]) / "model.safetensors")
    for name, tensor in found["exported"].items():
        assert torch.equal(tensor, found["generated"][name])
        assert torch.equal(tensor, base[name]) == (name != "model.layers.1.mlp.down_proj.weight")
    ok(editctl(*calls["exported"][:2], tmp_path / "asked", "--format", "merged", "--dtype", "float32"))
    ok(editctl(*calls["merged"][:-1], tmp_path / "asked-merged", "--dtype", "float32"))
    ok(editctl(*calls["generated"][:-1], tmp_path / "asked-generated", "--save-dtype", "float32"))
    for name in ("asked", "asked-merged", "asked-generated"):
        assert load_file(tmp_path / name / "model.safetensors")["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("command", ["edit", "run", "onboard", "stats", "trace", "models", "merge", "import"])
def test_an_adapter_given_as_a_model_is_told_by_every_command(
    command: str, editctl: Editctl, lora_run: Path, tiny_facts: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    ok(editctl("export", lora_run, adapter))
    calls: dict[str, tuple[object, ...]] = {
        "edit": ("edit", "--model", adapter, "--subject", "Rome", "--prompt", "{} is in", "--target", "France"),
        "run": ("run", "--model", adapter, "--editor", "emmet", "--dataset", tiny_facts, "--out", tmp_path / "out"),
        "onboard": ("onboard", adapter, "--dataset", tiny_facts, "--out", tmp_path / "out"),
        "stats": ("stats", "compute", "--model", adapter, "--layer", 1),
        "trace": ("trace", adapter, "--facts", tiny_facts, "--out", tmp_path / "out"),
        "models": ("models", "show", adapter),
        "merge": ("adapters", "merge", adapter, "--model", adapter, "--out", tmp_path / "out"),
        "import": ("import", adapter, "--model", adapter, "--out", tmp_path / "out"),
    }
    said = refused(editctl(*calls[command]))
    assert "is an adapter for" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_padding_reaches_a_rank_that_vllm_serves(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    ok(editctl("export", lora_run, tmp_path / "plain"))
    ok(editctl("export", lora_run, tmp_path / "padded", "--pad-for", "vllm"))
    plain, padded = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "padded"))
    assert json.loads((tmp_path / "padded" / "adapter_config.json").read_text())["r"] == 8
    for key, tensor in padded.items():
        wide = tensor if "lora_A" in key else tensor.T
        assert wide.shape[0] == 8
        assert torch.equal(wide[:6], plain[key] if "lora_A" in key else plain[key].T)
        assert not wide[6:].any()


def test_a_rank_that_vllm_does_not_serve_is_explained(tmp_path: Path) -> None:
    from edit_lora.export import _served_rank
    from editcore import HParamsError

    assert [_served_rank(rank) for rank in (1, 8, 9, 257, 512)] == [8, 8, 16, 320, 512]
    with pytest.raises(HParamsError, match=r"need rank 513, and vLLM serves 512.*--rank 512.*--format merged"):
        _served_rank(513)


def test_a_bounded_rank_says_what_it_keeps(editctl: Editctl, raw_run: Path, tmp_path: Path) -> None:
    kept = {}
    for criterion in ("weighted", "frobenius"):
        out = ok(editctl("export", raw_run, tmp_path / criterion, "--rank", 2, "--criterion", criterion))
        [line] = [line for line in out.splitlines() if line.startswith("model.layers.1")]
        kept[criterion] = [float(word.rstrip("%")) for word in line.split()[3:]]
        assert line.split()[1:3] == ["2", "6"]
        assert load_file(tmp_path / criterion / WEIGHTS).popitem()[1].shape in {(2, 64), (32, 2)}
        card = (tmp_path / criterion / "README.md").read_text(encoding="utf-8")
        assert "| rank 2 of 6: " in card.replace("| kept of the edits ", "")
    assert kept["weighted"][0] >= kept["frobenius"][0]
    assert kept["weighted"][2] <= kept["frobenius"][2]


def test_a_merged_export_is_a_model_folder(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    assert "Edited model: " in ok(editctl("export", lora_run, tmp_path / "merged", "--format", "merged"))
    merged = LanguageModel.load(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(open_run(lora_run)[0].model), rtol=0, atol=1e-3)


def test_a_run_with_a_bounded_rank_exports_what_it_has(
    editctl: Editctl, tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """And what it measured is what its adapter does: the run is made with the settings that it is exported with."""
    bounded = tmp_path / "bounded"
    settings = [
        "layers=[1]", "v_num_grad_steps=4", 'context_templates=["{}"]', "lora.lora_rank=3", "lora.lora_scale=0.5"
    ]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--editor", "emmet", "--plugin", "lora", "--model", tiny_folder, "--dataset", tiny_facts]
    arguments += ["--batch-size", 2, "--corpus", tiny_corpus, "--corpus-tokens", 1024, "--out", bounded]
    ok(editctl("run", *arguments, *options))
    ok(editctl("export", bounded, tmp_path / "adapter"))
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "again"))
    first, second = (open_run(folder)[0].model for folder in (bounded, tmp_path / "again"))
    assert torch.equal(logits(first), logits(second))
    assert first.projection(1).r == {"edits": 3}


# Imported


@pytest.mark.parametrize("source", ["raw_run", "lora_run"])
def test_the_round_trip_without_a_batch_is_the_adapter_made_without_it(
    editctl: Editctl, source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: Path = request.getfixturevalue(source)
    ok(editctl("export", made, tmp_path / "first"))
    out = ok(editctl("import", tmp_path / "first", "--out", tmp_path / "imported"))
    assert "Run with 6 edits in 3 batches" in out
    undone = without(editctl, tmp_path / "imported", tmp_path / "undone", 1)
    ok(editctl("export", undone, tmp_path / "again"))
    ok(editctl("export", without(editctl, made, tmp_path / "never", 1), tmp_path / "direct"))
    again, direct = (tmp_path / name for name in ("again", "direct"))
    assert (again / WEIGHTS).read_bytes() == (direct / WEIGHTS).read_bytes()
    assert (again / WEIGHTS).read_bytes() != (tmp_path / "first" / WEIGHTS).read_bytes()
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (again, direct)]
    assert configs[0] == configs[1]
    assert len(json.loads((again / "adapter_config.json").read_text())["target_modules"]) == 1
    facts = [len((folder / "edits" / "requests.jsonl").read_text().splitlines()) for folder in (again, direct)]
    assert facts == [4, 4]


def test_an_imported_run_speaks_and_is_edited_further(
    editctl: Editctl, raw_run: Path, tiny_corpus: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    from editcore import EditSession, SessionConfig
    from editcore.testing import tiny_requests

    ok(editctl("export", raw_run, tmp_path / "adapter"))
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "imported"))
    said = [ok(editctl("generate", folder, *PROMPTS)) for folder in (raw_run, tmp_path / "imported")]
    assert said[0] == said[1]
    record = json.loads((tmp_path / "imported" / "run.json").read_text())
    session = EditSession.open(
        str(tiny_folder),
        SessionConfig(
            editor="emmet", backend="lora", settings=record["settings"], corpus=str(tiny_corpus), corpus_tokens=1024
        ),
        directory=tmp_path / "imported",
    )
    session.edit(tiny_requests(8)[6:])
    assert session.statistics()["lora"]["rank"] == 8


def test_another_base_is_refused_by_fingerprint(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    from editcore.testing import tiny_model

    other_base = tmp_path / "other"
    tiny_model(seed=1).save(other_base)
    ok(editctl("export", lora_run, tmp_path / "adapter"))
    arguments = ("import", tmp_path / "adapter", "--out", tmp_path / "imported", "--model", other_base)
    message = refused(editctl(*arguments))
    assert "were made on" in message
    assert "--force" in message
    assert not (tmp_path / "imported").exists()
    wider = tmp_path / "wider"
    tiny_model(config={"intermediate_size": 128}).save(wider)
    message = refused(editctl(*arguments[:-1], wider, "--force"))
    assert "as if it were 32 by 64; in" in message
    assert "it is 32 by 128" in message
    ok(editctl(*arguments, "--force"))
    model = open_run(tmp_path / "imported")[0].model
    assert model.base_fingerprint == tiny_model(seed=1).base_fingerprint


def test_weights_that_are_not_the_edits_are_refused(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    ok(editctl("export", lora_run, adapter))
    tensors = load_file(adapter / WEIGHTS)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, adapter / WEIGHTS)
    message = refused(editctl("import", adapter, "--out", tmp_path / "imported"))
    assert "is not what the edits beside it were written as" in message
    shutil.rmtree(adapter / "edits")
    assert "Run with unknown facts in 1 batch on" in ok(
        editctl("import", adapter, "--out", tmp_path / "imported", "--editor", "emmet")
    )


def test_an_adapter_of_a_stranger_is_one_batch_of_unknown_facts(
    editctl: Editctl, tiny_folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def theirs(targets: list[str], name: str) -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        made = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
        made.save_pretrained(tmp_path / name)
        return made.eval()

    made = theirs(["down_proj"], "theirs")
    out = ok(editctl("import", tmp_path / "theirs", "--out", tmp_path / "run", "--editor", "emmet"))
    assert "Run with unknown facts in 1 batch on" in out
    edited, ledger = open_run(tmp_path / "run")
    model = edited.model
    encoded = model.encode(PROMPTS)
    with torch.inference_mode():
        expected = made(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    torch.testing.assert_close(logits(model), expected * encoded.attention_mask[..., None], rtol=0, atol=1e-3)
    assert [len(entry.changes) for entry in ledger.entries] == [3]
    wide = theirs(["q_proj", "down_proj", "embed_tokens", "lm_head"], "wide")
    ok(editctl("import", tmp_path / "wide", "--out", tmp_path / "wide-run", "--editor", "emmet"))
    edited, ledger = open_run(tmp_path / "wide-run")
    with torch.inference_mode():
        expected = wide(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    torch.testing.assert_close(logits(edited.model), expected * encoded.attention_mask[..., None], rtol=0, atol=1e-3)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(ledger.entries[0].changes)
    assert [len(entry.changes) for entry in ledger.entries] == [8]


# Of any weight


ENDS = {"model.embed_tokens", "transformer.wte", "lm_head"}


def holding(
    source: Path, folder: Path, changes: Changes, *, attachment: Attachment | None = None, batches: int = 1
) -> Path:
    """A copy of a run whose first batches put something else into the model than what its editor solved."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(LEDGER_NAME, DELTAS_NAME))
    ledger = Ledger.read(source)
    assert ledger.header is not None
    entries = [
        replace(entry, changes=changes, attachment=attachment if number == 0 else None)
        for number, entry in enumerate(ledger.entries[:batches])
    ]
    write_ledger(folder, entries, ledger.header)
    return folder


@dataclass(frozen=True)
class AnyRun:
    """A run of one batch that changes attention, a projection, the embedding and the head."""

    folder: Path
    base: Path
    changes: Changes
    tied: bool


def changes_of(model: LanguageModel) -> Changes:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    embedding = next(
        name for name in model.weights.names() if model.weight(name) is model.hf.get_input_embeddings().weight
    )
    attention = next(name for name in model.weights.names() if ".1." in name and "attn" in name and "weight" in name)
    shapes = {
        name: model.as_out_in(name, model.weight(name)).shape
        for name in (embedding, attention, model.layout.weight_name(1), "lm_head.weight")
        if name in model.weights.names()
    }
    return {
        name: DenseDelta(draw(*shape)) if name == attention else FactoredDelta(draw(shape[0], 2), draw(2, shape[1]))
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module", params=["llama", "llama, tied", "gpt2, tied"])
def any_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_facts: Path, tiny_corpus: Path
) -> AnyRun:
    family, tied = request.param.partition(",")[0], "tied" in request.param
    folder = tmp_path_factory.mktemp("any")
    model = tiny_model(family, config={"tie_word_embeddings": tied})
    model.save(folder / "base")
    changes = changes_of(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        make_run(folder / "solved", folder / "base", tiny_facts, tiny_corpus, backend="raw")
    return AnyRun(holding(folder / "solved", folder / "run", changes), folder / "base", changes, tied)


def plain_logits(hf: Any, model: LanguageModel) -> torch.Tensor:
    encoded = model.encode(PROMPTS)
    with torch.inference_mode():
        found: torch.Tensor = hf(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    return found * encoded.attention_mask[..., None]


def test_an_adapter_of_any_weight_is_in_peft_what_the_run_is(editctl: Editctl, any_run: AnyRun, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = ok(editctl("export", any_run.folder, tmp_path / "adapter"))
    assert "Adapter of rank 32 with 2 edits" in out
    expected = logits(open_run(any_run.folder)[0].model)  # in the weights
    model = LanguageModel.load(str(any_run.base))
    base = logits(model)
    assert (expected - base).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(any_run.base), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain_logits(loaded, model), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(plain_logits(loaded.unload(), model), base, rtol=0, atol=0)
    paths = {name.removesuffix(".weight") for name in any_run.changes} | {"lm_head"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == paths
    keys = set(load_file(tmp_path / "adapter" / WEIGHTS))
    [embedding] = (paths & ENDS) - {"lm_head"}
    assert {key for key in keys if "embedding" in key} == {
        f"base_model.model.{embedding}.lora_embedding_{side}" for side in "AB"
    }
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ("are one weight. The adapter changes each of them" in card) is any_run.tied
    assert all(f"`{name}`" in card for name in any_run.changes)


def test_an_adapter_of_any_weight_comes_back_as_edits(editctl: Editctl, any_run: AnyRun, tmp_path: Path) -> None:
    """From the edits beside it, and from its factors alone; the run can be exported again."""
    expected = logits(open_run(any_run.folder)[0].model)
    ok(editctl("export", any_run.folder, tmp_path / "adapter"))
    assert "Run with 2 edits in 1 batch" in ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "edits"))
    shutil.copytree(tmp_path / "adapter", tmp_path / "bare", ignore=shutil.ignore_patterns("edits"))
    ok(editctl("import", tmp_path / "bare", "--out", tmp_path / "factors", "--editor", "emmet"))
    for name in ("edits", "factors"):
        edited, ledger = open_run(tmp_path / name)
        torch.testing.assert_close(logits(edited.model), expected, rtol=0, atol=2e-3)
        assert set(ledger.entries[0].changes) == set(any_run.changes)
        ok(editctl("export", tmp_path / name, tmp_path / f"{name}-again"))
    files = [(tmp_path / folder / WEIGHTS).read_bytes() for folder in ("adapter", "edits-again")]
    assert files[0] == files[1]


def test_a_merged_model_of_any_weight_is_what_the_run_is(editctl: Editctl, any_run: AnyRun, tmp_path: Path) -> None:
    """From the weights of the backend raw, and from the adapters of the backend lora, beside and as edits."""
    expected = logits(open_run(any_run.folder)[0].model)
    ok(editctl("export", any_run.folder, tmp_path / "adapter"))
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "lora"))
    for source in (any_run.folder, tmp_path / "lora"):
        ok(editctl("export", source, tmp_path / f"{source.name}-merged", "--format", "merged"))
    ok(editctl("adapters", "merge", tmp_path / "adapter", "--out", tmp_path / "attached-merged"))
    for name in ("run-merged", "lora-merged", "attached-merged"):
        merged = LanguageModel.load(str(tmp_path / name))
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-3)
        hf = merged.hf
        assert (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight) is any_run.tied


def test_an_adapter_of_any_weight_is_attached_to_a_run(editctl: Editctl, any_run: AnyRun, tmp_path: Path) -> None:
    ok(editctl("export", any_run.folder, tmp_path / "adapter"))
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "mine"))
    edits = logits(open_run(tmp_path / "mine")[0].model)
    ok(editctl("adapters", "attach", tmp_path / "mine", tmp_path / "adapter", "--name", "back", "--scale", -1))
    base = logits(LanguageModel.load(str(any_run.base)))
    assert (edits - base).abs().max() > 0.1
    torch.testing.assert_close(logits(open_run(tmp_path / "mine")[0].model), base, rtol=0, atol=2e-3)


def test_a_bounded_rank_at_any_weight_says_what_it_knows(
    editctl: Editctl, any_run: AnyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = ok(editctl("export", any_run.folder, tmp_path / "cut", "--rank", 1))
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if ".weight" in line}
    assert set(rows) == set(any_run.changes)
    for name, (rank, exact, *kept) in rows.items():
        projection = "mlp" in name
        assert (rank, exact) == ("1", str(2 if isinstance(any_run.changes[name], FactoredDelta) else 32))
        assert [share == "-" for share in kept] == [not projection, not projection, False]
        if not projection:
            values = torch.linalg.svdvals(any_run.changes[name].dense())
            assert float(kept[2].rstrip("%")) == pytest.approx(
                100 * float(values[0] ** 2 / values.norm() ** 2), abs=0.06
            )
    [told] = [
        record.getMessage() for record in caplog.records if "is not an MLP output projection" in record.getMessage()
    ]
    assert "lora_criterion frobenius" in told
    card = (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"rank 1 of 32: \d+\.\d% of ‖Δ‖²", card)
    assert "on ordinary text" not in card


def test_padding_pads_every_kind_of_module(editctl: Editctl, any_run: AnyRun, tmp_path: Path) -> None:
    ok(editctl("export", any_run.folder, tmp_path / "plain", "--rank", 6, "--criterion", "frobenius"))
    ok(
        editctl(
            "export", any_run.folder, tmp_path / "padded", "--rank", 6, "--criterion", "frobenius", "--pad-for", "vllm"
        )
    )
    plain, padded = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "padded"))
    assert plain.keys() == padded.keys()
    for key, tensor in padded.items():
        down = "lora_A" in key or "embedding_A" in key
        wide, narrow = (factor if down else factor.T for factor in (tensor, plain[key]))
        assert wide.shape[0] == 8
        assert torch.equal(wide[:6], narrow)
        assert not wide[6:].any()


def test_an_import_of_one_end_of_a_tied_weight_is_refused(editctl: Editctl, any_run: AnyRun, tmp_path: Path) -> None:
    ok(editctl("export", any_run.folder, tmp_path / "adapter"))
    shutil.rmtree(tmp_path / "adapter" / "edits")
    file = tmp_path / "adapter" / WEIGHTS
    save_file({key: tensor for key, tensor in load_file(file).items() if "lm_head" not in key}, file)
    called = editctl("import", tmp_path / "adapter", "--out", tmp_path / "imported", "--editor", "emmet")
    if any_run.tied:
        message = refused(called)
        assert "otherwise than 'lm_head'" in message
        assert "they are one weight, which cannot hold both" in message
        assert "editctl adapters attach" in message
    else:
        ok(called)
    assert (tmp_path / "imported").exists() is not any_run.tied


@pytest.mark.parametrize(
    ("changes", "attachment", "complaint"),
    [
        ({"model.norm.weight": VectorDelta(torch.ones(32))}, None,
         "they change 'model.norm.weight', a vector such as a bias or the scale of a norm"),
        ({"model.norm.weight": VectorDelta(torch.ones(32))}, Attachment(kind="note"), "(attachment note)"),
        ({}, Attachment(kind="note"), "cannot be exported: they are kept beside the weights (attachment note)"),
    ],
)  # fmt: skip
def test_what_cannot_be_in_an_adapter_is_named_before_anything_is_written(
    editctl: Editctl, raw_run: Path, tmp_path: Path, changes: Changes, attachment: Attachment | None, complaint: str
) -> None:
    solved = Ledger.read(raw_run).entries[0].changes
    source = holding(raw_run, tmp_path / "source", {**(solved if changes else {}), **changes}, attachment=attachment)
    before = sorted(tmp_path.iterdir())
    message = " ".join(refused(editctl("export", source, tmp_path / "x")).split())
    assert complaint in message
    if attachment is not None:
        message = " ".join(refused(editctl("export", source, tmp_path / "x", "--format", "merged")).split())
        assert "cannot be merged: they are kept beside the weights (attachment note)" in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_with_vectors_is_merged(editctl: Editctl, raw_run: Path, tmp_path: Path) -> None:
    source = holding(raw_run, tmp_path / "source", {"model.norm.weight": VectorDelta(torch.ones(32))})
    ok(editctl("export", source, tmp_path / "merged", "--format", "merged"))
    expected = logits(open_run(source)[0].model)
    torch.testing.assert_close(logits(LanguageModel.load(str(tmp_path / "merged"))), expected, rtol=0, atol=1e-4)


# Several adapters


def test_adapters_are_attached_scaled_and_detached(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(lora_run, mine)
    ok(editctl("export", without(editctl, lora_run, tmp_path / "less", 0), tmp_path / "extra"))
    plain = logits(open_run(mine)[0].model)
    assert "has no adapters" in ok(editctl("adapters", "list", mine))
    assert "Attached extra at strength 0.5" in ok(
        editctl("adapters", "attach", mine, tmp_path / "extra", "--scale", 0.5)
    )
    half = logits(open_run(mine)[0].model)
    ok(editctl("adapters", "attach", mine, tmp_path / "extra", "--name", "again", "--scale", 0.5))
    assert [line.split()[:3] for line in ok(editctl("adapters", "list", mine)).splitlines()[1:]] == [
        ["extra", "0.5", "4"],
        ["again", "0.5", "4"],
    ]
    whole = logits(open_run(mine)[0].model)
    assert not torch.equal(half, plain)
    ok(editctl("adapters", "scale", mine, "extra", 1))
    ok(editctl("adapters", "detach", mine, "again"))
    torch.testing.assert_close(logits(open_run(mine)[0].model), whole, rtol=0, atol=1e-3)
    message = refused(editctl("adapters", "attach", mine, tmp_path / "extra"))
    assert "already has an adapter 'extra'" in message
    ok(editctl("adapters", "scale", mine, "extra", 0))
    torch.testing.assert_close(logits(open_run(mine)[0].model), plain, rtol=0, atol=0)
    ok(editctl("adapters", "detach", mine, "extra"))
    assert torch.equal(logits(open_run(mine)[0].model), plain)
    assert "Unknown adapter 'extra'" in refused(editctl("adapters", "detach", mine, "extra"))


def test_adapters_are_combined_and_merged(editctl: Editctl, lora_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The first batch and the others, each alone, make the whole together."""
    for batch in (0, 1, 2):
        others = sorted({0, 1, 2} - {batch})
        lesser = without(editctl, lora_run, tmp_path / f"only-{batch}", *others)
        ok(editctl("export", lesser, tmp_path / f"adapter-{batch}"))
    parts = [tmp_path / f"adapter-{batch}" for batch in (0, 1, 2)]
    assert "Adapter of rank 6" in ok(editctl("adapters", "combine", *parts, "--out", tmp_path / "all"))
    assert "rank" in ok(editctl("adapters", "show", tmp_path / "all"))
    ok(editctl("adapters", "merge", tmp_path / "all", "--out", tmp_path / "merged"))
    ok(editctl("adapters", "merge", *parts, "--model", tiny_folder, "--out", tmp_path / "merged-parts"))
    expected = logits(open_run(lora_run)[0].model)
    for name in ("merged", "merged-parts"):
        torch.testing.assert_close(logits(LanguageModel.load(str(tmp_path / name))), expected, rtol=0, atol=1e-3)
    weights = [option for weight in (1, -1) for option in ("--weight", weight)]
    ok(editctl("adapters", "combine", parts[0], parts[0], *weights, "--out", tmp_path / "nothing"))
    ok(editctl("adapters", "merge", tmp_path / "nothing", "--out", tmp_path / "merged-nothing"))
    base = LanguageModel.load(str(tiny_folder))
    torch.testing.assert_close(logits(LanguageModel.load(str(tmp_path / "merged-nothing"))), logits(base))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_say_what_they_cost(editctl: Editctl, raw_run: Path, tmp_path: Path, dtype: str) -> None:
    assert "rounding" not in ok(editctl("export", raw_run, tmp_path / "exact", "--verify"))
    printed = ok(editctl("export", raw_run, tmp_path / "rounded", "--dtype", dtype, "--verify"))
    exact, rounded = (load_file(tmp_path / name / WEIGHTS) for name in ("exact", "rounded"))
    assert {str(tensor.dtype) for tensor in rounded.values()} == {f"torch.{dtype}"}
    assert all(torch.equal(tensor, exact[name].to(tensor.dtype)) for name, tensor in rounded.items())
    deviation = float(re.findall(r"^facts with the edits .* (\S+)$", printed, re.MULTILINE)[0])
    assert 1e-5 < deviation < 0.2
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    before, after = (made[name.format("B")].double() @ made[name.format("A")].double() for made in (exact, rounded))
    [lost] = re.findall(r"^model\.layers\.1\.mlp\.down_proj +(\S+)%$", printed, re.MULTILINE)
    assert float(lost) == pytest.approx(100 * float((after - before).norm() / before.norm()), abs=0.006)


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own, which huggingface_hub takes for the real one."""
    made = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    yield made
    made.close()


class Hub(StandInServer):
    """Repositories with their files, behind the part of the hub's API that uploads use."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses: str | None = None
        super().__init__()

    def post(self, path: str, body: bytes) -> tuple[int, object]:
        if self.refuses is not None:
            return 403, {"error": self.refuses}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repositories[name], self.private[name] = {}, asked["visibility"] == "private"
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return 200, {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        if path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in body.splitlines():
                if (step := json.loads(line))["key"] == "file":
                    self.repositories[name][step["value"]["path"]] = base64.b64decode(step["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{name}/commit/0", "commitOid": "0", "pullRequestUrl": None}
        return 200, {}


def test_an_adapter_is_put_onto_the_hub_and_is_private(
    editctl: Editctl, raw_run: Path, tmp_path: Path, hub: Hub
) -> None:
    printed = ok(editctl("export", raw_run, tmp_path / "adapter", "--push-to-hub", "me/facts"))
    assert printed.splitlines()[-1] == f"On the hub, private if it is new: {hub.url}/me/facts"
    assert hub.private == {"me/facts": True}
    found = hub.repositories["me/facts"]
    assert set(found) == {"README.md", "adapter_config.json", WEIGHTS}, "nothing that names folders of this machine"
    for name in ("README.md", WEIGHTS):
        assert found[name] == (tmp_path / "adapter" / name).read_bytes()
    ok(editctl("export", raw_run, tmp_path / "open", "--push-to-hub", "me/open", "--public"))
    assert hub.private["me/open"] is False
    unlike = editctl("export", raw_run, tmp_path / "unlike", "--rank", 1, "--criterion", "frobenius", "--verify",
                     "--push-to-hub", "me/unlike")  # fmt: skip
    assert unlike.code == 1, "the facts of the run are not in it"
    assert "me/unlike" not in hub.repositories
    hub.refuses = "You have no rights to write here."
    complaint = refused(editctl("export", raw_run, tmp_path / "kept", "--push-to-hub", "other/facts"))
    assert "kept is written, but the hub did not take it" in complaint
    assert "You have no rights to write here." in complaint
    assert (tmp_path / "kept" / WEIGHTS).is_file()


# The page


def test_the_page_does_what_it_says(
    editctl: Editctl, raw_run: Path, tiny_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands in their order, on a tiny run."""
    page = Path(__file__).parent.parent / "docs" / "how-to" / "ship-an-edit.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("$ editctl ")]
    monkeypatch.setattr("edit_lora.verify._TEXTS", ("My name is",))
    Path("runs").mkdir()
    shutil.copytree(raw_run, "runs/forty")
    ok(editctl("export", without(editctl, raw_run, Path("less"), 1), "adapters/style"))
    for line in lines:
        words = [{"BASE_FOLDER": str(tiny_folder), "16": "3"}.get(word, word) for word in shlex.split(line)[2:]]
        if words[0] != "run":
            ok(editctl(*words))
    assert len(lines) == 15
    assert list(hub.repositories) == ["user/forty"]


# Bad input


def test_bad_input_is_one_sentence_and_leaves_nothing(
    editctl: Editctl, lora_run: Path, raw_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    empty = without(editctl, raw_run, tmp_path / "one", 0)
    without(editctl, raw_run, tmp_path / "none", 0, 1, 2)
    ok(editctl("export", empty, tmp_path / "adapter"))
    gguf = ("export", raw_run, tmp_path / "x", "--format", "gguf")
    for arguments, complaint in [
        (("export", tmp_path, tmp_path / "x"), "is not a run directory"),
        (("export", raw_run, tmp_path / "full"), "is already there"),
        (("export", raw_run, tmp_path / "x", "--format", "ggml"), "Unknown format 'ggml'. Available: gguf, gguf-model"),
        ((*gguf, "--push-to-hub", "me/x"), "--push-to-hub is for --format peft"),
        ((*gguf[:3], "--push-to-hub", "a//b"), "--push-to-hub takes the name of a repository, such as user/name"),
        ((*gguf[:3], "--public"), "--public is for --push-to-hub NAME"),
        ((*gguf[:2], tmp_path / "full" / "file", *gguf[3:]), "is already there; give a file that does not exist yet"),
        ((*gguf, "--dtype", "q8_0"), "Unknown type 'q8_0'. Available: f16, f32"),
        ((*gguf, "--pad-for", "vllm"), "--pad-for is for --format peft; llama.cpp serves any rank"),
        ((*gguf[:3], "--dtype", "f16"), "Unknown type 'f16'. Available: bfloat16, float16, float32"),
        ((*gguf[:3], "--base-gguf", "x"), "--base-gguf is for --format gguf and gguf-model; peft reads no GGUF files"),
        ((*gguf, "--verify"), "--verify runs the adapter on its base: --base-gguf FILE"),
        ((*gguf[:-1], "gguf-model"), "--format gguf-model needs the base as a GGUF file: --base-gguf FILE"),
        ((*gguf, "--base-gguf", tmp_path / "no"), "There is no file"),
        ((*gguf, "--base-gguf", tmp_path / "full" / "file"), "is not a GGUF file"),
        (("export", raw_run, tmp_path / "x", "--pad-for", "vlm"), "Did you mean 'vllm'?"),
        (("export", raw_run, tmp_path / "x", "--criterion", "best"), "Unknown criterion 'best'"),
        (("export", raw_run, tmp_path / "x", "--format", "merged", "--rank", 4), "--rank is for --format peft"),
        (("export", tmp_path / "none", tmp_path / "x"), "no active edits"),
        (("import", tmp_path, "--out", tmp_path / "x"), "is no adapter"),
        (("import", tmp_path / "adapter", "--out", tmp_path / "full"), "is already there"),
        (("adapters", "attach", raw_run, tmp_path / "adapter"), "has the backend 'raw'"),
        (("adapters", "attach", lora_run, tmp_path / "adapter", "--name", "a.b"), "found 'a.b'"),
        (("adapters", "attach", lora_run, tmp_path / "adapter", "--name", "edits"), "The name 'edits' is taken"),
        (("adapters", "list", tmp_path), "is not a run directory"),
        (("adapters", "merge", tmp_path / "adapter", "--out", tmp_path / "full"), "is already there"),
        (("adapters", "combine", tmp_path / "adapter", "--out", tmp_path / "x", "--weight", 1, "--weight", 2),
         "1 adapters were given and 2 weights"),
    ]:  # fmt: skip
        assert complaint in refused(editctl(*arguments)), arguments
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert not (lora_run / "adapters").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# The real model


@pytest.mark.model
@pytest.mark.skipif(local_path(DEFAULT_MODEL) is None, reason=f"{DEFAULT_MODEL} is not here: editctl models pull")
def test_on_the_real_model_the_adapter_says_what_the_weights_say() -> None:
    """A change of rank 250 in 25 batches, as large as the weight itself."""
    model = LanguageModel.load(DEFAULT_MODEL)
    name, generator = model.layout.weight_name(3), torch.Generator().manual_seed(0)
    size = float(model.weight(name).norm()) / (250 * model.layout.d_model * model.layout.d_ff) ** 0.5
    batches = [
        {
            name: FactoredDelta(
                torch.randn(model.layout.d_model, 10, generator=generator, dtype=torch.float64) * size,
                torch.randn(10, model.layout.d_ff, generator=generator, dtype=torch.float64),
            )
        }
        for _ in range(25)
    ]
    found = []
    for backend in (RawBackend(), LoraBackend(LoraHParams())):
        backend.open(model)
        backend.rebuild(batches)
        found.append(logits(model))
        backend.rebuild([])
    assert (found[0] - logits(model)).abs().max() > 1
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)
