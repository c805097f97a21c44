"""A session edits, measures, speaks with and without its edits, and asks its extensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import (
    AfterEvaluation,
    EditcoreError,
    EditEvidence,
    EditRequest,
    EditSession,
    EvaluationContext,
    FactoredDelta,
    FactRecord,
    HParamsError,
    LanguageModel,
    ModelError,
    NumericalError,
    PluginError,
    Plugins,
    Probe,
    RequestError,
    SessionConfig,
    StatisticsError,
    UnknownNameError,
)
from editcore.evaluation import CounterFactEvaluator, GenerationEvaluator
from editcore.evaluation.generation import answer_of
from editcore.interfaces import LedgerEntry
from editcore.ledger import Ledger, write_ledger
from editcore.models import DEFAULT_MODEL
from editcore.runs.saying import not_said
from editcore.testing import tiny_model, tiny_requests
from torch import Tensor

Open = Callable[..., EditSession]
FACTS = tiny_requests(6)


@pytest.fixture
def open_session(toys: Any, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a session of the toy editor on a new tiny model."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))

    def _open(model: LanguageModel | None = None, *, editor: str = "toy", **options: Any) -> EditSession:
        own = options.pop("toy", {})
        settings = {editor: {"layers": [1], **own}, **options.pop("settings", {})}
        places = {name: options.pop(name) for name in ("directory", "records", "registry") if name in options}
        return EditSession.open(
            model or tiny_model(),
            SessionConfig(editor=editor, settings=settings, corpus=str(corpus_file), corpus_tokens=1024, **options),
            **places,
        )

    return _open


def bits(model: LanguageModel) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Editing


def test_what_is_written_and_not_said_is_told(open_session: Open, tmp_path: Path) -> None:
    session = open_session(directory=tmp_path / "run", toy={"v_num_grad_steps": 2, "v_lr": 1e-3})
    session.edit(FACTS[:1], batch_size=1)
    [result] = session.edit(FACTS[1:], batch_size=6)
    figures = {figure.request_id: figure.figures for figure in result.proposal.evidence}
    for request in FACTS[1:]:
        ids = session.model.tokenizer(request.text)["input_ids"]
        whole = session.model.tokenizer(f"{request.text} {request.target_new}")["input_ids"]
        logits = session.model.hf(input_ids=torch.tensor([whole])).logits[0, len(ids) - 1 : -1]
        wanted = torch.tensor(whole[len(ids) :])
        mean = logits.log_softmax(-1).gather(1, wanted[:, None]).mean()
        assert figures[request.id]["said_probability"] == pytest.approx(float(mean.exp()), rel=1e-4)
        assert figures[request.id]["said"] == float(bool((logits.argmax(-1) == wanted).all()))
    assert not any(figure["said"] for figure in figures.values())
    assert result.not_said.startswith("5 of 5 facts are not what the model says to the bare prompt")
    assert result.not_said.count(" → ") == 3
    assert "2 more. The optimisation ended low, too" in result.not_said
    kept = Ledger.read(tmp_path / "run").entries[1].evidence
    assert {evidence.request_id: evidence.figures for evidence in kept} == figures


def test_what_is_not_said_is_told_with_its_likely_cause() -> None:
    def told(*probabilities: tuple[float, float]) -> str:
        found = [
            EditEvidence(
                request_id=request.id, figures={"said": 0.0, "said_probability": now, "target_probability": then}
            )
            for request, (now, then) in zip(FACTS, probabilities, strict=False)
        ]
        return not_said(FACTS, found)

    assert told() == not_said([], []) == ""
    assert "The fact is not what the model says" in told((0.03, 0.9))
    assert "The optimisation had reached" in told((0.03, 0.9))
    assert "The optimisation ended low, too" in told((0.03, 0.1), (0.1, 0.2))
    assert "reached" not in told((0.03, 0.1), (0.1, 0.2))
    both = told((0.1, 0.9), (0.02, 0.1))
    assert both.index("0.02") < both.index("0.1)"), "the least likely one first"
    assert "The optimisation of 1 of the 2 ended low" in both
    assert "The optimisation of 1 of the 2 had reached" in both
    unknown = not_said(FACTS, [EditEvidence(request_id=FACTS[0].id, figures={"said": 0.0, "said_probability": 0.1})])
    assert "optimisation" not in unknown, "an editor that tells nothing of one has perhaps none"
    said = [EditEvidence(request_id=fact.id, figures={"said": 1.0, "said_probability": 0.9}) for fact in FACTS]
    assert not_said(FACTS, said) == ""
    assert not_said(FACTS, [replace(evidence, replayed=True, figures={}) for evidence in said]) == ""


def test_a_session_from_beginning_to_end(open_session: Open, tmp_path: Path) -> None:
    session = open_session()
    base = bits(session.model)
    said = session.generate([FACTS[0].text], max_new_tokens=5)

    results = session.edit(FACTS, batch_size=4)
    assert [(r.batch.index, r.batch.num_new, r.applied, r.reason) for r in results] == [
        (0, 4, True, ""),
        (1, 2, True, ""),
    ]
    assert session.requests == FACTS
    edited = bits(session.model)
    assert [name for name in base if not torch.equal(base[name], edited[name])] == [session.model.layout.weight_name(1)]

    records = [
        FactRecord(request=request, probes=(Probe(kind="paraphrase", prompt=f"So {request.text}"),))
        for request in FACTS
    ]
    found = session.evaluate(records)
    asked = dict.fromkeys(
        (observation.request_id, observation.kind) for observation in found.observations["counterfact"]
    )
    assert list(asked) == [(fact.id, kind) for fact in FACTS for kind in ("rewrite", "paraphrase")]
    assert found.summary.facts == {"counterfact": 6, "generation": 6}
    assert found.measures == session.measures
    expected = CounterFactEvaluator().evaluate(session.model, records)
    assert found.observations["counterfact"] == tuple(expected)
    assert same(bits(session.model), edited)

    assert session.generate_unedited([FACTS[0].text], max_new_tokens=5) == said
    assert same(bits(session.model), edited)
    session.save(tmp_path / "saved")
    assert same(bits(LanguageModel.load(str(tmp_path / "saved"))), edited)
    session.close()
    assert same(bits(session.model), base)


def test_the_edits_are_back_when_speaking_without_them_fails(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session()
    session.edit(FACTS[:2])
    edited = bits(session.model)
    monkeypatch.setattr(session.model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.generate_unedited(["A"])
    assert same(bits(session.model), edited)


def test_a_fact_edited_again_counts_once(open_session: Open) -> None:
    session = open_session()
    anew = FACTS[0].model_copy(update={"target_new": "Madrid", "id": "anew"})
    session.edit(FACTS[:3])
    session.edit([anew])
    assert session.requests == (*FACTS[1:3], anew)


def test_batches_have_as_many_facts_as_the_editor_takes(open_session: Open) -> None:
    session = open_session(editor="toy-pairs")
    assert session.max_batch == 2
    assert [len(result.batch) for result in session.edit(FACTS[:5])] == [2, 2, 1]
    assert [len(result.batch) for result in session.edit(FACTS[5:], batch_size=7)] == [1]


def test_a_resumed_session_has_the_same_bits_and_goes_on(open_session: Open, tmp_path: Path) -> None:
    whole = open_session()
    whole.edit(FACTS, batch_size=2)
    first = open_session(directory=tmp_path / "run")
    first.edit(FACTS[:4], batch_size=2)
    resumed = open_session(directory=tmp_path / "run")
    assert same(bits(resumed.model), bits(first.model))
    [result] = resumed.edit(FACTS[4:])
    assert result.batch.index == 2
    assert same(bits(resumed.model), bits(whole.model))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "There is nothing to edit: the list of requests is empty."),
        ([FACTS[0], FACTS[0]], r"A request is twice in one batch: 'Marie Curie was born in' → 'Paris'\."),
        (
            [FACTS[0], FACTS[0].model_copy(update={"target_new": "Rome", "id": "x"})],
            r"Two requests of one batch contradict each other: .* → 'Paris' and → 'Rome'",
        ),
        (
            [FACTS[0], FACTS[1].model_copy(update={"id": FACTS[0].id})],
            "Two requests of one batch have the id 'tiny-0'",
        ),
    ],
)
def test_a_list_that_cannot_be_edited_is_refused(open_session: Open, requests: list[EditRequest], message: str) -> None:
    session = open_session()
    base = bits(session.model)
    with pytest.raises(RequestError, match=message):
        session.edit(requests)
    assert (session.ledger.entries, session.next_batch) == ([], 0)
    assert same(bits(session.model), base)


def test_a_batch_has_at_least_one_fact(open_session: Open) -> None:
    with pytest.raises(RequestError, match="batch_size is 0"):
        open_session().edit(FACTS, batch_size=0)


# Measuring


def elsewhere() -> list[FactRecord]:
    """The facts with a question about something else."""
    return [
        FactRecord(request=request, probes=(Probe(kind="neighborhood", prompt=f"{number} was born in"),))
        for number, request in enumerate(FACTS)
    ]


def test_what_compares_is_handed_the_unedited_model(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured where it is not known yet, with the edits out meanwhile, and once."""
    session = open_session(evaluators=["generation", "rewrites"], toy={"clamp_norm_factor": 20.0})
    base = session.model.fingerprint()
    session.edit(FACTS)
    edited = session.model.fingerprint()
    seen: list[tuple[bool, tuple[str, ...], bool]] = []
    evaluate = GenerationEvaluator.evaluate

    def spied(self: Any, model: LanguageModel, records: Any, context: EvaluationContext) -> Any:
        unedited = model.fingerprint() == base
        seen.append((unedited, tuple(record.request.id for record in records), context.unedited is None))
        return evaluate(self, model, records, context)

    monkeypatch.setattr(GenerationEvaluator, "evaluate", spied)
    records, ids = elsewhere(), tuple(request.id for request in FACTS)
    first = session.evaluate(records[:2])
    assert seen == [(True, ids[:2], True), (False, ids[:2], False)]
    assert session.model.fingerprint() == edited
    seen.clear()
    whole = session.evaluate(records)
    assert seen == [(True, ids[2:], True), (False, ids, False)], "what is known is not measured again"
    seen.clear()
    assert session.evaluate(records) == whole
    assert seen == [(False, ids, False)]
    prompts = [record.probes[0].prompt for record in records]
    was, now = session.generate_unedited(prompts, max_new_tokens=10), session.generate(prompts, max_new_tokens=10)
    expected = [answer_of(earlier, ".\n") == answer_of(later, ".\n") for earlier, later in zip(was, now, strict=True)]
    found = [observation for observation in whole.observations["generation"] if observation.metric == "unchanged"]
    assert [(observation.request_id, observation.value) for observation in found] == list(
        zip(ids, expected, strict=True)
    )
    assert not all(expected), "the edits do harm"
    assert first.summary.averages["unchanged"].facts == 2


