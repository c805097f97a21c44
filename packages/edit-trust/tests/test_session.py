"""Trust in a session: what fails is left out, the bits come back, and a resumed run judges alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_trust.extension import RECORD_NAME, TrustExtension
from edit_trust.measure import Measurement
from editcore import EditRequest, EditSession, HParamsError, KnownTarget, RequestError, VectorDelta
from editcore.evaluation import score_targets
from editcore.testing import tiny_requests
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

Open = Callable[..., EditSession]
TrustOf = Callable[[EditSession], TrustExtension]

FACTS = tiny_requests(12)
BAD = FACTS[2]
UNSAID = FACTS[0]
"""The unedited tiny model prefers its true object."""
SAID = (FACTS[1], FACTS[5])
"""The unedited tiny model prefers their new objects."""


def bits(session: EditSession) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in session.model.hf.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def stretched(open_session: Open, request: EditRequest, factor: float) -> dict[str, KnownTarget]:
    """The solved value of a request, moved ``factor`` times as far away."""
    session = open_session(plugins=())
    [result] = session.edit([request])
    solved = result.proposal.known[request.id]
    session.close()
    values = {}
    for name, value in solved.values.items():
        now = session.model.projection(1)(solved.keys[name]).detach()
        values[name] = now + factor * (value - now)
    return {request.id: replace(solved, values=values)}


def rejected(session: EditSession) -> dict[str, str]:
    return {
        rejection.request.id: rejection.reason for entry in session.ledger.batches for rejection in entry.all_rejected
    }


def harms(monkeypatch: pytest.MonkeyPatch, harmful: Sequence[EditRequest]) -> list[int]:
    """Let the measured level fail whatever holds one of these requests; returns the sizes that are measured."""
    from edit_trust.measure import Probe

    measure, sizes = Probe.measure, []

    def measured(self: Probe, model: Any, before: Any, new: Sequence[EditRequest], *trial: Any) -> Measurement:
        found = measure(self, model, before, new, *trial)
        sizes.append(len(new))
        return replace(found, kl=1e9) if set(harmful) & set(new) else found

    monkeypatch.setattr(Probe, "measure", measured)
    return sizes


# The closed-form level


def test_a_value_of_absurd_norm_is_left_out_and_the_rest_is_as_without_it(open_session: Open) -> None:
    known = stretched(open_session, BAD, 100.0)
    session = open_session(trust={"trust_threshold": 0.2, "trust_weights": [0.0, 1.0]})
    [result] = session.edit(FACTS[:6], known=known)
    assert list(rejected(session)) == [BAD.id]
    assert "score 0.0" in rejected(session)[BAD.id]
    assert result.rejected[0].figures["cost_ratio"] > 100
    rest = tuple(fact for fact in FACTS[:6] if fact != BAD)
    assert session.requests == result.batch.requests == rest
    plain = open_session(plugins=())
    plain.edit(rest)
    name = session.model.layout.weight_name(1)
    # Targets are optimised in float32, in passes that are padded for another batch.
    torch.testing.assert_close(session.model.weight(name), plain.model.weight(name), rtol=1e-3, atol=1e-3)


def test_costs_of_facts_add_up_to_the_objectives_distance(open_session: Open) -> None:
    session = open_session(own={"calculate_objective_value": True, "emmet_lambda": 0.1})
    [result] = session.edit(FACTS[:5])
    parts = [figure.figures["preservation_cost"] for figure in result.proposal.evidence]
    assert sum(parts) == pytest.approx(result.proposal.diagnostics["layer_1_preservation_distance"])


def test_a_target_that_was_not_reached_scores_low(open_session: Open) -> None:
    session = open_session(trust={"trust_threshold": 0.999, "trust_weights": [1.0, 0.0]})
    base = bits(session)
    [result] = session.edit(FACTS[:3])
    assert not result.applied
    assert len(rejected(session)) == 3
    assert same(bits(session), base)


def test_off_it_lets_everything_pass(open_session: Open) -> None:
    settings = {"trust_threshold": 1.0, "trust_max_kl": 1e-9}
    session, plain = open_session(trust={**settings, "trust_enable": False}), open_session(plugins=())
    for opened in (session, plain):
        opened.edit(FACTS[:4], batch_size=2)
    assert same(bits(session), bits(plain))
    assert session.ledger.batches[0].verdicts == {}


# The measured level


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.sampled_from(["trust_max_kl", "trust_max_perplexity_ratio", "trust_max_norm_growth"]),
    action=st.sampled_from(["rollback", "scale"]),
    start=st.integers(0, 8),
    count=st.integers(1, 3),
)
def test_rollback_restores_the_bits(open_session: Open, limit: str, action: str, start: int, count: int) -> None:
    session = open_session(trust={limit: 1e-12, "trust_action": action, "trust_looks": 2})
    base = bits(session)
    [result] = session.edit(FACTS[start : start + count])
    assert not result.applied
    assert len(rejected(session)) == count
    assert same(bits(session), base)


def test_judging_changes_no_bit_of_what_is_accepted(open_session: Open) -> None:
    session, plain = open_session(), open_session(plugins=())
    for opened in (session, plain):
        opened.edit(FACTS[:6], batch_size=3)
    assert same(bits(session), bits(plain))
    for entry in session.ledger.batches:
        verdict = entry.verdicts["trust"]
        assert (verdict.action, verdict.reason) == ("accept", "every limit is kept")
        assert {"least_score", "efficacy", "kl", "perplexity_ratio", "norm_growth"} <= verdict.figures.keys()
        assert verdict.figures["kl"] > 0
    assert "retention" not in session.ledger.batches[0].verdicts["trust"].figures


def test_the_fact_that_does_the_harm_is_found_and_the_rest_is_kept(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = harms(monkeypatch, [BAD])
    session = open_session()
    [result] = session.edit(FACTS[:8])
    assert list(rejected(session)) == [BAD.id]
    assert rejected(session)[BAD.id] == (
        "with it the batch fails (kl 1e+09 is not <= 1e+06), without it the rest passes"
    )
    assert session.requests == tuple(fact for fact in FACTS[:8] if fact != BAD)
    assert min(figure.figures["steps"] for figure in result.proposal.evidence) > 0
    assert (sizes[0], sizes[-1]) == (8, 7)
    assert len(sizes) <= 8


def test_a_search_that_runs_out_of_looks_leaves_out_what_it_did_not_clear(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = harms(monkeypatch, FACTS[:3])
    session = open_session(trust={"trust_looks": 3})
    session.edit(FACTS[:8])
    assert {fact.id for fact in FACTS[:3]} <= rejected(session).keys()
    assert len(sizes) <= 1 + 3 + 1
    assert set(session.requests) <= set(FACTS[3:8])


def test_a_fact_that_the_model_does_not_say_is_the_first_suspect(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look finds it, although its score is the best: a value that moves nothing costs nothing."""
    known = stretched(open_session, UNSAID, 0.0)
    sizes = harms(monkeypatch, [UNSAID])
    session = open_session(trust={"trust_looks": 1, "trust_weights": [0.0, 1.0]})
    [result] = session.edit([UNSAID, *SAID], known=known)
    assert list(rejected(session)) == [UNSAID.id]
    assert sizes[:2] == [3, 2]
    assert result.rejected[0].figures["efficacy"] == pytest.approx(2 / 3), "the model should say the others"
    accepted = session.ledger.batches[0].verdicts["trust"].figures
    assert result.rejected[0].figures["score"] > accepted["least_score"]


