"""What editcore itself brings keeps the contracts that it asks of others."""

from __future__ import annotations

import pytest
from editcore.testing import DatasetContract, EvaluatorContract, ExtensionContract


class TestCounterFactContract(EvaluatorContract):
    @pytest.fixture
    def evaluator_name(self) -> str:
        return "counterfact"


class TestGenerationContract(EvaluatorContract):
    @pytest.fixture
    def evaluator_name(self) -> str:
        return "generation"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"answer_tokens": 4, "continuation_tokens": 12}


class TestSampledGenerationContract(TestGenerationContract):
    """Not every fact is asked, and not of everything."""

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"sample": 2, "further": 1, "continuations": 1, "answer_tokens": 4, "continuation_tokens": 12}


class TestWorldfactsContract(DatasetContract):
    @pytest.fixture
    def dataset_name(self) -> str:
        return "worldfacts"


class TestProfilesContract(DatasetContract):
    @pytest.fixture
    def dataset_name(self) -> str:
        return "profiles"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"facts_per_subject": 4, "order": "shuffled"}


class TestJsonlContract(ExtensionContract):
    @pytest.fixture
    def extension_name(self) -> str:
        return "jsonl"