def test_a_measured_base_model_is_remembered(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(evaluators=["generation"])
    records = elsewhere()
    before = session.evaluate_unedited(records)
    assert "unchanged" not in before.summary.values()
    with monkeypatch.context() as patch:
        patch.setattr(session.edited, "unedited", lambda: 1 / 0)
        assert session.evaluate(records).summary.value("unchanged") == 100.0
    session.edit(FACTS[:2])
    weights = bits(session.model)
    assert session.evaluate_unedited(records) == before
    assert same(bits(session.model), weights)
    monkeypatch.setattr(session.edited, "unedited", lambda: 1 / 0)
    after = session.evaluate(records)

    resumed = open_session(evaluators=["generation"])
    resumed.remember_unedited(before, records)
    resumed.edit(FACTS[:2])
    monkeypatch.setattr(resumed.edited, "unedited", lambda: 1 / 0)
    assert resumed.evaluate(records) == after


def test_evaluators_have_settings_and_extensions_are_told_everything(open_session: Open, toys: Any) -> None:
    session = open_session(
        evaluators=["rewrites", "generation"],
        settings={"generation": {"sample": 1, "continuations": 0}},
        plugins=["first"],
    )
    session.edit(FACTS[:2])
    records = elsewhere()[:2]
    told: list[AfterEvaluation] = session.extensions["first"].evaluations  # type: ignore[attr-defined]
    found = session.evaluate(records, phase="2")
    [event] = told
    assert (event.model, event.phase, event.num_edits, event.records) == (session.model, "2", 2, tuple(records))
    assert event.observations == found.observations
    assert event.scores == found.summary.values()
    assert event.scores["won"] == 100.0
    assert event.scores["length"] == sum(len(fact.text) for fact in FACTS[:2]) / 2
    assert found.summary.facts == {"rewrites": 2, "generation": 1}
    session.evaluate_unedited(records)
    assert [evaluation.phase for evaluation in told] == ["2", "before"]
    assert "unchanged" in event.scores
    assert "unchanged" not in told[1].scores


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"evaluators": ["generatoin"]},
            UnknownNameError,
            "Unknown evaluator 'generatoin'.* Did you mean 'generation'",
        ),
        ({"settings": {"generation": {"sampel": 3}}}, HParamsError, "generation: unknown setting 'sampel'"),
        ({"settings": {"generation": {"sample": 0}}}, HParamsError, "generation: sample"),
        ({"settings": {"counterfact": {"a": 1}}}, HParamsError, r"counterfact: unknown setting 'a'\. It has no"),
        (
            {"evaluators": ["counterfact"], "settings": {"generation": {"sample": 3}}},
            UnknownNameError,
            "Unknown settings section 'generation'",
        ),
        ({"corpus": "sefl"}, StatisticsError, "Corpus 'sefl' is neither 'self'"),
    ],
)
def test_a_wrong_evaluator_or_text_is_said_before_the_model_is_loaded(
    open_session: Open, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(LanguageModel, "load", lambda *_a, **_k: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        EditSession.open(
            DEFAULT_MODEL,
            SessionConfig(
                editor="toy", **{**options, "settings": {"toy": {"layers": [1]}, **options.get("settings", {})}}
            ),
        )


# What goes wrong leaves nothing behind


def test_a_batch_that_fails_leaves_those_before_it(open_session: Open, tmp_path: Path) -> None:
    session = open_session(toy={"fails_at": 2}, directory=tmp_path / "run")
    with pytest.raises(NumericalError, match=r"Batch 2 cannot be solved\."):
        session.edit(FACTS, batch_size=2)
    assert [entry.batch for entry in session.ledger.entries] == [0, 1]
    assert session.next_batch == 2  # so that a second try draws what the first one drew
    again = open_session(directory=tmp_path / "run")
    assert same(bits(again.model), bits(session.model))


@pytest.mark.parametrize(
    ("spoils", "error", "message"),
    [
        ("shape", PluginError, r"The editor 'toy' proposed a change of 64 by 32 for .*, which is 32 by 64 \(out, in\)"),
        ("nan", NumericalError, r"The editor 'toy' proposed NaN or Inf for .*; nothing was applied\."),
        ("name", EditcoreError, r"nowhere\.weight"),
        (
            "dense",
            PluginError,
            r"proposed a dense change, which its announcement does not list \(Capabilities\.gives is factored\)",
        ),
        ("beside", PluginError, "'toy' proposed an attachment, which its announcement does not list"),
        ("nothing", PluginError, "The editor 'toy' proposed nothing: no change and no attachment; nothing was applied"),
        (
            "kept",
            NumericalError,
            "The editor 'toy' proposed to keep NaN or Inf in the tensor 'sum'; nothing was applied",
        ),
    ],
)
def test_a_proposal_that_cannot_be_written_never_reaches_the_ledger(
    open_session: Open, tmp_path: Path, spoils: str, error: type[Exception], message: str
) -> None:
    session = open_session(toy={"spoils": spoils}, directory=tmp_path / "run")
    base = bits(session.model)
    with pytest.raises(error, match=message):
        session.edit(FACTS[:2])
    assert same(bits(session.model), base)
    assert not (tmp_path / "run").exists()


def test_an_attachment_that_json_has_not_never_reaches_the_ledger(open_session: Open, tmp_path: Path) -> None:
    session = open_session(editor="toy-any", toy={"spoils": "fields"}, directory=tmp_path / "run")
    with pytest.raises(PluginError, match=r"an attachment whose fields cannot be written as JSON \(.*set.*\)"):
        session.edit(FACTS[:2])
    assert (session.edited.attachments, (tmp_path / "run").exists()) == ((), False)


def test_an_editor_may_answer_with_one_tensor_for_all_facts(open_session: Open, tmp_path: Path) -> None:
    open_session(toy={"spoils": "memory"}, directory=tmp_path / "run").edit(FACTS[:2])
    assert len(open_session(directory=tmp_path / "run").ledger.entries) == 1


@pytest.mark.parametrize(
    ("options", "who"),
    [
        ({"editor": "dead-editor"}, "editor 'dead-editor'"),
        ({"backend": "dead-backend"}, "backend 'dead-backend'"),
        ({"plugins": ["first", "dead-extension"]}, "plugin 'dead-extension'"),
    ],
)
def test_a_plugin_that_cannot_be_made_is_named(open_session: Open, options: dict[str, Any], who: str) -> None:
    with pytest.raises(PluginError, match=rf"The {who} cannot be set up: ZeroDivisionError: no luck\."):
        open_session(**options)


# Knowledge beside the weights, memory, and what editors and backends need of each other


def test_attachments_come_and_go_with_their_batches(open_session: Open, tmp_path: Path) -> None:
    def opened(**more: Any) -> EditSession:
        return open_session(editor="toy-any", toy={"spoils": "beside"}, directory=tmp_path / "run", **more)

    session = opened()
    first, second = session.edit(FACTS[:4], batch_size=2)
    assert first.applied
    assert second.applied
    ids = [", ".join(fact.id for fact in FACTS[at : at + 2]) for at in (0, 2)]
    assert session.model.asked("A") == f"{ids[0]} {ids[1]} A"
    assert opened().model.asked("A") == f"{ids[0]} {ids[1]} A"
    assert session.without_edits(lambda: session.model.asked("A")) == "A"
    weights = bits(session.model)
    session.undo(batches=[0])
    assert session.model.asked("A") == f"{ids[1]} A"
    session.undo(FACTS[2].id)
    assert session.model.asked("A") == f"{FACTS[3].id} A", "the rest of the batch is solved without the other"
    assert opened().model.asked("A") == f"{FACTS[3].id} A"
    session.redo(batches=[0])
    session.redo(FACTS[2].id)
    assert session.model.asked("A") == f"{ids[0]} {ids[1]} A"
    assert same(bits(session.model), weights)
    with pytest.raises(ModelError, match="they are kept beside the weights"):
        session.save(tmp_path / "saved")
    session.close()
    assert session.model.asked("A") == "A"


def test_an_attachment_has_no_scale(open_session: Open) -> None:
    settings = {"gate": {"batch": 0, "action": "scale", "scale": 0.25}}
    session = open_session(editor="toy-any", toy={"spoils": "beside"}, plugins=["gate"], settings=settings)
    base = bits(session.model)
    with pytest.raises(PluginError, match=r"An attachment \('toy-preface'\) cannot be scaled by 0\.25; accept it or"):
        session.edit(FACTS[:1])
    assert same(bits(session.model), base)
    assert (session.ledger.batches, session.model.asked("A")) == ([], "A")


def test_dense_changes_are_kept_and_taken_back(open_session: Open, tmp_path: Path) -> None:
    session = open_session(editor="toy-any", toy={"spoils": "dense"}, directory=tmp_path / "run")
    thin = open_session()
    base = bits(session.model)
    for opened in (session, thin):
        opened.edit(FACTS[:4], batch_size=2)
    name = session.model.layout.weight_name(1)
    torch.testing.assert_close(session.model.weight(name), thin.model.weight(name), rtol=1e-5, atol=1e-5)
    again = open_session(editor="toy-any", toy={"spoils": "dense"}, directory=tmp_path / "run")
    assert same(bits(again.model), bits(session.model))
    weights = bits(session.model)
    session.undo(FACTS[1].id)
    assert not same(bits(session.model), weights)
    session.redo(FACTS[1].id)
    assert same(bits(session.model), weights)
    session.undo(batches=[0, 1])
    assert same(bits(session.model), base)


def test_what_the_backend_does_not_take_is_refused_before_the_model_is_loaded(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "load", lambda *_a, **_k: pytest.fail("loaded"))
    with pytest.raises(HParamsError) as caught:
        EditSession.open(
            DEFAULT_MODEL, SessionConfig(editor="toy-any", backend="half", settings={"toy-any": {"layers": [1]}})
        )
    assert str(caught.value) == (
        "The editor 'toy-any' gives changes that the backend 'half' does not take: attachment, dense. Choose "
        f"--backend {' or '.join(fitting())}."
    )


def fitting() -> list[str]:
    """Installed backends that take attachments, dense and thin changes."""
    asked = {"factored", "dense", "attachment"}
    return sorted(name for name, spec in Plugins.load().backends().items() if asked <= spec.takes)


def test_an_editor_has_what_it_needs(open_session: Open) -> None:
    session = open_session(editor="toy-needy", plugins=["second"])
    assert list(session.extensions) == ["second", "first"]
    assert type(session.backend).__name__ == "HalfBackend"
    assert list(open_session(editor="toy-needy", plugins=["first", "second"]).extensions) == ["first", "second"]
    with pytest.raises(HParamsError, match=r"'toy-needy' works with the backend 'half' only; 'raw' was asked for\."):
        open_session(editor="toy-needy", backend="raw")


def test_a_subject_is_asked_for_where_one_is_looked_up(open_session: Open) -> None:
    bare = EditRequest(prompt="It rains in", target_new="spring")
    session = open_session()
    with pytest.raises(RequestError) as caught:
        session.edit([*FACTS[:2], bare])
    assert str(caught.value) == (
        "The editor 'toy' needs a subject in every request; 1 of 3 have none, the first being 'It rains in'. Name it "
        "and put {} in its place in the prompt."
    )
    assert session.ledger.batches == []


def test_an_editor_is_told_what_is_active(open_session: Open, toys: Any, tmp_path: Path) -> None:
    def opened() -> EditSession:
        return open_session(editor="toy-remembering", plugins=["gate"], directory=tmp_path / "run")

    def told() -> list[tuple[str, Any]]:
        found = [(what, detail) for name, what, detail in toys.CALLS if name == "memory"]
        toys.CALLS.clear()
        return found

    session = opened()
    session.edit(FACTS, batch_size=2)  # the gate rejects batch 1
    assert told() == [
        ("recall", []), ("propose", 0), ("absorb", 0), ("propose", 1), ("propose", 2), ("absorb", 2),
    ]  # fmt: skip
    assert [int(entry.memory["seen"]) for entry in session.ledger.entries] == [0, 1]
    session.undo(FACTS[4].id)
    assert told() == [("recall", [0]), ("propose", 2), ("recall", [0, 2]), ("recall", [0, 2])]
    assert [int(entry.memory["seen"]) for entry in session.ledger.history()] == [0, 1]
    session.undo(batches=[0])
    assert told() == [("recall", [2])]
    opened()
    assert told() == [("recall", [2])]
    session.redo(batches=[0])
    assert told() == [("recall", [0, 2])]


# Names and settings


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plugins": ["fist"]}, UnknownNameError, "Unknown plugin 'fist'.* Did you mean 'first'?"),
        ({"backend": "rwa"}, UnknownNameError, "Unknown backend 'rwa'.* Did you mean 'raw'?"),
        ({"settings": {"first": {"a": 1}}}, UnknownNameError, "Unknown settings section 'first'"),
        ({"settings": {"raw": {"a": 1}}}, HParamsError, r"raw: unknown setting 'a'\. It has no hyperparameters\."),
        ({"toy": {"layer": [1]}}, HParamsError, "toy: unknown setting 'layer'.* Did you mean 'layers'?"),
        ({"preset": "smal"}, UnknownNameError, "Unknown preset 'smal'. Available: small. Did you mean 'small'?"),
    ],
)
def test_a_wrong_name_says_which_are_right(
    open_session: Open, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_session(**options)


def test_without_a_preset_for_the_model_a_required_setting_is_asked_for(toys: Any) -> None:
    with pytest.raises(HParamsError) as caught:
        EditSession.open(tiny_model(), SessionConfig(editor="toy"))
    assert str(caught.value) == (
        "toy: layers is required (list of int, not empty, each ≥ 0), and no preset is named like the model "
        "'tiny-llama'. Set it, such as --set layers=[3], let 'editctl onboard tiny-llama' find it, or choose another "
        "model's preset with --preset (small)."
    )
    with pytest.raises(HParamsError, match="toy: unknown setting 'layer'"):
        EditSession.open(tiny_model(), SessionConfig(editor="toy", settings={"toy": {"layer": 1}}))
    with pytest.raises(HParamsError, match="toy-pairs: layers is required"):  # has no presets at all
        EditSession.open(tiny_model(), SessionConfig(editor="toy-pairs"))


# Extensions


def test_the_extension_given_last_is_told_first(open_session: Open, toys: Any) -> None:
    session = open_session(plugins=["first", "second"])
    session.edit(FACTS[:1])
    session.evaluate([FactRecord(request=FACTS[0])], phase="after")
    session.finish()
    hooks = ("before_run", "before_batch", "before_apply", "after_batch", "after_evaluation", "after_run")
    assert [(name, hook) for name, hook, _ in toys.CALLS] == [(n, h) for h in hooks for n in ("second", "first")]
    assert {hook: detail for _, hook, detail in toys.CALLS} == dict(zip(hooks, (0, 0, 0, 0, "after", 1), strict=True))


def test_a_rejected_batch_changes_nothing_but_the_count(open_session: Open, toys: Any, tmp_path: Path) -> None:
    session = open_session(plugins=["first", "gate"], directory=tmp_path / "run")
    [before] = session.edit(FACTS[:2])
    weights = bits(session.model)
    [rejected] = session.edit(FACTS[2:4])
    assert (rejected.applied, rejected.batch.index, rejected.reason) == (False, 1, "gate: it looks odd")
    assert [(name, verdict.action) for name, verdict in rejected.verdicts.items()] == [
        ("gate", "reject"),
        ("first", "accept"),
    ]
    assert rejected.verdicts["gate"].figures["oddness"] == 0.75
    assert same(bits(session.model), weights)
    assert session.requests == FACTS[:2]
    [after] = session.edit(FACTS[4:])
    assert (before.batch.index, after.batch.index, after.applied) == (0, 2, True)
    assert [entry.batch for entry in session.ledger.entries] == [0, 2]
    assert [detail for _, hook, detail in toys.CALLS if hook == "after_batch"] == [0, 2]
    assert sorted(path.name for path in (tmp_path / "run" / "deltas").iterdir()) == [
        "batch-00000.safetensors",
        "batch-00002.safetensors",
    ]
    assert open_session(directory=tmp_path / "run").next_batch == 3


def test_a_scaled_batch_is_scaled_where_it_is_kept_and_where_it_is_written(open_session: Open) -> None:
    session = open_session(plugins=["gate"], settings={"gate": {"batch": 0, "action": "scale", "scale": 0.25}})
    name = session.model.layout.weight_name(1)
    base = session.model.weight(name).double()
    [result] = session.edit(FACTS[:2])
    assert (result.applied, result.reason, session.ledger.entries[0].scale) == (True, "gate: it looks odd", 0.25)
    asked = result.proposal.changes[name].dense().double()
    assert torch.equal(session.ledger.entries[0].changes[name].dense(), 0.25 * asked)
    # One rounding to float32 of numbers below 8.
    torch.testing.assert_close(session.model.weight(name).double() - base, 0.25 * asked, rtol=0, atol=5e-7)


def test_scale_nothing_is_a_rejection(open_session: Open) -> None:
    settings = {"gate": {"batch": 0, "action": "scale", "scale": 0.0}}
    [result] = open_session(plugins=["gate"], settings=settings).edit(FACTS[:1])
    assert not result.applied


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"action": "rejct"}, "The plugin 'gate' judged 'rejct'; it may accept, scale or reject"),
        ({"action": "scale", "scale": 1.5}, r"The plugin 'gate' asked for scale 1\.5; it lies between 0 and 1"),
    ],
)
def test_a_verdict_that_means_nothing_is_refused(open_session: Open, gate: dict[str, Any], message: str) -> None:
    session = open_session(plugins=["gate"], settings={"gate": {"batch": 0, **gate}})
    base = bits(session.model)
    with pytest.raises(PluginError, match=message):
        session.edit(FACTS[:1])
    assert same(bits(session.model), base)