def test_a_batch_is_scaled_once_and_kept_if_it_passes_then(open_session: Open) -> None:
    free = open_session()
    free.edit(FACTS[:3])
    growth = free.ledger.batches[0].verdicts["trust"].figures["norm_growth"]
    trust = {"trust_action": "scale", "trust_scale": 0.5, "trust_max_norm_growth": 0.6 * growth}
    session = open_session(trust=trust)
    [result] = session.edit(FACTS[:3])
    assert (result.applied, session.ledger.batches[0].scale, len(result.rejected)) == (True, 0.5, 0)
    assert "scaled by 0.5, every limit is kept" in result.reason
    name = session.model.layout.weight_name(1)
    half, whole = (opened.ledger.batches[0].changes[name].dense() for opened in (session, free))
    torch.testing.assert_close(half, 0.5 * whole)


def test_a_change_that_disables_the_model_is_rejected_for_its_figures(open_session: Open) -> None:
    known = stretched(open_session, BAD, 1e200)
    session = open_session(trust={"trust_max_perplexity_ratio": 100.0})
    base = bits(session)
    [result] = session.edit([BAD], known=known)
    assert not result.applied
    assert "perplexity_ratio" in rejected(session)[BAD.id]
    assert same(bits(session), base)


def test_retention_asks_earlier_facts(open_session: Open) -> None:
    """The share of what the model held before the batch that it holds with it."""
    session = open_session(own={"v_num_grad_steps": 20})
    session.edit(FACTS, batch_size=4)
    last = session.ledger.batches[-1].verdicts["trust"].figures
    after = held(session, FACTS[:8])
    session.undo(batches=[2])
    before = held(session, FACTS[:8])
    assert last["retention"] == len(before & after) / len(before)
    assert 0 < last["retention"] < 1, "some are lost, and some are not"


