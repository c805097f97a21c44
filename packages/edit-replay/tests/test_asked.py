"""Earlier facts are asked in turn before a batch; those that the model no longer says are optimised again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from edit_replay.extension import ReplayExtension
from edit_replay.hparams import ReplayHParams
from editcore import BatchAddition, BeforeBatch, EditBatch, EditRequest, EditSession
from editcore.models import LanguageModel
from editcore.testing import tiny_model, tiny_requests

Open = Callable[..., EditSession]
ReplayOf = Callable[[EditSession], ReplayExtension]


def says(model: LanguageModel, request: EditRequest) -> bool:
    """Whether each token of the target is the most probable one, a forward pass for each."""
    text = model.tokenizer(request.text)["input_ids"]
    whole = model.tokenizer(request.text + " " + request.target_new)["input_ids"]
    for end in range(len(text), len(whole)):
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([whole[:end]])).logits
        if int(logits[0, -1].argmax()) != whole[end]:
            return False
    return True


@pytest.fixture(scope="module")
def requests() -> list[EditRequest]:
    """Every second one is a fact that the tiny model says already; it does not learn to say the others."""
    model = tiny_model(dtype=torch.float64)
    found = list(tiny_requests(16))
    for index in range(0, len(found), 2):
        with torch.no_grad():
            ids = model.tokenizer(found[index].text)["input_ids"]
            word = model.tokenizer.decode(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        found[index] = found[index].model_copy(update={"target_new": word.strip()})
    return found


def additions(
    replay: ReplayExtension, session: EditSession, requests: list[EditRequest], turns: int
) -> list[BatchAddition | None]:
    return [
        replay.editcore_before_batch(BeforeBatch(model=session.model, batch=EditBatch.of(requests[14:], index=index)))
        for index in range(turns)
    ]


@pytest.mark.parametrize(("asked", "turns"), [(6, 1), (3, 2), (2, 3), (0.5, 12)])
@pytest.mark.parametrize("mode", ["requests", "both"])
def test_each_lost_fact_joins_once_in_a_round(
    open_session: Open, replay_of: ReplayOf, requests: list[EditRequest], asked: float, turns: int, mode: str
) -> None:
    session = open_session(replay={"replay_rate": 0, "replay_asked": asked, "replay_mode": mode})
    session.edit(requests[:12])
    lost = [request.id for request in requests[:12] if not says(session.model, request)]
    assert 1 < len(lost) < 12
    found = additions(replay_of(session), session, requests, turns)
    joined = [request.id for addition in found if addition is not None for request in addition.requests]
    assert sorted(joined) == sorted(lost)
    for addition in found:
        if addition is not None:
            assert not addition.known  # optimised again
            assert {key.request_id for key in addition.held} == (
                {request.id for request in requests[:12]} - {request.id for request in addition.requests}
                if mode == "both"
                else set()
            )


def test_a_lost_fact_gets_a_new_value(open_session: Open, replay_of: ReplayOf, requests: list[EditRequest]) -> None:
    session = open_session(replay={"replay_rate": 0, "replay_asked": 12})
    session.edit(requests[:12])
    first = session.ledger.entries[-1]
    lost = {request.id for request in requests[:12] if not says(session.model, request)}
    session.edit(requests[12:13])
    second = session.ledger.entries[-1]
    assert {request.id for request in second.requests[second.num_new :]} == lost
    statistics = replay_of(session).statistics()
    assert statistics["hits"] == statistics["refreshed"] == len(lost)
    for record in replay_of(session).buffer.records:
        source = second if record.batch == second.batch or record.request.id in lost else first
        for name, value in record.known.values.items():
            assert torch.equal(value, source.known[record.request.id].values[name])


def test_a_replayed_fact_is_not_asked(open_session: Open, replay_of: ReplayOf, requests: list[EditRequest]) -> None:
    session = open_session(replay={"replay_rate": 12, "replay_asked": 12})
    session.edit(requests[:12])
    (addition,) = additions(replay_of(session), session, requests, 1)
    assert addition is not None
    assert sorted(request.id for request in addition.requests) == sorted(request.id for request in requests[:12])


def test_statistics_alone_ask_nothing(open_session: Open, requests: list[EditRequest]) -> None:
    session = open_session(replay={"replay_mode": "statistics", "replay_asked": 12})
    session.edit(requests[:12])
    session.edit(requests[12:13])
    entry = session.ledger.entries[-1]
    assert entry.requests == tuple(requests[12:13])


@pytest.mark.parametrize(("asked", "num_new", "expected"), [(5, 10, 50), (0.3, 10, 3), (0.05, 1, 1), (0, 10, 0)])
def test_the_number_asked_is_rounded_up(asked: float, num_new: int, expected: int) -> None:
    assert ReplayHParams(replay_asked=asked).asked(num_new) == expected
