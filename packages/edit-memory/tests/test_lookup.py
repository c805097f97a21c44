"""The two memories against slow loops in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from edit_memory.lookup import Codebook, Gated, Slots
from torch import Tensor

WIDTH, OUT = 6, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slots(count: int, *, labels: Sequence[str] | None = None, seed: int = 0) -> Slots:
    keys, values = draw(count, WIDTH, seed=seed).float(), draw(count, OUT, seed=seed + 1).float()
    return Slots(keys, values, labels or [str(number) for number in range(count)])


@pytest.mark.parametrize("gate", [0.2, 0.6, 0.95])
def test_the_gate_adds_the_residual_of_the_nearest_key(gate: float) -> None:
    memory = slots(7)
    inputs = torch.cat([draw(40, WIDTH, seed=5), memory.keys.double() + 0.2 * draw(7, WIDTH, seed=6)]).reshape(
        1, 47, -1
    )
    outputs = draw(1, 47, OUT, seed=7)
    found = Gated(memory, gate)(inputs.float(), outputs.float())
    opened = 0
    for place in range(47):
        x = inputs[0, place]
        cosines = [float(x @ key / (x.norm() * key.norm())) for key in memory.keys.double()]
        best = max(range(7), key=cosines.__getitem__)
        expected = outputs[0, place] + (memory.values[best].double() if cosines[best] > gate else 0)
        opened += cosines[best] > gate
        assert torch.allclose(found[0, place].double(), expected, atol=1e-5)
    assert 0 < opened < 47, "the test should see both"


def test_a_closed_gate_leaves_the_bits() -> None:
    outputs = torch.tensor([[-0.0] * OUT, [float("1e-42")] * OUT])
    found = Gated(slots(2), 0.999)(-slots(2).keys, outputs)
    assert torch.equal(found.view(torch.int32), outputs.view(torch.int32))


def test_of_two_facts_with_one_key_the_newer_one_answers() -> None:
    memory = slots(1)
    twice = Slots(memory.keys.repeat(2, 1), draw(2, OUT).float(), ["a", "b"])
    zero = torch.zeros(1, OUT)
    assert torch.equal(Gated(twice, 0.9)(memory.keys, zero)[0], twice.values[1])
    assert torch.equal(Codebook(twice, 1.0)(memory.keys, zero)[0], twice.values[1])


def plain_codebook(memory: Slots, radius: float) -> list[tuple[Tensor, Tensor, str, float]]:
    """Algorithm 1 of the paper, entry by entry."""
    book: list[tuple[Tensor, Tensor, str, float]] = []
    for key, value, label in zip(memory.keys.double(), memory.values.double(), memory.labels, strict=True):
        if not book:
            book.append((key, value, label, radius))
            continue
        distance, nearest = min((float((key - entry[0]).norm()), row) for row, entry in enumerate(book))
        closest = book[nearest]
        if distance > closest[3] + radius:
            book.append((key, value, label, radius))
        elif closest[2] == label:
            book[nearest] = (*closest[:3], max(closest[3], distance))
        else:
            book[nearest] = (*closest[:3], distance / 2)
            book.append((key, value, label, distance / 2))
    return book


@pytest.mark.parametrize("seed", range(4))
def test_the_codebook_adds_expands_and_splits_as_the_algorithm_says(seed: int) -> None:
    count, radius = 12, 0.6
    memory = slots(count, labels=["ab"[number % 2] for number in range(count)], seed=seed)
    memory = Slots(memory.keys * 0.45, memory.values, memory.labels)
    book = plain_codebook(memory, radius)
    assert len(book) < count, "the test should see an expansion"
    assert any(entry[3] < radius for entry in book), "the test should see a split"
    found = Codebook(memory, radius)
    assert found.radii.flip(0).tolist() == pytest.approx([entry[3] for entry in book], rel=1e-5)
    inputs = 0.45 * draw(60, WIDTH, seed=9)
    outputs = draw(60, OUT, seed=10)
    answers = found(inputs.float().reshape(3, 20, WIDTH), outputs.float().reshape(3, 20, OUT)).reshape(60, OUT)
    near = 0
    for x, output, answer in zip(inputs, outputs, answers, strict=True):
        distance, nearest = min((float((x - entry[0]).norm()), row) for row, entry in enumerate(book))
        inside = distance <= book[nearest][3]
        near += inside
        assert torch.allclose(answer.double(), book[nearest][1] if inside else output, atol=1e-5)
    assert 0 < near < 60, "the test should see both"
