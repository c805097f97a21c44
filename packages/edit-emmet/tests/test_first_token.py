"""Facts that are looked up at the text's first token: written lower, beside the others of their batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import EditRequest, EditSession, HParamsError, SessionConfig
from editcore.testing import tiny_model, tiny_requests, tiny_tokenizer

Open = Callable[..., EditSession]
PLAIN = tiny_requests(4)
FIRST = [
    EditRequest(subject=subject, prompt=prompt, target_new=target)
    for subject, prompt, target in (
        ("Isaac", "{} was born in", "London"),
        ("Marie", "{} works as a", "singer"),
        ("Ada", "{} plays the sport of", "chess"),
    )
]
LOW, HIGH = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))


@pytest.fixture
def open_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a session of emmet on a new tiny model in float64, whose tokenizer puts nothing before a text."""
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(request.text for request in tiny_requests(80)) * 4, encoding="utf-8")

    def _open(
        *, bos: bool = False, replay: dict[str, Any] | None = None, directory: Path | None = None, **emmet: Any
    ) -> EditSession:
        settings = {"layers": [1], "context_templates": ["{}", "So it was. {}"], "v_num_grad_steps": 4, **emmet}
        return EditSession.open(
            tiny_model(dtype=torch.float64, tokenizer=tiny_tokenizer(bos=bos)),
            SessionConfig(
                editor="emmet",
                plugins=("replay",) if replay else (),
                settings={"emmet": settings, "replay": replay} if replay else {"emmet": settings},
                corpus=str(corpus),
                corpus_tokens=2000,
            ),
            directory=directory,
        )

    return _open


def named(session: EditSession) -> list[set[str]]:
    return [set(entry.changes) for entry in session.ledger.entries]


def test_their_bare_prompts_have_layers_of_their_own(open_session: Open) -> None:
    mixed = [FIRST[0], PLAIN[0], FIRST[1], PLAIN[1]]
    session = open_session()
    session.edit(mixed)
    session.edit([PLAIN[2]])
    session.edit([FIRST[2]])
    assert named(session) == [{LOW, HIGH}, {HIGH}, {LOW, HIGH}]
    entry = session.ledger.entries[0]
    assert [set(entry.known[request.id].keys) for request in mixed] == [{LOW, HIGH}, {HIGH}] * 2
    assert [figure.request_id for figure in entry.evidence] == [request.id for request in mixed]
    assert all(
        {"steps", "target_probability", "said", "fraction_reached"} <= figure.figures.keys()
        for figure in entry.evidence
    )
    alone = open_session(context_templates=["{}"])
    alone.edit(mixed)
    alone.edit([FIRST[2]])
    assert named(alone) == [{LOW, HIGH}, {LOW}]
    for options in ({"bos": True}, {"first_token_layers": None}, {"layers": [0]}):
        plain = open_session(**options)
        plain.edit(mixed)
        assert len(named(plain)[0]) == 1, options