def optimisations(result: Any) -> list[float]:
    """Steps by request, and what stands for them in the ledger."""
    return [figure.figures["steps"] for figure in result.proposal.evidence]


def test_rejected_requests_leave_what_the_others_would_have_been_alone(open_session: Open, tmp_path: Path) -> None:
    ids = [FACTS[3].id, FACTS[1].id]
    session = open_session(plugins=["gate"], settings={"gate": {"rejects": ids}}, directory=tmp_path / "run")
    [result] = session.edit(FACTS[:4])
    kept = (FACTS[0], FACTS[2])
    assert (result.applied, result.reason, result.batch.requests) == (True, "", kept)
    assert [
        (rejection.request.id, rejection.by, rejection.reason, rejection.figures) for rejection in result.rejected
    ] == [(name, "gate", "unwanted", {"harm": 2.0}) for name in ids]
    assert (
        session.extensions["gate"].seen
        == [  # type: ignore[attr-defined]
            sorted(fact.id for fact in FACTS[:4]),
            sorted(fact.id for fact in FACTS[:3]),
            sorted(request.id for request in kept),
        ]
    )
    assert session.requests == kept
    assert [figure.request_id for figure in result.proposal.evidence] == [request.id for request in kept]
    assert min(optimisations(result)) > 0
    alone = open_session()
    alone.edit(kept)
    name = session.model.layout.weight_name(1)
    # The targets of one fact do not depend on who else is in the batch, but for the rounding of padded passes.
    torch.testing.assert_close(session.model.weight(name), alone.model.weight(name), rtol=1e-4, atol=1e-4)

    read = Ledger.read(tmp_path / "run")
    assert read.batches[0].rejected == result.rejected == read.batches[0].all_rejected
    weights = bits(session.model)
    session.undo(kept[0].id)
    session.redo(kept[0].id)
    assert same(bits(session.model), weights)
    assert same(bits(open_session(directory=tmp_path / "run").model), weights)


