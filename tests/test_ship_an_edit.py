"""From a run to an adapter and back, as a user does it: exported, loaded by plain peft, imported, attached, merged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edit_lora.backend import LoraBackend
from edit_lora.hparams import LoraHParams
from editcore import FactoredDelta, LanguageModel, Plugins
from editcore.models import DEFAULT_MODEL, local_path
from editcore.runs import RunConfig, open_run
from editcore.runs.backends import RawBackend
from editcore.runs.job import run
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
    run(RunConfig.create(values, plugins), folder, plugins=plugins)
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
    model, _, _ = open_run(lora_run)
    raw, _, _ = open_run(raw_run)
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
    model, _, backend = open_run(raw_run)
    rows = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert said["edited"] == model.generate_ids(rows, max_new_tokens=8, stop_at_end=False)
    backend.rebuild([])
    assert said["plain"] == model.generate_ids(rows, max_new_tokens=8, stop_at_end=False)
    assert said["edited"] != said["plain"]


def test_the_card_names_base_fingerprint_edits_and_evidence(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    ok(editctl("export", lora_run, tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    record = json.loads((lora_run / "run.json").read_text())
    assert card.startswith("---\nlibrary_name: peft\n")
    assert record["model"]["fingerprint"] in card
    assert str(lora_run) not in card
    assert "| Marie Curie was born in | Paris | " in card
    assert card.count("\n| ") > 6
    assert "all: exact to float32 rounding" in card


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
    model, _, _ = open_run(lora_run)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-3)


def test_a_run_with_a_bounded_rank_exports_what_it_has(
    editctl: Editctl, tiny_folder: Path, tiny_facts: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """And what it measured is what its adapter does: the run is made with the settings that it is exported with."""
    bounded = tmp_path / "bounded"
    settings = [
        "layers=[1]", "v_num_grad_steps=4", 'context_templates=["{}"]', "lora.lora_rank=3", "lora.lora_scale=0.5"
    ]  # fmt: skip
    options = [part for one in settings for part in ("--set", one)]
    arguments = ["--editor", "emmet", "--plugin", "lora", "--model", tiny_folder, "--dataset", tiny_facts]
    arguments += ["--batch-size", 2, "--corpus", tiny_corpus, "--corpus-tokens", 1024, "--out", bounded]
    ok(editctl("run", *arguments, *options))
    ok(editctl("export", bounded, tmp_path / "adapter"))
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "again"))
    first, _, _ = open_run(bounded)
    second, _, _ = open_run(tmp_path / "again")
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
    from editcore import EditSession
    from editcore.testing import tiny_requests

    ok(editctl("export", raw_run, tmp_path / "adapter"))
    ok(editctl("import", tmp_path / "adapter", "--out", tmp_path / "imported"))
    said = [ok(editctl("generate", folder, *PROMPTS)) for folder in (raw_run, tmp_path / "imported")]
    assert said[0] == said[1]
    record = json.loads((tmp_path / "imported" / "run.json").read_text())
    session = EditSession.open(
        str(tiny_folder),
        editor="emmet",
        backend="lora",
        settings=record["settings"],
        corpus=str(tiny_corpus),
        corpus_tokens=1024,
        directory=tmp_path / "imported",
    )
    session.edit(tiny_requests(8)[6:])
    assert session.statistics()["lora"]["rank"] == 8


def test_another_base_is_refused_by_fingerprint(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    from editcore.testing import tiny_model

    other = tmp_path / "other"
    tiny_model(seed=1).save(other)
    ok(editctl("export", lora_run, tmp_path / "adapter"))
    arguments = ("import", tmp_path / "adapter", "--out", tmp_path / "imported", "--model", other)
    message = refused(editctl(*arguments))
    assert "were made on" in message
    assert "--force" in message
    assert not (tmp_path / "imported").exists()
    wider = tmp_path / "wider"
    tiny_model(d_ff=128).save(wider)
    message = refused(editctl(*arguments[:-1], wider, "--force"))
    assert "as if it were 32 by 64; in" in message
    assert "it is 32 by 128" in message
    ok(editctl(*arguments, "--force"))
    model, _, _ = open_run(tmp_path / "imported")
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
    model, ledger, _ = open_run(tmp_path / "run")
    encoded = model.encode(PROMPTS)
    with torch.inference_mode():
        expected = made(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    torch.testing.assert_close(logits(model), expected * encoded.attention_mask[..., None], rtol=0, atol=1e-3)
    assert [len(entry.changes) for entry in ledger.entries] == [3]
    theirs(["q_proj", "down_proj"], "wide")
    message = refused(editctl("import", tmp_path / "wide", "--out", tmp_path / "wide-run", "--editor", "emmet"))
    assert "self_attn.q_proj and 2 more modules" in message
    assert "editctl adapters attach" in message
    assert not (tmp_path / "wide-run").exists()


# Several adapters


def test_adapters_are_attached_scaled_and_detached(editctl: Editctl, lora_run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(lora_run, mine)
    ok(editctl("export", without(editctl, lora_run, tmp_path / "less", 0), tmp_path / "extra"))
    plain = logits(open_run(mine)[0])
    assert "has no adapters" in ok(editctl("adapters", "list", mine))
    assert "Attached extra at strength 0.5" in ok(
        editctl("adapters", "attach", mine, tmp_path / "extra", "--scale", 0.5)
    )
    half = logits(open_run(mine)[0])
    ok(editctl("adapters", "attach", mine, tmp_path / "extra", "--name", "again", "--scale", 0.5))
    assert [line.split()[:3] for line in ok(editctl("adapters", "list", mine)).splitlines()[1:]] == [
        ["extra", "0.5", "4"],
        ["again", "0.5", "4"],
    ]
    whole = logits(open_run(mine)[0])
    assert not torch.equal(half, plain)
    ok(editctl("adapters", "scale", mine, "extra", 1))
    ok(editctl("adapters", "detach", mine, "again"))
    torch.testing.assert_close(logits(open_run(mine)[0]), whole, rtol=0, atol=1e-3)
    message = refused(editctl("adapters", "attach", mine, tmp_path / "extra"))
    assert "already has an adapter 'extra'" in message
    ok(editctl("adapters", "scale", mine, "extra", 0))
    torch.testing.assert_close(logits(open_run(mine)[0]), plain, rtol=0, atol=0)
    ok(editctl("adapters", "detach", mine, "extra"))
    assert torch.equal(logits(open_run(mine)[0]), plain)
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
    expected = logits(open_run(lora_run)[0])
    for name in ("merged", "merged-parts"):
        torch.testing.assert_close(logits(LanguageModel.load(str(tmp_path / name))), expected, rtol=0, atol=1e-3)
    weights = [option for weight in (1, -1) for option in ("--weight", weight)]
    ok(editctl("adapters", "combine", parts[0], parts[0], *weights, "--out", tmp_path / "nothing"))
    ok(editctl("adapters", "merge", tmp_path / "nothing", "--out", tmp_path / "merged-nothing"))
    base = LanguageModel.load(str(tiny_folder))
    torch.testing.assert_close(logits(LanguageModel.load(str(tmp_path / "merged-nothing"))), logits(base))


# Bad input


def test_bad_input_is_one_sentence_and_leaves_nothing(
    editctl: Editctl, lora_run: Path, raw_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    empty = without(editctl, raw_run, tmp_path / "one", 0)
    without(editctl, raw_run, tmp_path / "none", 0, 1, 2)
    ok(editctl("export", empty, tmp_path / "adapter"))
    for arguments, complaint in [
        (("export", tmp_path, tmp_path / "x"), "is not a run directory"),
        (("export", raw_run, tmp_path / "full"), "is already there"),
        (("export", raw_run, tmp_path / "x", "--format", "gguf"), "Unknown format 'gguf'. Available: merged, peft"),
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
