"""``consequences`` keeps the contract of evaluators, and ``questions`` that of data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from editcore.testing import DatasetContract, EvaluatorContract, tiny_requests


class TestConsequencesContract(EvaluatorContract):
    """The probes of every usual kind have those that it asks."""

    @pytest.fixture
    def evaluator_name(self) -> str:
        return "consequences"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"tokens": 3}


class TestQuestionsContract(DatasetContract):
    """A file of facts, with two questions that follow from each."""

    @pytest.fixture
    def dataset_name(self) -> str:
        return "questions"

    @pytest.fixture
    def hparams(self, tmp_path: Path) -> dict[str, object]:
        path = tmp_path / "questions.jsonl"
        lines = [
            {
                **request.model_dump(mode="json", include={"subject", "prompt", "target_new", "target_true"}),
                "follows": [[f"{who} that {request.text}", request.target_new] for who in ("He knows", "She says")],
                "others": [[request.subject, "who knows"]],
            }
            for request in tiny_requests(4)
        ]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        return {"file": str(path)}