def test_withdrawn_requests_cost_nothing(open_session: Open) -> None:
    session = open_session(plugins=["gate"], settings={"gate": {"batch": 9, "withdraws": [FACTS[1].id, FACTS[2].id]}})
    first, second = session.edit(FACTS[:4], batch_size=2)
    assert (first.batch.requests, second.batch.requests) == (FACTS[:1], FACTS[3:4])
    assert [rejection.reason for rejection in (*first.rejected, *second.rejected)] == ["not today"] * 2
    assert session.requests == (FACTS[0], FACTS[3])


@pytest.mark.parametrize("when", ["withdraws", "rejects"])
def test_a_batch_that_loses_all_is_rejected(open_session: Open, tmp_path: Path, when: str) -> None:
    settings = {"gate": {"batch": 9, when: [fact.id for fact in FACTS[:2]]}}
    session = open_session(plugins=["gate"], settings=settings, directory=tmp_path / "run")
    base = bits(session.model)
    lost, kept = session.edit(FACTS[:4], batch_size=2)
    assert (lost.applied, lost.reason, len(lost.batch), len(lost.rejected)) == (
        False,
        "every request was rejected",
        0,
        2,
    )
    assert (kept.applied, kept.batch.index) == (True, 1)
    assert not same(bits(session.model), base)
    read = Ledger.read(tmp_path / "run")
    assert [rejection.request for rejection in read.batches[0].all_rejected] == list(FACTS[:2])
    assert open_session(directory=tmp_path / "run").next_batch == 2