def held(session: EditSession, requests: Sequence[EditRequest]) -> set[str]:
    """Ids of the facts whose target is more probable than the true one."""
    prompts = [request.text for request in requests]
    new = score_targets(session.model, prompts, [request.target_new for request in requests])
    true = score_targets(session.model, prompts, [str(request.target_true) for request in requests])
    return {
        request.id
        for request, new_score, true_score in zip(requests, new, true, strict=True)
        if new_score.nll < true_score.nll
    }


def test_a_text_of_records_without_neighbours_is_refused(open_session: Open, tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text(json.dumps({"subject": "A", "prompt": "{} is", "target_new": "b"}) + "\n", encoding="utf-8")
    with pytest.raises(HParamsError, match=r"trust: the records of .*bare.jsonl' have no neighbourhood prompts. Set"):
        open_session(trust={"trust_heldout": str(path)})


def test_held_out_prompts_do_not_speak_of_the_batch(open_session: Open, trust_of: TrustOf) -> None:
    session = open_session(trust={"trust_heldout_samples": 60})
    probe = trust_of(session)._probe
    assert probe is not None
    subject = tiny_requests(80)[41]
    before = probe.baseline(session.model, [subject], [], batch=0)
    assert 0 < len(before.prompts) < len(probe.prompts)
    assert not any(subject.subject in prompt for prompt in before.prompts)


def test_held_out_prompts_do_not_contain_a_fact_without_a_subject(open_session: Open, trust_of: TrustOf) -> None:
    session = open_session(trust={"trust_heldout_samples": 60})
    probe = trust_of(session)._probe
    assert probe is not None
    request = EditRequest(prompt=probe.prompts[0], target_new="Rome")
    assert probe.baseline(session.model, [request], [], batch=0).prompts == probe.prompts[1:]


def test_an_editor_without_evidence_is_judged_by_what_is_measured(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session()
    propose = session._editor.propose
    monkeypatch.setattr(session._editor, "propose", lambda *given: replace(propose(*given), evidence=()))
    harms(monkeypatch, [BAD])
    session.edit(FACTS[:4])
    assert rejected(session).keys() == {BAD.id}


def test_a_weight_that_is_all_zero_has_no_growth(open_session: Open, trust_of: TrustOf) -> None:
    session = open_session()
    probe = trust_of(session)._probe
    assert probe is not None
    name = "model.norm.weight"
    changes = {name: VectorDelta(torch.full_like(session.model.weight(name), 0.5))}
    before = probe.baseline(session.model, FACTS[:1], [], batch=0)

    def growth() -> float:
        trial = session.edited.trial_of(changes)
        return probe.measure(session.model, before, FACTS[:1], changes, trial).norm_growth

    assert growth() > 0.4
    with torch.no_grad():
        session.model.weight(name).zero_()
    assert growth() == 0.0


def test_nothing_is_measured_where_nothing_is_asked_for(open_session: Open, trust_of: TrustOf) -> None:
    session = open_session(trust={"trust_heldout_samples": 0, "trust_text_tokens": 0})
    session.edit(FACTS[:4], batch_size=2)
    assert session.ledger.batches[1].verdicts["trust"].figures.keys() == {
        "least_score", "least_gain", "least_preservation", "efficacy", "norm_growth",
    }  # fmt: skip
    off = open_session(trust={"trust_measure": False})
    assert trust_of(off)._probe is None


# Conflicts


def test_conflicts_are_settled_before_anything_is_computed(open_session: Open) -> None:
    against = FACTS[0].model_copy(update={"target_new": "Vienna", "id": "against"})
    for way, kept in (("keep", FACTS[0]), ("replace", against)):
        session = open_session(trust={"on_conflict": way})
        session.edit([FACTS[0], FACTS[1]])
        [result] = session.edit([against, FACTS[2]])
        assert kept in session.requests
        assert len(session.requests) == 3
        assert [rejection.request.id for rejection in result.rejected] == (["against"] if way == "keep" else [])
        if way == "replace":
            assert "'against' replaces an active fact: it contradicts" in result.verdicts["trust"].reason
    session = open_session(trust={"on_conflict": "error"})
    session.edit([FACTS[0]])
    base = bits(session)
    with pytest.raises(RequestError, match="trust: the request 'against'"):
        session.edit([against])
    assert same(bits(session), base)
    session.undo(FACTS[0].id)
    [result] = session.edit([against])
    assert result.applied


# Other editors, other extensions, other processes


@pytest.mark.parametrize("editor", ["memit", "rome"])
def test_every_editor_can_be_judged(open_session: Open, monkeypatch: pytest.MonkeyPatch, editor: str) -> None:
    harms(monkeypatch, [BAD])
    own = {"layers": [0, 1]} if editor == "memit" else {}
    session = open_session(editor=editor, own=own)
    session.edit(FACTS[:4])
    assert list(rejected(session)) == [BAD.id]
    assert session.requests == (*FACTS[:2], FACTS[3])


def test_added_facts_are_not_judged_and_stay(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    harms(monkeypatch, [FACTS[4]])
    session = open_session(plugins=("replay", "trust"))
    session.edit(FACTS[:6], batch_size=3)
    entry = session.ledger.batches[1]
    assert entry.new_requests == (FACTS[3], FACTS[5])
    assert set(entry.requests[2:]) <= set(FACTS[:3])
    assert len(entry.requests) == 4


def test_a_resumed_run_judges_as_an_uninterrupted_one(open_session: Open, tmp_path: Path) -> None:
    known = stretched(open_session, FACTS[9], 100.0)
    trust = {"trust_threshold": 0.2, "trust_weights": [0.0, 1.0], "trust_heldout_samples": 4}
    whole = open_session(trust=trust, seed=3)
    whole.edit(FACTS, batch_size=3, known=known)
    first = open_session(trust=trust, seed=3, directory=tmp_path / "run")
    first.edit(FACTS[:6], batch_size=3)
    record = json.loads((tmp_path / "run" / RECORD_NAME).read_text())
    assert (len(record["heldout_prompts"]), bool(record["text"])) == (4, True)
    resumed = open_session(trust=trust, seed=3, directory=tmp_path / "run")
    resumed.edit(FACTS[6:], batch_size=3, known=known)
    assert json.loads((tmp_path / "run" / RECORD_NAME).read_text()) == record
    assert same(bits(resumed), bits(whole))
    for batch, expected in zip(resumed.ledger.batches, whole.ledger.batches, strict=True):
        assert (batch.verdicts, batch.rejected) == (expected.verdicts, expected.rejected)
    assert list(rejected(resumed)) == [FACTS[9].id]
