"""Free generation in other contexts than the bare prompt: questions, chats, thoughts and random texts in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from editcore import EditRequest, EvaluationContext, FactRecord, LanguageModel, ModelError, Observation, Plugins, Probe
from editcore.evaluation import GENERATION, GenerationEvaluator, GenerationHParams, measure, retention_of
from editcore.evaluation.contexts import Way, after_thought, as_question, possible_forms, ways_of
from editcore.evaluation.generation import answer_of, is_said
from editcore.models.prompt_form import PLAIN, PromptForm
from editcore.runs.parts import make_evaluators
from editcore.testing import tiny_hf_model, tiny_model, tiny_requests, tiny_tokenizer

ASKS = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}[assistant]\n"
THINKS = ASKS + "{% if enable_thinking is true %}<think>{% endif %}"
EVERYTHING: dict[str, Any] = {
    "sample": None, "further": None, "elsewhere": 9, "paraphrases": 9, "answer_tokens": 5, "question_tokens": 9,
    "thinking_tokens": 4,
}  # fmt: skip


def talker(template: str | None = THINKS, *, seed: int = 0) -> LanguageModel:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return LanguageModel.wrap(tiny_hf_model(seed=seed), tokenizer, name="tiny-chat")


def records() -> list[FactRecord]:
    """Facts with a question, and one that has none."""
    found = []
    for request in tiny_requests(3):
        bare = request.prompt.replace("{}", "Nobody")
        found.append(
            FactRecord(
                request=request,
                probes=(
                    Probe(kind="paraphrase", prompt=f"So {request.text}"),
                    Probe(kind="neighborhood", prompt=bare, answers=("here",)),
                    Probe(kind="locality", prompt="Where is Rome?", answers=("in Italy",)),
                ),
                extra={"question": "What about {}?"},
            )
        )
    last = found[-1]
    return [*found[:-1], last.model_copy(update={"extra": {}})]


def observed(model: LanguageModel, unedited: Sequence[Observation] | None = None, **settings: Any) -> list[Observation]:
    hparams = GenerationHParams(**{**EVERYTHING, **settings})
    return GenerationEvaluator(hparams).evaluate(model, records(), EvaluationContext(unedited=unedited, seed=5))


def by_metric(found: Sequence[Observation], metric: str) -> list[Observation]:
    return [observation for observation in found if observation.metric == metric]


def test_the_bare_prompt_alone_is_asked_unless_more_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    generate = LanguageModel.generate

    def counting(self: LanguageModel, prompts: Sequence[str], **options: Any) -> list[str]:
        asked.extend(prompts)
        return generate(self, prompts, **options)

    monkeypatch.setattr(LanguageModel, "generate", counting)
    found = observed(talker(), continuations=0)
    assert set(asked) == {observation.prompt for observation in found}
    silent = {"unchanged", "distinct_bigrams", "consequences_said"}
    assert {observation.metric for observation in found} == {metric.name for metric in GENERATION.metrics} - silent
    assert GenerationHParams().ways == (Way(),)


@pytest.mark.parametrize("context", ["question", "instruction", "chat"])
def test_a_context_has_the_answers_to_its_own_text(context: Any) -> None:
    """Each prompt as a question, in the text that the context has, alone and written out by hand."""
    model = talker()
    found = observed(model, contexts=(context,), instruction="Do: {question}!")
    plain = talker()
    form = {"chat": ("[user] ", "\n[assistant]\n"), "question": ("", ""), "instruction": ("Do: ", "!")}[context]
    targets = {record.request.id: record.request for record in records()}
    seen = 0
    for observation in found:
        prompt = (
            observation.prompt.removeprefix("Do: ").removesuffix("!")
            if context == "instruction"
            else observation.prompt
        )
        if context == "chat":
            ids = plain.tokenizer(f"{form[0]}{prompt}{form[1]}", add_special_tokens=False)["input_ids"]
            [new] = plain.generate_ids([ids], max_new_tokens=9)
            said = plain.tokenizer.decode([*ids, *new], skip_special_tokens=True).partition("[assistant]\n")[2]
        else:
            [said] = plain.generate([form[0] + prompt + form[1]], max_new_tokens=9, raw=True)
        wanted = {"neighborhood": ("here",), "locality": ("in Italy",)}.get(observation.kind) or (
            targets[observation.request_id].target_new,
        )
        assert observation.text == answer_of(said, (".", "\n"), wanted), observation
        if observation.metric == f"elsewhere_correct_{context}":
            assert observation.value == is_said(wanted, str(observation.text))
            seen += 1
    requests = tiny_requests(3)
    assert [observation.prompt for observation in by_metric(found, f"facts_said_{context}")] == [
        text if context != "instruction" else f"Do: {text}!"
        for text in [
            *(f"What about {request.subject}?" for request in requests[:2]),
            *([requests[2].text] if context == "chat" else []),
        ]
    ]
    assert seen == (6 if context == "chat" else 5), "the statement of a record without a question is asked in a chat"


def test_questions_of_records() -> None:
    request = EditRequest(subject="Ada", prompt="{} lives in", target_new="Rome", id="a")
    record = FactRecord(request=request, extra={"question": "Where does {} live?"})
    assert as_question(record, "Ada lives in") == "Where does Ada live?"
    assert as_question(record, "Bob lives in") == "Where does Bob live?"
    assert as_question(record, "The home of Ada is") is None
    assert as_question(record, "Who? ") == "Who? "
    assert as_question(record, " lives in") is None, "nobody is asked about"
    probe = Probe(kind="paraphrase.question", prompt="Ada's home?")
    of_probe = FactRecord(request=request, probes=(probe,), extra={"question": 3})
    assert as_question(of_probe, "Ada lives in") == "Ada's home?"
    assert as_question(of_probe, "Bob lives in") is None


def test_a_random_text_is_the_same_before_and_after() -> None:
    settings: dict[str, Any] = {"contexts": ("prompt", "chat", "question"), "prefixes": (0, 6)}
    before = observed(talker(), **settings)
    other_talker = talker(seed=1)
    after = observed(other_talker, before, **settings)
    for suffix in ("_after_6", "_chat_after_6"):
        prompts = [
            [observation.prompt for observation in by_metric(found, f"facts_said{suffix}")] for found in (before, after)
        ]
        assert prompts[0] == prompts[1]
        bodies = [
            observation.prompt for observation in by_metric(before, "facts_said" + suffix.removesuffix("_after_6"))
        ]
        texts = [prompt.removesuffix(body) for prompt, body in zip(prompts[0], bodies, strict=True)]
        assert len(set(texts)) == 3, "a text of its own for each fact"
        for text in texts:
            assert text.endswith(". ")
            assert 2 <= len(other_talker.read_text(text.removesuffix(". "))) <= 8
    compared = by_metric(after, "unchanged_chat_after_6")
    was = {
        (observation.request_id, observation.prompt): observation.text
        for observation in by_metric(before, "elsewhere_answered_chat_after_6")
    }
    assert len(compared) == 6
    for observation in compared:
        assert observation.value == (
            str(observation.text).strip() == str(was[observation.request_id, observation.prompt]).strip()
        )
    assert len(by_metric(after, "unchanged_question_after_6")) == 5, "also of a fact that is no question itself"
    again = observed(talker(), before, **settings)
    assert {observation.value for observation in again if observation.metric.startswith("unchanged")} == {1.0}
    assert [observation.prompt for observation in observed(other_talker, **settings)] != [
        observation.prompt for observation in after
    ], "it writes others"


def test_a_thought_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    request = tiny_requests(1)[0]
    limits: list[Any] = []

    def thinks(self: LanguageModel, prompts: Sequence[str], **options: Any) -> list[str]:
        limits.append(options["max_new_tokens"])
        assert self.prompt_form.after.endswith("<think>")
        return [f" {request.target_new}. No.</think>\n\nIt is {request.target_new}. Yes" for _ in prompts]

    monkeypatch.setattr(LanguageModel, "generate", thinks)
    model = talker()
    found = observed(model, contexts=("thinking",))
    said = by_metric(found, "facts_said_thinking")
    assert said[0].text == f"\n\nIt is {request.target_new}"
    assert {limit for part in limits for limit in part} == {9 + 4}
    assert model.prompt_form == PLAIN


@pytest.mark.parametrize(
    ("text", "after", "answer"),
    [
        ("so </think> Rome", "<think>", " Rome"),
        ("<think> so </think> Rome", "", " Rome"),
        ("so it is", "<think>\n", ""),
        ("<think> so it is", "", ""),
        ("Rome", "", "Rome"),
    ],
)
def test_after_thought(text: str, after: str, answer: str) -> None:
    assert after_thought(text, PromptForm(after=after)) == answer


def test_a_context_that_a_tokenizer_has_not_is_left_out() -> None:
    plain, asks = talker(None), talker(ASKS)
    assert set(possible_forms(plain, ("prompt", "chat", "thinking"))) == {"prompt"}
    assert set(possible_forms(asks, ("thinking", "chat"))) == {"chat"}
    assert {observation.metric for observation in observed(asks, contexts=("chat", "thinking"))}.isdisjoint(
        {"facts_said_thinking"}
    )
    with pytest.raises(ModelError, match="has no chat template"):
        observed(plain, contexts=("chat",))
    with pytest.raises(ModelError, match="does not know enable_thinking"):
        observed(asks, contexts=("thinking",))


def test_metrics_of_other_contexts_are_announced_where_they_are_asked_for() -> None:
    plugins = Plugins.load()
    settings = {"generation": {**EVERYTHING, "contexts": ["chat", "question"], "prefixes": [0, 3]}}
    evaluators = make_evaluators(plugins, ["generation"], settings)
    names = [metric.name for metric in evaluators[0][0].metrics]
    assert names[: len(GENERATION.metrics)] == [metric.name for metric in GENERATION.metrics]
    suffixes = ("_chat", "_chat_after_3", "_question", "_question_after_3")
    assert [name for name in names if name.startswith("facts_said_") and "first" not in name] == [
        f"facts_said{suffix}" for suffix in suffixes
    ]
    found = measure(evaluators, talker(), records())
    retention = retention_of(found.measures, set(found.summary.averages))
    assert retention is not None
    assert retention.key == "facts_said_chat", "the first context stands in for the bare prompt, which is not asked"
    assert "with thinking off" in retention.meaning
    assert "facts_said" not in found.summary.values()


def test_ways() -> None:
    assert ways_of(("chat", "prompt"), (5, 0, 5)) == (
        Way(), Way("chat", 5), Way("chat", 0), Way("prompt", 5),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"contexts": ()}, "contexts"),
        ({"contexts": ("chat", "chat")}, "chat comes twice"),
        ({"contexts": ("dialogue",)}, "contexts"),
        ({"prefixes": (-1,)}, "prefixes"),
        ({"instruction": "Answer!"}, "it has no {question}"),
        ({"judge_prompt": "{right}? {question}"}, "it has no {answer}"),
        ({"judge": "http://me:key@localhost"}, "is recorded"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GenerationHParams(**fields)


def test_a_model_of_a_chat_session_is_asked_in_its_chat() -> None:
    """The bare prompt is in the form of the session; a question alone is not."""
    model = talker()
    model.use_chat_template()
    form = model.prompt_form
    found = observed(model, contexts=("prompt", "question"))
    [said] = model.generate([records()[0].request.text], max_new_tokens=5)
    target = records()[0].request.target_new
    assert by_metric(found, "facts_said")[0].text == answer_of(said, (".", "\n"), (target,))
    [plain] = tiny_model().generate(["What about " + str(records()[0].request.subject) + "?"], max_new_tokens=9)
    assert by_metric(found, "facts_said_question")[0].text == answer_of(plain, (".", "\n"), (target,))
    assert model.prompt_form == form