def test_contradictions_of_a_batch_may_be_withdrawn(open_session: Open) -> None:
    contradiction = FACTS[0].model_copy(update={"target_new": "Vienna", "id": "other"})
    session = open_session(plugins=["gate"], settings={"gate": {"withdraws": ["other"]}})
    [result] = session.edit([FACTS[0], contradiction])
    assert (result.batch.requests, [rejection.request for rejection in result.rejected]) == (FACTS[:1], [contradiction])
    with pytest.raises(RequestError, match="contradict each other"):
        open_session().edit([FACTS[0], contradiction])


@pytest.mark.parametrize("when", ["withdraws", "rejects"])
def test_rejecting_a_stranger_is_refused(open_session: Open, when: str) -> None:
    session = open_session(plugins=["gate"], settings={"gate": {when: ["nobody"]}})
    base = bits(session.model)
    with pytest.raises(PluginError, match="'gate' rejects 'nobody', which is not a new request of the batch"):
        session.edit(FACTS[:2])
    assert same(bits(session.model), base)


def test_a_rejected_batch_names_its_requests(open_session: Open) -> None:
    session = open_session(plugins=["first", "gate"], settings={"gate": {"batch": 0}})
    session.edit(FACTS[:2])
    found = session.ledger.batches[0].all_rejected
    assert [(rejection.request, rejection.by, rejection.reason) for rejection in found] == [
        (fact, "gate", "it looks odd") for fact in FACTS[:2]
    ]
    assert found[0].figures["oddness"] == 0.75


