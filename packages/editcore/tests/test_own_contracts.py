"""What editcore itself brings keeps the contracts that it asks of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from editcore import FactRecord, Probe
from editcore.testing import DatasetContract, EvaluatorContract, ExtensionContract, tiny_model, tiny_records


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


class TestGenerationBehindTextsContract(EvaluatorContract):
    """Metrics that are there only with these settings."""

    @pytest.fixture
    def evaluator_name(self) -> str:
        return "generation"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"prefixes": [0, 3], "answer_tokens": 4, "continuation_tokens": 12}


def with_probes(records: tuple[FactRecord, ...], *probes: Probe) -> tuple[FactRecord, ...]:
    return tuple(record.model_copy(update={"probes": (*record.probes, *probes)}) for record in records)


class TestTeacherForcedContract(EvaluatorContract):
    @pytest.fixture
    def evaluator_name(self) -> str:
        return "teacher-forced"

    @pytest.fixture
    def records(self) -> tuple[FactRecord, ...]:
        kinds = ("generalization.yes", "paraphrase.personas", "portability.subject_aliasing")
        more = [Probe(kind=kind, prompt="Bob Dylan was born in", answers=("Rome",)) for kind in kinds]
        logical = Probe(kind="portability.logical_generalization", prompt="Bob Dylan was born in", answers=("Rome",))
        return with_probes(tiny_records(3), *more, logical)


class TestMultihopContract(EvaluatorContract):
    @pytest.fixture
    def evaluator_name(self) -> str:
        return "multihop"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"answer_tokens": 3}

    @pytest.fixture
    def records(self) -> tuple[FactRecord, ...]:
        """With an unedited hop and a condition that the tiny model answers, so that its edits change something."""
        prompts = ("Marie Curie was born in", "The mother tongue of Ada Lovelace is")
        said = tiny_model().generate(list(prompts), max_new_tokens=3)
        answers = [text.split(".")[0].split()[0] for text in said]
        hops = [
            Probe(kind=kind, prompt=prompts[0], answers=(answers[0],))
            for kind in ("multihop.single.unedited", "multihop.single.edited")
        ]
        first, *others = with_probes(tiny_records(3), *hops)
        condition = {"prompt": prompts[1], "answers": [answers[1]]}
        kept = {"kind": "locality.forgetfulness", "questions": [condition], "conditions": [condition]}
        return (first.model_copy(update={"extra": {"chains": [kept]}}), *others)


class TestLongAnswersContract(EvaluatorContract):
    @pytest.fixture
    def evaluator_name(self) -> str:
        return "long-answers"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"least_words": 2}

    @pytest.fixture
    def records(self) -> tuple[FactRecord, ...]:
        part = Probe(kind="portability.sub_question", prompt="Bob Dylan was born in", answers=("Rome",))
        records = with_probes(tiny_records(3), part)
        return tuple(
            record.model_copy(
                update={"request": record.request.model_copy(update={"target_new": "Paris and Rome and Berlin"})}
            )
            for record in records
        )


class TestCapabilityContract(EvaluatorContract):
    """With tasks of which the tiny model solves one of each kind."""

    @pytest.fixture
    def evaluator_name(self) -> str:
        return "capability"

    @pytest.fixture
    def hparams(self, tmp_path: Path) -> dict[str, object]:
        kinds = ("arithmetic", "copying", "instructions", "facts")
        prompts = [f"The {kind} of a" for kind in kinds]
        said = tiny_model().generate(prompts, max_new_tokens=2, raw=True)
        items = [
            {"kind": kind, "prompt": prompt, "answer": text.strip().split("\n")[0].strip().removesuffix(".").strip()}
            for kind, prompt, text in zip(kinds, prompts, said, strict=True)
        ]
        path = tmp_path / "tasks.jsonl"
        path.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
        return {"items": str(path), "answer_tokens": 2}


class TestDamageContract(EvaluatorContract):
    @pytest.fixture
    def evaluator_name(self) -> str:
        return "damage"

    @pytest.fixture
    def hparams(self) -> dict[str, object]:
        return {"prompts": 3, "continuations": 2, "continuation_tokens": 12}


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
