"""The buffer against a plain model of it: a list that is searched from one end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from edit_replay.buffer import BufferStatistics, EditRecord, ReplayBuffer, compute_edit_priority
from editcore import EditRequest, KnownTarget
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

WEIGHT = "layer.0"


def request(subject: str = "Rome", prompt: str = "{} is in", target: str = "France") -> EditRequest:
    return EditRequest(subject=subject, prompt=prompt, target_new=target)


def known(key: float = 0.0, value: float = 0.0) -> KnownTarget:
    return KnownTarget(keys={WEIGHT: torch.tensor([key])}, values={WEIGHT: torch.tensor([value])})


def subjects(buffer: ReplayBuffer) -> list[str]:
    return [record.request.subject for record in buffer.records]


def filled(*names: str, capacity: int = 2, eviction: str = "fifo") -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, eviction="lru" if eviction == "lru" else "fifo")
    for index, name in enumerate(names):
        buffer.store(request(name), known(index, index), batch=index)
    return buffer


def kept(buffer: ReplayBuffer, name: str) -> EditRecord:
    record = buffer.get(request(name))
    assert record is not None
    return record


def test_fifo_drops_the_fact_edited_longest_ago_though_it_was_replayed() -> None:
    buffer = filled("A", "B")
    buffer.replayed(kept(buffer, "A"), known(), batch=2)
    buffer.store(request("C"), known(), batch=2)
    assert subjects(buffer) == ["B", "C"]


def test_lru_drops_the_fact_used_longest_ago() -> None:
    buffer = filled("A", "B", eviction="lru")
    buffer.replayed(kept(buffer, "A"), known(), batch=2)
    buffer.store(request("C"), known(), batch=2)
    assert subjects(buffer) == ["A", "C"]


def test_facts_without_a_subject_do_not_replace_each_other() -> None:
    buffer = ReplayBuffer(4, duplicates="subject")
    for index, prompt in enumerate(["Rome is in", "Oslo is in", "Rome is in"]):
        buffer.store(EditRequest(prompt=prompt, target_new="Norway"), known(), batch=index)
    assert [record.request.prompt for record in buffer.records] == ["Oslo is in", "Rome is in"]
    assert buffer.statistics.unique_subjects == 0


def test_a_newer_fact_replaces_the_older_one_and_starts_anew() -> None:
    buffer = filled("A", "B")
    buffer.replayed(kept(buffer, "A"), known(), batch=2)
    buffer.store(request("A", target="Spain"), known(), batch=5)
    assert subjects(buffer) == ["B", "A"]
    assert buffer.get(request("A")) is None, "the older target is forgotten"
    record = buffer.get(request("A", target="Spain"))
    assert record is not None
    assert (record.access_count, record.batch, record.order) == (0, 5, 2)


@pytest.mark.parametrize(("duplicates", "size"), [("subject", 1), ("fact", 2)])
def test_a_newer_prompt_of_one_subject_replaces_or_joins(duplicates: Literal["subject", "fact"], size: int) -> None:
    buffer = ReplayBuffer(5, duplicates=duplicates)
    buffer.store(request("A"), known(), batch=0)
    newer = request("A", prompt="{} was in")
    buffer.store(newer, known(), batch=1)
    assert buffer.get(newer) is not None
    assert (buffer.get(request("A")) is None) == (size == 1)
    assert buffer.statistics == BufferStatistics(
        size=size, unique_subjects=1, hits=0, refreshed=0, evictions=0, replacements=2 - size
    )


def test_a_replayed_fact_takes_the_new_key_and_keeps_its_first_value() -> None:
    buffer = filled("A")
    buffer.replayed(kept(buffer, "A"), known(7.0, 8.0), batch=4)
    record = kept(buffer, "A")
    assert float(record.known.keys[WEIGHT]) == 7.0
    assert float(record.known.values[WEIGHT]) == 0.0
    assert (record.access_count, record.sources) == (1, {WEIGHT: 4})


def test_a_refreshed_fact_takes_the_new_value_too() -> None:
    buffer = filled("A")
    buffer.replayed(kept(buffer, "A"), known(7.0, 8.0), batch=4, refreshed=True)
    assert float(kept(buffer, "A").known.values[WEIGHT]) == 8.0
    assert (buffer.statistics.hits, buffer.statistics.refreshed) == (1, 1)


def test_a_check_sets_strength_and_priority() -> None:
    buffer = filled("A")
    assert kept(buffer, "A").failed
    assert kept(buffer, "A").priority == compute_edit_priority(None) == 1.0
    buffer.checked(kept(buffer, "A"), strength=0.75)
    assert (kept(buffer, "A").failed, kept(buffer, "A").priority) == (False, 0.25)
    buffer.checked(kept(buffer, "A"), strength=0.75, success=0.25)
    assert (kept(buffer, "A").failed, kept(buffer, "A").priority) == (True, 0.75)


def test_importance_multiplies_what_is_missing() -> None:
    buffer = ReplayBuffer(2)
    record = buffer.store(request("A"), known(), batch=0, importance=3.0)
    buffer.checked(record, strength=0.5)
    assert kept(buffer, "A").priority == compute_edit_priority(0.5, importance=3.0) == 1.5


def test_a_record_that_is_gone_cannot_be_replayed() -> None:
    buffer = filled("A")
    record = kept(buffer, "A")
    buffer = filled("B")
    with pytest.raises(KeyError, match="A is in"):
        buffer.replayed(record, known(), batch=1)


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="found 0"):
        ReplayBuffer(0)


@dataclass
class Plain:
    """One fact of the plain model."""

    request: EditRequest
    key: float
    value: float
    order: int
    used: int
    accesses: int = 0


class BufferMachine(RuleBasedStateMachine):
    """Stores, replays and refreshes in any order."""

    @initialize(capacity=st.integers(1, 4), lru=st.booleans(), by_subject=st.booleans())
    def start(self, capacity: int, lru: bool, by_subject: bool) -> None:
        self.lru, self.by_subject = lru, by_subject
        self.buffer = ReplayBuffer(
            capacity, eviction="lru" if lru else "fifo", duplicates="subject" if by_subject else "fact"
        )
        self.facts: list[Plain] = []
        self.clock = self.stored = self.hits = self.refreshed = self.evictions = self.replacements = 0

    def same(self, first: EditRequest, second: EditRequest) -> bool:
        return first.subject == second.subject and (self.by_subject or first.prompt == second.prompt)

    @rule(
        subject=st.sampled_from("ABCDE"), prompt=st.sampled_from(["{} is", "{} was"]), new_object=st.sampled_from("xy")
    )
    def store(self, subject: str, prompt: str, new_object: str) -> None:
        new = request(subject, prompt, new_object)
        older = [fact for fact in self.facts if self.same(fact.request, new)]
        if older:
            self.facts.remove(older[0])
            self.replacements += 1
        elif len(self.facts) == self.buffer.capacity:
            self.facts.remove(min(self.facts, key=lambda fact: fact.used if self.lru else fact.order))
            self.evictions += 1
        self.clock += 1
        self.facts.append(Plain(new, self.stored, self.stored, self.stored, self.clock))
        self.buffer.store(new, known(self.stored, self.stored), batch=self.stored)
        self.stored += 1

    @precondition(lambda self: self.facts)
    @rule(data=st.data(), refreshed=st.booleans())
    def replay(self, data: st.DataObject, refreshed: bool) -> None:
        fact = data.draw(st.sampled_from(self.facts))
        self.clock += 1
        fact.key, fact.used, fact.accesses = fact.key + 0.5, self.clock, fact.accesses + 1
        fact.value += 0.25 * refreshed
        self.hits += 1
        self.refreshed += refreshed
        record = self.buffer.get(fact.request)
        assert record is not None
        replayed = known(fact.key, fact.value if refreshed else -1.0)
        self.buffer.replayed(record, replayed, batch=self.clock, refreshed=refreshed)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "buffer"):
            return
        found = [
            (r.request, float(r.known.keys[WEIGHT]), float(r.known.values[WEIGHT]), r.order, r.access_count)
            for r in self.buffer.records
        ]
        expected = [(f.request, f.key, f.value, f.order, f.accesses) for f in self.facts]
        assert found == sorted(expected, key=lambda row: row[3])
        assert len(self.buffer) <= self.buffer.capacity
        assert self.buffer.statistics == BufferStatistics(
            size=len(self.facts),
            unique_subjects=len({fact.request.subject for fact in self.facts}),
            hits=self.hits,
            refreshed=self.refreshed,
            evictions=self.evictions,
            replacements=self.replacements,
        )


TestBufferAgainstAPlainModel = BufferMachine.TestCase
TestBufferAgainstAPlainModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
