"""Rows that begin alike, run as trees: the scores of one text at a time, with fewer tokens."""

from __future__ import annotations

import pytest
import torch
from editcore.evaluation import TargetScore, score_targets, scoring
from editcore.evaluation.token_trees import reads_trees, run_trees, tree_of, trees_of
from editcore.models import LanguageModel
from editcore.testing import tiny_model
from hypothesis import given, strategies as st
from torch import Tensor, nn

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple), min_size=1, max_size=40, unique=True)
PROMPTS = [
    f"{start} {name} {verb}"
    for start in ("It is said that", "It is known that the mother of", "Yes,")
    for name in ("Marie Curie", "Marie Berg", "Isaac Newton")
    for verb in ("was born in", "was seen", "lives in the city of")
]
TARGETS = ["Rome and Berlin", "Rome and Paris", "golf"]
PAIRS = [(prompt, target) for prompt in PROMPTS for target in TARGETS]


@given(ROWS)
def test_a_tree_has_every_beginning_once(rows: list[tuple[int, ...]]) -> None:
    rows = sorted(rows)
    tree = tree_of(rows)
    assert [tuple(tree.ids[node] for node in path) for path in tree.paths] == rows
    assert len(tree.ids) == len({row[:end] for row in rows for end in range(1, len(row) + 1)})
    for path in tree.paths:
        assert [tree.parents[node] for node in path] == [-1, *path[:-1]]


@given(ROWS, st.integers(1, 12))
def test_trees_have_all_rows_and_few_nodes(rows: list[tuple[int, ...]], repeat: int) -> None:
    longer = [row * repeat for row in rows]
    groups = trees_of(longer)
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        tree = tree_of([longer[index] for index in group])
        assert [tuple(tree.ids[node] for node in path) for path in tree.paths] == [longer[index] for index in group]
        assert len(group) == 1 or len(tree.ids) <= 64


@torch.no_grad()
def alone(model: LanguageModel, prompt: str, target: str) -> TargetScore:
    """One text at a time, from all logits."""
    start = len(model.tokenizer(prompt)["input_ids"])
    ids = model.tokenizer(f"{prompt} {target}")["input_ids"]
    logs = model.hf(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    best = [int(logs[place - 1].argmax()) for place in range(start, len(ids))]
    losses = [-float(logs[place - 1, ids[place]]) for place in range(start, len(ids))]
    hits = sum(token == wanted for token, wanted in zip(best, ids[start:], strict=True))
    return TargetScore(sum(losses) / len(losses), hits == len(losses), len(losses), hits, tuple(best))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_scores_in_trees_are_those_of_one_text_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LEAST_SAVED", 1)
    model = tiny_model(family)
    tokens: list[tuple[int, int]] = []

    def counting(model: LanguageModel, trees: list[object], where: Tensor) -> Tensor:
        tokens.append((sum(len(tree.ids) for tree in trees), sum(len(path) for tree in trees for path in tree.paths)))  # type: ignore[attr-defined]
        return run_trees(model, trees, where)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "run_trees", counting)
    found = score_targets(model, [prompt for prompt, _ in PAIRS], [target for _, target in PAIRS])
    expected = [alone(model, *pair) for pair in PAIRS]
    assert [score.predicted for score in found] == [score.predicted for score in expected]
    assert [score.nll for score in found] == pytest.approx([score.nll for score in expected], abs=1e-5)
    nodes, without = (sum(column) for column in zip(*tokens, strict=True))
    assert nodes < 0.5 * without


def test_long_rows_stand_alone_beside_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LEAST_SAVED", 1)
    model = tiny_model("gemma2")  # of a sliding window of 64 tokens
    pairs = [*PAIRS, (" ".join(PROMPTS[:20]), "golf"), (" ".join(PROMPTS[:21]), "Rome and Berlin")]
    assert len(model.tokenizer(pairs[-1][0])["input_ids"]) > 100
    found = score_targets(model, [prompt for prompt, _ in pairs], [target for _, target in pairs])
    expected = [alone(model, *pair) for pair in pairs]
    assert [score.nll for score in found] == pytest.approx([score.nll for score in expected], abs=1e-5)


@pytest.mark.parametrize(("family", "reads"), [("llama", True), ("bloom", False), ("mpt", False), ("gpt_neo", False)])
def test_a_model_is_asked_whether_it_reads_trees(family: str, reads: bool) -> None:
    assert reads_trees(tiny_model(family)) is reads


def test_code_of_others_in_a_model_is_not_given_trees() -> None:
    model = tiny_model("llama")
    handle = model.projection(1).register_forward_hook(lambda *_: None)
    assert not reads_trees(model)
    handle.remove()
    assert reads_trees(model)

    class Own(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    model.block(0).own = Own()
    assert not reads_trees(model)


def test_few_texts_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test whether trees are read would cost more than they save."""
    monkeypatch.setattr(scoring, "reads_trees", lambda _model: pytest.fail("it was tested"))
    score_targets(tiny_model("llama"), [prompt for prompt, _ in PAIRS], [target for _, target in PAIRS])
