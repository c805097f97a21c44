"""A judge of answers: behind an endpoint, and on this machine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from editcore import EvaluationContext, FactRecord, HParamsError, LanguageModel, ModelError, Observation, Plugins, Probe
from editcore.evaluation import GenerationEvaluator, GenerationHParams, measure
from editcore.evaluation.generation_settings import metrics_of
from editcore.evaluation.judging import JUDGEMENTS_NAME, verdict_of
from editcore.runs.parts import make_evaluators
from editcore.testing import StandInServer, tiny_model, tiny_requests

SMALL: dict[str, Any] = {"sample": None, "further": None, "answer_tokens": 5, "continuations": 0, "consequences": 0}


class Court(StandInServer):
    """An endpoint that replies as it is told."""

    def __init__(self) -> None:
        self.reply: Callable[[str], str] = lambda _prompt: "CORRECT"
        self.answer: tuple[int, object] | None = None
        self.models = ["judge"]
        self.after: int | None = None
        self.seconds = 0.0
        self.asked: list[dict[str, Any]] = []
        super().__init__()

    def get(self, path: str) -> tuple[int, object]:
        return (200, {"data": [{"id": name} for name in self.models]}) if path == "/v1/models" else super().get(path)

    def post(self, path: str, body: bytes) -> tuple[int, object]:
        assert path == "/v1/chat/completions"
        self.asked.append(json.loads(body))
        time.sleep(self.seconds)
        if self.answer is not None and len(self.asked) > (self.after or 0):
            return self.answer
        text = self.reply(self.asked[-1]["messages"][0]["content"])
        return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def court() -> Iterator[Court]:
    server = Court()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


def records() -> list[FactRecord]:
    return [
        FactRecord(
            request=request,
            probes=(
                Probe(kind="paraphrase", prompt=f"So {request.text}"),
                Probe(kind="neighborhood", prompt="Where is Rome?", answers=("Italy", "Europe")),
                Probe(kind="neighborhood", prompt="It is not known"),
            ),
        )
        for request in tiny_requests(2)
    ]


def judged(
    model: LanguageModel, settings: dict[str, Any], folder: Path | None = None
) -> tuple[list[Observation], list[str]]:
    """The observations of one measurement, and what it told."""
    told: list[str] = []
    evaluator = GenerationEvaluator(GenerationHParams(**{**SMALL, "elsewhere": 2, **settings}))
    found = evaluator.evaluate(model, records(), EvaluationContext(folder=folder, tell=told.append))
    return found, told


def of_judge(found: Sequence[Observation]) -> list[Observation]:
    return [observation for observation in found if "_judged" in observation.metric]


def test_an_endpoint_judges_every_answer_that_has_a_right_one(
    model: LanguageModel, court: Court, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURT_KEY", "a-secret")
    court.reply = lambda prompt: "INCORRECT" if "So " in prompt else "It is correct."
    settings = {"judge": f"{court.url}/v1/", "judge_key_from": "COURT_KEY", "judge_tokens": 7}
    found, told = judged(model, settings, tmp_path)
    assert told == []
    verdicts = of_judge(found)
    assert [(verdict.metric, verdict.kind, verdict.value) for verdict in verdicts[:3]] == [
        ("facts_judged", "rewrite", 1.0), ("paraphrases_judged", "paraphrase", 0.0),
        ("elsewhere_judged", "neighborhood", 1.0),
    ]  # fmt: skip
    assert len(verdicts) == 6, "there is no right answer to one question about other things"
    assert verdicts[1].text == "INCORRECT"
    assert set(court.keys) == {"Bearer a-secret"}
    body = court.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 7, 0)
    [answer] = [observation for observation in found if observation.metric == "facts_said"][:1]
    prompt = body["messages"][0]["content"]
    assert f"Question: {answer.prompt}\nRight answer: {records()[0].request.target_new}\n" in prompt
    assert f"Their answer: {str(answer.text).strip()}\n" in prompt
    asked = [body["messages"][0]["content"] for body in court.asked]
    assert any("Right answer: Italy or Europe\n" in prompt for prompt in asked)
    assert len(asked) == len(set(asked)), "what is equal is asked once"
    lines = [json.loads(line) for line in (tmp_path / JUDGEMENTS_NAME).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == asked
    assert {line["reply"] for line in lines} == {"INCORRECT", "It is correct."}
    assert "a-secret" not in (tmp_path / JUDGEMENTS_NAME).read_text()


def test_what_is_judged_is_not_judged_again(model: LanguageModel, court: Court, tmp_path: Path) -> None:
    """A judge that fails costs its figures, and nothing else; later it is asked only for the rest."""
    court.answer, court.after = (500, {"error": {"message": "out of order"}}), 2
    settings = {"judge": court.url, "judge_model": "j"}
    found, told = judged(model, settings, tmp_path)
    assert of_judge(found) == []
    assert [observation for observation in found if observation.metric == "facts_said"], "the answers are kept"
    [sentence] = told
    assert sentence.startswith(f"The judge j at {court.url} did not judge all answers: ")
    assert "error 500: out of order" in sentence
    assert len(court.asked) == 3, "it is not asked on"
    with (tmp_path / JUDGEMENTS_NAME).open("a") as file:
        file.write('{"judge": "j at')  # the process was killed here
    court.answer = None
    again, told = judged(model, settings, tmp_path)
    assert told == []
    assert len(of_judge(again)) == 6
    prompts = [body["messages"][0]["content"] for body in court.asked]
    assert len(prompts) == 1 + len(set(prompts)), "only the one that failed was asked twice"
    count = len(prompts)
    assert of_judge(judged(model, settings, tmp_path)[0]) == of_judge(again)
    assert len(court.asked) == count
    found_by_k, _ = judged(model, {**settings, "judge_model": "k"}, tmp_path)
    assert len(court.asked) == 2 * count - 1, "another judge judges for itself"
    assert len(of_judge(found_by_k)) == 6


def test_nonsense_is_no_verdict(model: LanguageModel, court: Court) -> None:
    court.reply = lambda prompt: "Well,\nwho knows" if "So " in prompt else "correct"
    found, [sentence] = judged(model, {"judge": court.url})
    assert [verdict.metric for verdict in of_judge(found)] == ["facts_judged", "elsewhere_judged"] * 2
    assert re.search(r"gave no verdict on \d of \d answers, but for example 'Well, who knows'", sentence)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("CORRECT", True),
        ("Incorrect.", False),
        ("**correct**", True),
        ("That is not correct", False),
        ("not incorrect", None),
        ("CORRECT or INCORRECT", None),
        ("", None),
        ("correctly", None),
        ("<think>Is it correct?</think> INCORRECT", False),
        ("<think>It is correct", None),
    ],
)
def test_verdicts(reply: str, verdict: bool | None) -> None:
    assert verdict_of(reply) is verdict


def test_troubles_of_an_endpoint_are_one_sentence(model: LanguageModel, court: Court) -> None:
    def trouble(**settings: Any) -> str:
        found, [sentence] = judged(model, settings)
        assert of_judge(found) == []
        assert len(found) > 6
        return sentence

    assert "No server answers at http://127.0.0.1:9 (Connection refused)" in trouble(judge="http://127.0.0.1:9")
    court.answer = (200, {"nothing": "here"})
    assert "does not answer as OpenAI's chat completions do" in trouble(judge=court.url)
    court.models = ["one", "two"]
    assert "has the models one, two. Name one: generation.judge_model." in trouble(judge=court.url)
    court.answer, court.models, court.seconds = None, ["one"], 0.3
    slow = trouble(judge=court.url, judge_timeout=0.1)
    assert "did not answer within 0.1 seconds; allow more with generation.judge_timeout" in slow


def test_a_judge_that_is_not_there_is_refused_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(HParamsError, match="NO_KEY is not set"):
        metrics_of(GenerationHParams(judge="http://127.0.0.1:9", judge_key_from="NO_KEY"))
    with pytest.raises(ModelError, match="There is no model folder '/no/such'"):
        metrics_of(GenerationHParams(judge="/no/such"))


def test_a_model_on_this_machine_judges(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "judge"
    model.save(folder)
    seen: list[str] = []
    generate = LanguageModel.generate

    def replying(self: LanguageModel, prompts: Sequence[str], **options: Any) -> list[str]:
        if self.name != str(folder):
            return generate(self, prompts, **options)
        seen.extend(prompts)
        assert options == {"max_new_tokens": 16}
        return ["CORRECT" if "So " in prompt else "INCORRECT" for prompt in prompts]

    monkeypatch.setattr(LanguageModel, "generate", replying)
    evaluators = make_evaluators(
        Plugins.load(), ["generation"], {"generation": {**SMALL, "judge": str(folder), "contexts": ["prompt"]}}
    )
    found = measure(evaluators, model, records())
    values = found.summary.values()
    assert (values["facts_judged"], values["paraphrases_judged"]) == (0.0, 100.0)
    [metric] = [metric for metric in found.measures if metric.key == "facts_judged"]
    assert f"the judge {folder} finds" in metric.meaning
    count = len(seen)
    measure(evaluators, model, records())
    assert count == len(seen) > 0, "the same evaluator remembers"


def test_an_empty_answer_is_wrong_without_asking(
    model: LanguageModel, court: Court, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "generate", lambda self, prompts, **_: [" \n"] * len(prompts))
    found, told = judged(model, {"judge": court.url})
    assert {verdict.value for verdict in of_judge(found)} == {0.0}
    assert (court.asked, told) == ([], [])