def test_extensions_count_for_the_summary(open_session: Open) -> None:
    session = open_session(plugins=["first", "gate"])
    session.edit(FACTS[:2], batch_size=1)
    assert session.statistics() == {"gate": {"judged": 2, "mean": None}}
    with pytest.raises(PluginError, match=r"The plugin 'miscounting' failed in statistics: TypeError: .*Tensor"):
        open_session(plugins=["miscounting"]).statistics()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda e: replace(e, changes={n: FactoredDelta(d.right.T, d.left.T) for n, d in thin(e).items()}),
            "was not made",
        ),
        (
            lambda e: replace(e, changes=dict(zip(["nowhere.weight"], e.changes.values(), strict=True))),
            "has no weight 'nowhere.weight'",
        ),
        (
            lambda e: replace(e, changes={n: d.scaled(math.inf) for n, d in e.changes.items()}),
            "Inf",
        ),
        (
            lambda e: replace(e, known={i: replace(k, keys=cut(k.keys)) for i, k in e.known.items()}),
            "key of the edit '",
        ),
        (
            lambda e: replace(e, known={i: replace(k, values=cut(k.values)) for i, k in e.known.items()}),
            "finite numbers",
        ),
    ],
)
def test_a_ledger_that_does_not_fit_the_model_is_refused_before_anything_is_written(
    open_session: Open, tmp_path: Path, spoil: Callable[[LedgerEntry], LedgerEntry], complaint: str
) -> None:
    """Its lines and hashes are whole: somebody wrote it for another model, or on purpose."""
    session = open_session(directory=tmp_path / "run")
    session.edit(FACTS[:2])
    session.edit(FACTS[2:])
    first, second = session.ledger.entries
    assert session.ledger.header is not None
    write_ledger(tmp_path / "forged", [first, spoil(second)], session.ledger.header)
    model = tiny_model()
    before = bits(model)
    with pytest.raises(EditcoreError, match=complaint):
        open_session(model, directory=tmp_path / "forged")
    assert same(before, bits(model))
    Ledger.read(tmp_path / "forged").mark("undo", [(second.batch, name) for name in second.new_ids])
    reopened = open_session(model, directory=tmp_path / "forged")
    edited = bits(model)
    with pytest.raises(EditcoreError, match=complaint):
        reopened.redo(batches=[second.batch])
    assert same(edited, bits(model))
    assert reopened.ledger.undone(second.batch) == set(second.new_ids)


def thin(entry: LedgerEntry) -> dict[str, FactoredDelta]:
    """Its changes, all of which are factored."""
    return {address: change for address, change in entry.changes.items() if isinstance(change, FactoredDelta)}


def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the last number of each."""
    return {name: tensor[:-1] for name, tensor in tensors.items()}


def test_an_undo_that_the_backend_refuses_is_not_in_the_ledger(
    open_session: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(directory=tmp_path / "run")
    session.edit(FACTS, batch_size=2)
    before, active = bits(session.model), session.requests
    rebuild = session.backend.rebuild

    def refuses(active: Any) -> None:
        if len(active) == 2:
            raise NumericalError("Too little rank.")
        rebuild(active)

    monkeypatch.setattr(session.backend, "rebuild", refuses)
    with pytest.raises(NumericalError, match="Too little rank"):
        session.undo(batches=[1])
    assert session.requests == active
    assert same(before, bits(session.model))
    assert Ledger.read(tmp_path / "run").facts() == active