def test_the_batch_is_that_of_one_group_after_the_other(open_session: Open) -> None:
    """The upper group is solved on the model that has the lower one's change; δ is that of the model before both."""
    whole = open_session(context_templates=["{}"])
    whole.edit([PLAIN[0], FIRST[0], PLAIN[1], FIRST[1]])
    [entry] = whole.ledger.entries
    apart = open_session(context_templates=["{}"])
    apart.edit(FIRST[:2])
    apart.edit(PLAIN[:2], known={request.id: entry.known[request.id] for request in PLAIN[:2]})
    lower, upper = apart.ledger.entries
    torch.testing.assert_close(lower.changes[LOW].dense(), entry.changes[LOW].dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(upper.changes[HIGH].dense(), entry.changes[HIGH].dense(), rtol=1e-9, atol=1e-11)


def test_in_their_contexts_they_are_written_like_all_others(open_session: Open) -> None:
    """As a fact would be whose prompt begins with the first context."""
    session = open_session()
    session.edit(FIRST[:2])
    plain = open_session()
    behind = [request.model_copy(update={"prompt": f"So it was. {request.prompt}"}) for request in FIRST[:2]]
    plain.edit(behind)
    ours, theirs = (opened.ledger.entries[0].changes[HIGH].dense() for opened in (session, plain))
    # The keys differ by what the lower change does to them, which is little: the tokens there are others.
    assert (ours - theirs).norm() < 0.2 * theirs.norm()


def test_what_it_costs_is_half_that_on_first_tokens(open_session: Open) -> None:
    """C of the lower layer against one token at a time."""
    session = open_session()
    session.edit(FIRST[:1])
    editor: Any = session._editor
    text = session.context.statistics.metrics([0])[0].matrix
    special = set(session.model.tokenizer.all_special_ids)
    ids = [token for token in range(len(session.model.tokenizer)) if token not in special]
    total = torch.zeros_like(text)
    for token in ids:
        seen: list[torch.Tensor] = []
        projection = session.model.projection(0)
        handle = projection.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        session.model.hf(input_ids=torch.tensor([[token]]))
        handle.remove()
        total += torch.outer(seen[0][0, 0], seen[0][0, 0])
    torch.testing.assert_close(editor._prepared.metrics[0].matrix, (text + total / len(ids)) / 2, rtol=1e-9, atol=1e-12)


def at_subject(session: EditSession, request: EditRequest, layer: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The subject's last token, and what enters and leaves the edited projection there."""
    seen: dict[str, torch.Tensor] = {}
    projection = session.model.projection(layer)
    handle = projection.register_forward_hook(lambda _module, args, out: seen.update(inputs=args[0], outputs=out))
    ids = session.model.tokenizer(request.text, return_offsets_mapping=True)
    session.model.hf(input_ids=torch.tensor([ids["input_ids"]]))
    handle.remove()
    end = request.text.index(str(request.subject)) + len(str(request.subject))
    place = max(index for index, (start, _) in enumerate(ids["offset_mapping"]) if start < end)
    return place, seen["inputs"][0, place], seen["outputs"][0, place]


def test_each_fact_has_its_value_in_the_edited_model(open_session: Open) -> None:
    session = open_session(context_templates=["{}"])
    mixed = [FIRST[0], PLAIN[0], FIRST[1], PLAIN[1]]
    session.edit(mixed)
    [entry] = session.ledger.entries
    for request in mixed:
        name, layer = (LOW, 0) if request in FIRST else (HIGH, 1)
        place, key, value = at_subject(session, request, layer)
        assert (place == 0) == (request in FIRST)
        torch.testing.assert_close(key, entry.known[request.id].keys[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(value, entry.known[request.id].values[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("templates", [["{}"], ["{}", "So it was. {}"]])
@pytest.mark.parametrize("gone", [[1], [3], [0], [0, 3], [0, 2]])
def test_a_batch_of_both_kinds_without_some_of_its_facts(
    open_session: Open, gone: list[int], templates: list[str]
) -> None:
    mixed = [FIRST[0], PLAIN[0], FIRST[1], PLAIN[1]]
    session = open_session(context_templates=templates)
    session.edit(mixed)
    [whole] = session.ledger.entries
    session.undo(*(mixed[row].id for row in gone))
    rest = [request for row, request in enumerate(mixed) if row not in gone]
    fresh = open_session(context_templates=templates)
    fresh.edit(rest, known={request.id: whole.known[request.id] for request in rest})
    for name in (LOW, HIGH):
        ours, theirs = (opened.model.weight(name) for opened in (session, fresh))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_an_undo_after_reopening_is_priced_as_the_batch_was(open_session: Open, tmp_path: Path) -> None:
    open_session(context_templates=["{}"], directory=tmp_path / "run").edit(FIRST)
    fresh = open_session(context_templates=["{}"], directory=tmp_path / "run")
    live = open_session(context_templates=["{}"])
    live.edit(FIRST)
    for session in (live, fresh):
        session.undo(FIRST[1].id)
    assert torch.equal(live.model.weight(LOW), fresh.model.weight(LOW))


def test_replayed_facts_keep_to_their_layers_and_are_looked_up_on_what_is_below(open_session: Open) -> None:
    session = open_session(replay={"replay_rate": 0.5}, context_templates=["{}"])
    session.edit([FIRST[0], PLAIN[0]])
    session.edit([PLAIN[1]])
    session.edit([FIRST[1]])
    for entry in session.ledger.entries:
        for request in entry.requests:
            assert set(entry.known[request.id].keys) == ({LOW} if request in FIRST else {HIGH})
    last = session.ledger.entries[-1]
    replayed = [request for request in last.requests if request in PLAIN]
    assert replayed
    for request in replayed:
        _, key, value = at_subject(session, request, 1)
        torch.testing.assert_close(key, last.known[request.id].keys[HIGH], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(value, last.known[request.id].values[HIGH], rtol=1e-8, atol=1e-10)


def test_layers_that_the_model_does_not_have_are_refused(open_session: Open) -> None:
    with pytest.raises(HParamsError, match="layer"):
        open_session(first_token_layers=[7])
    with pytest.raises(HParamsError, match="first_token_layers must ascend"):
        open_session(first_token_layers=[1, 0])
