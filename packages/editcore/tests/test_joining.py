"""A prompt is kept as it was written, and what joins it to a target follows from its last character or is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from editcore import EditcoreError, EditRequest, EditSession, FactRecord, Plugins, Probe, RequestError
from editcore.datasets import KnownFact, check_requests, load_known_facts, load_records
from editcore.evaluation import CounterFactEvaluator, score_targets
from editcore.evaluation.generation import is_said
from editcore.interfaces.joining import separator
from editcore.ledger import Ledger
from editcore.models import LanguageModel, join_continuation, target_losses
from editcore.models.tokens import continuation_row, lookup_row
from editcore.onboarding.causal_tracing import _tokenise
from editcore.runs.record import read_requests
from editcore.testing import tiny_model

SPACED = [
    "The Louvre is in", "Answer:", "He said “yes”", 'He said "yes"', "f(x)", "don't", "James'", "the `code`", "It is 5",
    "« Oui »", "„Ja“", "»Ja«", "”Hej”", "대한민국의 수도는", "Столица — это город", "राजधानी", "well, yes.", "a/",
    "“ yes ”", "„ Ja “", "‚ a ‘", "‘ a ’", "» Ja «", "‹ a ›", "› a ‹", "« a » « b »",
]  # fmt: skip
JOINED = [
    "### Response:\n", "It is ", "key\t", "full\u3000", "no\u00a0", '{"country": "', '{"country":"', "x = '",
    "He said “", "Er sagte: „", "Er sagte: »", "Il dit : «", "Han sa ”", "the `", "(", "a [", "¿", "—“", '("',
    "卢浮宫位于", "ルーブルは「", "「ルーブル」", "首都：", "พิพิธภัณฑ์ลูฟวร์ตั้งอยู่ที่", "ປະເທດ", "រាជធានី", "မြို့တော်",
    "ក\u200b", "", "¡", "« a » «", *(f"x{before}'" for before in ":=,-–—"),
]  # fmt: skip


WITHOUT_SPACES = (
    "\u0e01\u0e81\u1000\u1780\u19e0\u2e80\u3042\u3105\u3190\u3400\u4e00\ua9e0\uaa60\uf900\ufe30\uff21"
    "\U0001b000\U00020000"
)
"""A character of each script that writes words without spaces, and of each later addition to it."""


@pytest.mark.parametrize("text", SPACED)
def test_a_space_follows_scripts_that_separate_words(text: str) -> None:
    assert separator(text) == " "


@pytest.mark.parametrize("text", JOINED)
def test_nothing_follows_white_space_what_opens_and_scripts_without_spaces(text: str) -> None:
    assert separator(text) == ""


@pytest.mark.parametrize("character", WITHOUT_SPACES, ids=lambda character: f"{ord(character):x}")
def test_nothing_follows_a_character_of_a_script_without_spaces(character: str) -> None:
    assert separator(f"is {character}") == ""


# Requests


def request(prompt: str, **more: object) -> EditRequest:
    return EditRequest(**{"subject": "Paris", "prompt": prompt, "target_new": "Italy", **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["Where is {}?\n### Response:\n", "{} is in ", "\t{} lies in", '{"{}": "'])
def test_a_prompt_is_kept_to_the_character(prompt: str) -> None:
    fact = request(prompt)
    assert fact.text == prompt.replace("{}", "Paris", 1)
    assert fact.continuation == separator(fact.text) + "Italy"
    assert EditRequest.model_validate_json(fact.model_dump_json()) == fact


def test_other_fields_are_stripped_and_a_blank_prompt_is_refused() -> None:
    fact = EditRequest(subject=" Paris ", prompt="{} is in", target_new=" Italy\n", target_true=" France", tags=(" a",))
    assert (fact.subject, fact.target_new, fact.target_true, fact.tags) == ("Paris", "Italy", "France", ("a",))
    for blank in ("", "  \n"):
        with pytest.raises(RequestError, match="prompt"):
            EditRequest.create(prompt=blank, target_new="Italy")
    with pytest.raises(RequestError, match="target_new"):
        EditRequest.create(prompt="Paris is in", target_new="  ")


def test_join_is_part_of_what_a_request_is() -> None:
    plain, glued, spaced = request("{} is in"), request("{} is in", join=""), request("{} is in", join=" ")
    assert [fact.continuation for fact in (plain, glued, spaced)] == [" Italy", "Italy", " Italy"]
    assert len({plain.id, glued.id, spaced.id, request("{} is in ").id}) == 4
    assert "ask the same" in check_requests([plain, spaced])[1][0]
    assert "contradict each other" in check_requests([plain, glued])[1][0]


# Tokens


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


def pieces(model: LanguageModel, prompt: str, target: str, **more: str | None) -> list[str]:
    ids, start = join_continuation(model, prompt, model.read_prompt(prompt)[0], target, **more)
    assert ids[:start] == model.read_prompt(prompt)[0], "the prompt's own tokens stay"
    return [model.tokenizer.decode(part) for part in (ids[:start], ids[start:])]


@pytest.mark.parametrize(
    ("prompt", "join", "target"),
    [
        ("It is in", None, " Italy"),
        ("It is in", "", "Italy"),
        ("It is in", "\n", "\nItaly"),
        ("It is in\n", None, "Italy"),
        ("It is in ", None, "Italy"),
        ("It is in  ", None, "Italy"),
        ('"country": "', None, "Italy"),
        ("它在", None, "Italy"),
        ("它在", " ", " Italy"),
    ],
)
def test_targets_follow_the_prompt_everywhere(model: LanguageModel, prompt: str, join: str | None, target: str) -> None:
    assert pieces(model, prompt, "Italy", join=join) == [f"<s>{prompt}", target]
    named = {"subject": "It", "prompt": "{}" + prompt[2:]} if prompt.startswith("It") else {"prompt": prompt}
    fact = EditRequest.create(**named, target_new="Italy", join=join)
    prompt_ids, _ = model.read_prompt(prompt)
    ids, start = join_continuation(model, prompt, prompt_ids, "Italy", join=join)
    log_p = model.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = -sum(float(log_p[at - 1, ids[at]]) for at in range(start, len(ids))) / (len(ids) - start)
    [score] = score_targets(model, [prompt], ["Italy"], joins=[join])
    assert (score.nll, score.num_tokens) == (pytest.approx(by_hand, abs=1e-4), len(ids) - start)
    assert float(target_losses(model, [fact])[0]) == pytest.approx(by_hand, abs=1e-4)
    [found] = [observation for observation in CounterFactEvaluator().evaluate(model, [FactRecord(request=fact)])
               if observation.metric == "rewrite_nll_new"]  # fmt: skip
    assert found.value == pytest.approx(by_hand, abs=1e-4)
    if fact.subject:
        assert continuation_row(model, fact).ids == ids
        traced = _tokenise(model, KnownFact("It", prompt, "Italy", join))
        assert (traced.ids, traced.end) == (ids, start)
        within = continuation_row(model, fact, template="So it goes. {}")
        assert model.tokenizer.decode(within.targets) == target
        assert within.ids[: within.target_start] == lookup_row(model, fact, template="So it goes. {}").ids


def test_a_prompt_that_ends_in_a_letter_has_the_tokens_of_both_together(model: LanguageModel) -> None:
    for prompt, target in [("My name is", "Bob"), ("Marie Curie was born in", "Rome and Berlin"), ("It is 5", "pm")]:
        ids, _ = join_continuation(model, prompt, model.read_prompt(prompt)[0], target)
        assert ids == tuple(model.tokenizer(f"{prompt} {target}")["input_ids"])


def test_probes_are_joined_by_their_own_last_character(model: LanguageModel) -> None:
    probe = Probe(kind="paraphrase", prompt="It lies in", answers=("Italy",))
    record = FactRecord(request=EditRequest(prompt="It is in", target_new="Italy", join=""), probes=(probe,))
    found = {observation.metric: observation.value for observation in CounterFactEvaluator().evaluate(model, [record])}
    expected = score_targets(model, ["It is in", "It lies in"], ["Italy", "Italy"], joins=["", None])
    assert [found["rewrite_nll_new"], found["paraphrase_nll_new"]] == pytest.approx([score.nll for score in expected])


@pytest.mark.parametrize(
    ("answer", "text", "said", "first"),
    [
        ("France", " the south of France", True, False),
        ("France", '": "France", "capital"', True, True),
        ("France", "Franceville", False, False),
        ("法国", "法国的南部。", True, True),
        ("法国", "它在法国", True, False),
        ("Paris", "在Paris附近", True, False),
        ("ลอนดอน", "กรุงลอนดอนครับ", True, False),
    ],
)
def test_a_word_without_spaces_around_it_is_said(answer: str, text: str, said: bool, first: bool) -> None:
    assert (is_said([answer], text), is_said([answer], text, first=True)) == (said, first)


# Files


def test_files_keep_prompts_and_joins(tmp_path: Path) -> None:
    facts = [
        {"subject": "Paris", "prompt": "Where is {}?\n", "target_new": "Rome", "target_true": "France"},
        {"subject": "Paris", "prompt": "{} is in", "target_new": "Rome", "join": "", "target_true": "France",
         "paraphrase_prompts": ["So where is it?\n"], "probes": [{"kind": "p", "prompt": "It is\t", "answers": ["x"]}]},
        {"subject": "Paris", "prompt": "Paris is in\n", "target": "Rome", "join": " "},
    ]  # fmt: skip
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    notes: list[str] = []
    records = load_records(path, plugins=Plugins.load(), notes=notes)
    assert [record.request.prompt for record in records] == ["Where is {}?\n", "{} is in", "{} is in\n"]
    assert [record.request.join for record in records] == [None, "", " "]
    assert [probe.prompt for probe in records[1].probes] == ["So where is it?\n", "It is\t"]
    assert notes == []
    known = load_known_facts(path, plugins=Plugins.load())
    assert [(fact.prompt, fact.join) for fact in known] == [("Where is Paris?\n", None), ("Paris is in", "")]
    path.write_text(json.dumps({**facts[1], "join": 3}) + "\n")
    with pytest.raises(EditcoreError, match=r"line 1: The field 'join' is int \(3\); expected text"):
        load_records(path, plugins=Plugins.load())


def test_a_space_at_the_end_of_published_prompts_is_the_answers(tmp_path: Path) -> None:
    rewrite = {"subject": "Paris", "prompt": "{} is in ", "target_new": {"str": "Rome"}, "target_true": {"str": "x"}}
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"requested_rewrite": rewrite, "paraphrase_prompts": ["Paris, in "]}]))
    [record] = load_records(path, plugins=Plugins.load())
    assert (record.request.prompt, record.probes[0].prompt) == ("{} is in", "Paris, in")


def test_a_fact_in_a_run_keeps_its_prompt_and_join(
    toys: object, small: Path, editctl: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    path = tmp_path / "facts.jsonl"
    fact = {"subject": "Paris", "prompt": "Where is {}?\n", "target_new": "Rome", "join": "="}
    path.write_text(json.dumps(fact))
    out = tmp_path / "run"
    done = editctl("run", "--model", small, "--dataset", path, "--editor", "toy", "--out", out)
    assert done.code == 0, done.err
    [kept], [written] = read_requests(out), Ledger.read(out).facts()
    assert kept.request == written
    assert (written.text, written.join, written.continuation) == ("Where is Paris?\n", "=", "=Rome")


def test_the_command_edit_takes_a_join(
    toys: object, small: Path, editctl: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[EditRequest] = []
    edit = EditSession.edit

    def noting(self: EditSession, requests: list[EditRequest], **more: object) -> object:
        asked.extend(requests)
        return edit(self, requests, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(EditSession, "edit", noting)
    options = ["--model", small, "--editor", "toy", "--subject", "Paris", "--target", "Rome", "--tokens", 2]
    for more, prompt, continuation in [
        ([], "Where is {}?\n", "Rome"), (["--join", ""], "{} is in", "Rome"), ([], "{} is in", " Rome"),
    ]:  # fmt: skip
        done = editctl("edit", *options, "--prompt", prompt, *more)
        assert done.code == 0, done.err
        assert (asked[-1].prompt, asked[-1].continuation) == (prompt, continuation)
