"""What the model answers with a memory, and what becomes of it when facts are edited again or undone."""

from __future__ import annotations

import pytest
import torch
from editcore import EditSession, HParamsError, ModelError, SessionConfig
from editcore.evaluation import score_targets
from editcore.models import lookup_row
from editcore.testing import tiny_model, tiny_requests, tiny_tokenizer

FACTS = tiny_requests(4)
NEURALDB = {"layers": [1], "v_num_grad_steps": 15, "context_templates": ["{}"], "gate": 0.9}
GRACE = {
    "rule": "grace", "radius": 0.05, "layers": [1], "v_num_grad_steps": 15, "fact_token": "last",
    "key_weighting": "prompt", "context_templates": ["{}"],
}  # fmt: skip
both = pytest.mark.parametrize("settings", [NEURALDB, GRACE], ids=["neuraldb", "grace"])


def open_session(settings: dict[str, object], family: str = "llama") -> EditSession:
    return EditSession.open(tiny_model(family), SessionConfig(editor="memory", settings={"memory": settings}))


def losses(session: EditSession, targets: list[str]) -> list[float]:
    scores = score_targets(session.model, [fact.text for fact in FACTS[: len(targets)]], targets)
    return [score.nll for score in scores]


@both
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_bare_prompt_gets_what_was_optimised(settings: dict[str, object], family: str) -> None:
    """With the bare prompt as the only context, the loss of the optimisation is that of the model with its memory."""
    session = open_session({**settings, "kl_factor": 0, "v_weight_decay": 0, "first_token_layers": None}, family)
    [result] = session.edit([FACTS[0]])
    [loss] = losses(session, [FACTS[0].target_new])
    [evidence] = result.proposal.evidence
    assert evidence.figures["target_loss"] == pytest.approx(loss, abs=2e-3)
    assert "preservation_cost" not in evidence.figures


@both
def test_a_fact_that_is_edited_again_has_its_newest_target_until_it_is_undone(settings: dict[str, object]) -> None:
    session = open_session({**settings, "kl_factor": 0, "v_weight_decay": 0})
    session.edit(FACTS)
    targets = [fact.target_new for fact in FACTS]
    before = losses(session, targets)
    again = FACTS[0].model_copy(update={"target_new": "Madrid", "id": "again"})
    [result] = session.edit([again])
    [loss] = losses(session, ["Madrid"])
    assert loss < losses(session, [FACTS[0].target_new])[0]
    assert result.proposal.evidence[0].figures["target_loss"] == pytest.approx(loss, abs=2e-3)
    assert losses(session, targets)[1:] == before[1:]
    session.undo("again")
    assert losses(session, targets) == before


@both
def test_one_fact_of_a_batch_is_undone_and_the_others_keep_their_rows(settings: dict[str, object]) -> None:
    session = open_session(settings)
    session.edit(FACTS)
    [whole] = session.edited.attachments
    session.undo(FACTS[1].id)
    [rest] = session.edited.attachments
    kept = [0, 2, 3]
    for name in ("keys", "values"):
        assert torch.equal(rest.tensors[f"layer_1.{name}"], whole.tensors[f"layer_1.{name}"][kept])
    assert rest.tensors["layer_1.rows"].tolist() == [0, 1, 2]
    assert rest.fields["targets"] == [FACTS[row].target_new for row in kept]


def test_a_fact_at_the_first_token_is_kept_at_the_first_block_too() -> None:
    """And is undone there as well."""
    settings = {**NEURALDB, "context_templates": ["{}", "Yes. {}"], "first_token_layers": [0]}
    first = FACTS[0].model_copy(update={"subject": "Isaac", "prompt": "{} was born in", "id": "first"})
    model = tiny_model(tokenizer=tiny_tokenizer(bos=False))
    session = EditSession.open(model, SessionConfig(editor="memory", settings={"memory": settings}))
    assert lookup_row(session.model, first).lookup == 0, "the test needs such a fact"
    session.edit([FACTS[1], first])
    [both_facts] = session.edited.attachments
    assert both_facts.fields["layers"] == [0, 1]
    assert both_facts.tensors["layer_0.rows"].tolist() == [1]
    session.undo(FACTS[1].id)
    [rest] = session.edited.attachments
    assert rest.tensors["layer_0.rows"].tolist() == rest.tensors["layer_1.rows"].tolist() == [0]
    session.redo(FACTS[1].id)
    session.undo("first")
    [rest] = session.edited.attachments
    assert rest.fields["layers"] == [1]


def test_several_layers_are_refused() -> None:
    with pytest.raises(HParamsError, match="beside one layer"):
        open_session({**NEURALDB, "layers": [0, 1]})


def test_a_memory_of_another_model_or_kind_is_refused() -> None:
    neuraldb, grace = open_session(NEURALDB), open_session(GRACE)
    for opened in (neuraldb, grace):
        opened.edit(FACTS[:1])
    written = neuraldb.ledger.entries[0].written
    with pytest.raises(ModelError, match="do not go together"):
        grace.edited.apply(written)
    narrow = EditSession.open(
        tiny_model(config={"intermediate_size": 48}), SessionConfig(editor="memory", settings={"memory": NEURALDB})
    )
    with pytest.raises(ModelError, match="made for another model"):
        narrow.edited.apply(written)
