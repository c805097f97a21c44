"""A chat template stands around every prompt, and the rest of the program need not know."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from editcore import EditRequest, FactRecord, ModelError, Probe
from editcore.evaluation import score_targets
from editcore.locate_then_edit import LocateThenEditHParams, fact_rows, optimise_targets
from editcore.locate_then_edit.templates import sample_context_templates
from editcore.locate_then_edit.token_rows import ESSENCE
from editcore.models import LanguageModel
from editcore.models.encoding import continuation_text
from editcore.models.prompt_form import PLAIN, PromptForm, chat_form
from editcore.models.tokens import continuation_row, lookup_row
from editcore.testing import tiny_hf_model, tiny_model, tiny_requests, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn.role }}] {{ turn.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}{% if enable_thinking is true %}<think>{% endif %}"
)
FACT = EditRequest(subject="Anna Berg", prompt="The mother tongue of {} is", target_new="French", target_true="German")
BEFORE, AFTER = "<s>[user] ", " </s>\n[assistant]\n"


def chat_model(template: str | None = TEMPLATE, *, bos: bool = True) -> LanguageModel:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = template
    return LanguageModel.wrap(tiny_hf_model(), tokenizer, name="tiny-chat")


@pytest.fixture
def model() -> LanguageModel:
    made = chat_model()
    made.use_chat_template()
    return made


def test_the_form_is_what_the_template_writes_around_a_users_text(model: LanguageModel) -> None:
    assert model.prompt_form == PromptForm(before=BEFORE, after=AFTER, space=False, special_tokens=False, end="</s>")
    turns = [{"role": "user", "content": FACT.text}]
    ids = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)["input_ids"]
    assert list(model.read_prompt(FACT.text)[0]) == ids


def test_the_beginning_of_text_is_there_once(model: LanguageModel) -> None:
    """The template writes it and the tokenizer would add another."""
    ids, _ = model.read_prompt(FACT.text)
    assert list(ids).count(model.tokenizer.bos_token_id) == 1
    plain, _ = chat_model().read_prompt(FACT.text)
    assert list(plain).count(model.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["{}", "It is late. {}"])
def test_the_subject_is_found_inside_the_turn(model: LanguageModel, template: str) -> None:
    row = lookup_row(model, FACT, template=template)
    text = model.tokenizer.decode(row.ids[: row.lookup + 1])
    assert text == BEFORE + template.replace("{}", "The mother tongue of Anna Berg")
    assert model.tokenizer.decode(row.ids) == BEFORE + template.replace("{}", FACT.text) + AFTER
    last = lookup_row(model, FACT, template=template, fact_token="last")
    assert last.lookup == len(row.ids) - 1


def test_the_target_begins_the_answer(model: LanguageModel) -> None:
    row = continuation_row(model, FACT)
    assert model.tokenizer.decode(row.ids[: row.target_start]) == BEFORE + FACT.text + AFTER
    assert model.tokenizer.decode(row.targets) == "French"
    assert model.tokenizer.decode(continuation_row(chat_model(), FACT).targets) == " French"


def test_scores_are_those_of_the_template_and_the_target_by_hand(model: LanguageModel) -> None:
    [score] = score_targets(model, [FACT.text], ["French"])
    tokenizer = model.tokenizer
    prompt = tokenizer(BEFORE + FACT.text + AFTER, add_special_tokens=False)["input_ids"]
    target = tokenizer("French", add_special_tokens=False)["input_ids"]
    logits = model.hf(input_ids=torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
    nll = -sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(target)) / len(target)
    assert score.nll == pytest.approx(nll, abs=1e-4)
    [plain] = score_targets(chat_model(), [FACT.text], ["French"])
    assert plain.nll != pytest.approx(score.nll, abs=1e-2)


def test_generation_continues_the_template(model: LanguageModel) -> None:
    prompt = model.tokenizer(BEFORE + FACT.text + AFTER, add_special_tokens=False)["input_ids"]
    [ids] = model.generate_ids([prompt], max_new_tokens=4)
    assert model.generate([FACT.text], max_new_tokens=4) == [continuation_text(model.tokenizer, prompt, ids)]
    assert model.generate([FACT.text], max_new_tokens=4, raw=True) == chat_model().generate(
        [FACT.text], max_new_tokens=4
    )


def test_sampled_contexts_are_plain_text(model: LanguageModel) -> None:
    assert sample_context_templates(model, seed=3) == sample_context_templates(chat_model(), seed=3)


def test_values_are_optimised_on_the_template(model: LanguageModel) -> None:
    """An edit of a chat raises its target after the template, where it is asked for."""
    hparams = LocateThenEditHParams(layers=(1,), v_num_grad_steps=10, kl_factor=0.0)
    targets = optimise_targets(
        model, [[fact] for fact in fact_rows(model, [FACT], ("{}",), hparams)], layer=1, hparams=hparams
    )
    [before] = score_targets(model, [FACT.text], ["French"])
    assert targets.probabilities[0] > torch.tensor(-before.nll).exp()
    plain = optimise_targets(
        chat_model(), [[fact] for fact in fact_rows(chat_model(), [FACT], ("{}",), hparams)], layer=1, hparams=hparams
    )
    assert not torch.allclose(plain.deltas, targets.deltas, atol=1e-2)


@pytest.mark.parametrize("position", ["last", "lookup"])
def test_the_target_of_a_chat_is_the_whole_answer(model: LanguageModel, position: str) -> None:
    """Its end is optimised with it, and the essence term reads where the answer begins."""
    settings = {"layers": (1,), "kl_position": position}
    whole = LocateThenEditHParams.model_validate(settings)
    beginning = LocateThenEditHParams.model_validate({**settings, "chat_answer": "beginning"})
    decode = model.tokenizer.decode
    [value] = fact_rows(model, [FACT], ("{}", "It is late. {}"), whole)
    assert [decode(row.targets) for row in value.contexts] == ["French</s>"] * 2
    assert decode(value.row(ESSENCE).ids) == BEFORE + "Anna Berg is a" + AFTER
    assert decode(value.row(ESSENCE).ids[: value.row(ESSENCE).lookup + 1]) == BEFORE + "Anna Berg"
    [value] = fact_rows(model, [FACT], ("{}", "It is late. {}"), beginning)
    assert [decode(row.targets) for row in value.contexts] == ["French"] * 2
    assert decode(value.row(ESSENCE).ids).endswith(AFTER) == (position == "last")
    [plain] = fact_rows(chat_model(), [FACT], ("{}",), whole)
    assert decode(plain.contexts[0].targets) == " French"


@pytest.mark.parametrize("template", ["{{ messages[0].content }} ", "{{ messages[-1].content }} . done"])
def test_a_template_without_an_end_of_the_answer_is_edited_as_before(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert chat_form(tokenizer, name="m").end == ""


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "The tokenizer of m has no chat template, so --chat-template cannot be used"),
        ("{{ raise_exception('no system turn') }}", "The chat template of m cannot be applied: no system turn."),
        ("{{ messages[0].content | upper | replace('G', 'x') }}", "shows a user's text 0 times"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "shows a user's text 2 times"),
        ("{% if %}", "The chat template of m cannot be applied"),
    ],
)
def test_a_template_that_will_not_do_has_its_sentence(template: str | None, sentence: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=sentence):
        chat_form(tokenizer, name="m")


def test_what_is_shown_to_people() -> None:
    assert PLAIN.shown("Rome is in", " Italy") == "Rome is in Italy"
    assert PromptForm(space=False).shown("Where is Rome?", "Italy") == "Where is Rome? → Italy"


def test_a_run_in_chat_form_says_so_and_is_opened_so(
    toys: object, small: Path, facts: Path, editctl: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    import json

    shutil.rmtree(small)
    chat_model().save(small)
    options = ["--model", small, "--dataset", facts, "--edits", 1, "--editor", "toy", "--out", tmp_path / "run"]
    done = editctl("run", *options, "--chat-template")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["chat_template"] is True
    assert record["model"]["prompt_form"]["before"] == BEFORE
    said = editctl("generate", tmp_path / "run", FACT.text, "--tokens", 3)
    assert f"{FACT.text} → " in said.out
    said = editctl("generate", tmp_path / "run", FACT.text, "--tokens", 3, "--no-chat-template")
    assert f"{FACT.text} → " not in said.out
    plain = tmp_path / "plain" / "small"
    tiny_model().save(plain)
    refused = editctl("run", *options[:-1], tmp_path / "other", "--model", plain, "--chat-template")
    assert (refused.code, (tmp_path / "other").exists()) == (2, False)
    assert "has no chat template, so --chat-template cannot be used" in refused.err


def test_records_are_measured_in_chat_form(model: LanguageModel) -> None:
    from editcore.evaluation import CounterFactEvaluator

    [request] = tiny_requests(1)
    record = FactRecord(request=request, probes=(Probe(kind="paraphrase", prompt=f"So {request.text}"),))
    found = CounterFactEvaluator().evaluate(model, [record])
    expected = score_targets(model, [request.text, f"So {request.text}"], [request.target_new] * 2)
    seen = {observation.metric: observation.value for observation in found if observation.metric.endswith("_nll_new")}
    assert seen == pytest.approx({"rewrite_nll_new": expected[0].nll, "paraphrase_nll_new": expected[1].nll}, abs=1e-6)


def test_a_model_speaks_in_chat_form(model: LanguageModel) -> None:
    from editcore import EvaluationContext
    from editcore.evaluation import GenerationEvaluator
    from editcore.evaluation.generation import answer_of

    [request] = tiny_requests(1)
    found = GenerationEvaluator().evaluate(model, [FactRecord(request=request)], EvaluationContext())
    [said] = model.generate([request.text], max_new_tokens=8)
    assert found[0].prompt == request.text
    assert found[0].text == answer_of(said, [".", "\n"], [request.target_new])
    assert model.generate([request.text], max_new_tokens=10, raw=True) != [said]
