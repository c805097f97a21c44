"""The contract suite of data sets."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from editcore.datasets.load import content_hash, load_records
from editcore.interfaces.specs import DatasetSpec
from editcore.interfaces.values import FactRecord
from editcore.plugins.calls import resolve
from editcore.plugins.registry import Plugins
from editcore.settings.hparams import build, describe, toml_lines
from editcore.testing.contract import Contract, imports_nothing_heavy, in_new_process, survives_json

__all__ = ["DatasetContract"]

Load = Callable[[], Sequence[FactRecord]]


class DatasetContract(Contract):
    """The contract of every data set. Give ``dataset_name``, and ``hparams`` if some are required. The hyperparameter
    that its argument sets must be among them."""

    @pytest.fixture
    def dataset_name(self) -> str:
        """The name under which the data set is announced."""
        raise NotImplementedError("give the fixture dataset_name")

    @pytest.fixture
    def spec(self, registry: Plugins, dataset_name: str) -> DatasetSpec:
        """The announcement."""
        return registry.dataset(dataset_name)

    @pytest.fixture
    def load(self, spec: DatasetSpec, hparams: dict[str, object]) -> Load:
        """Loads the data set."""
        target = resolve(spec.target)
        if spec.hparams is None:
            return lambda: target()
        own = build(resolve(spec.hparams), [hparams], owner=spec.name)
        return lambda: target(own)

    def test_is_announced(self, registry: Plugins, dataset_name: str) -> None:
        """The name is registered, and what loads it can be imported."""
        spec = registry.dataset(dataset_name)
        assert spec.name == dataset_name
        assert spec.summary
        assert callable(resolve(spec.target))

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: DatasetSpec) -> None:
        """Listing data sets stays fast."""
        imports_nothing_heavy(registry, "dataset", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(self, spec: DatasetSpec, hparams: dict[str, object]) -> None:
        """What a run records can be read back, and a misspelt setting is not ignored."""
        if spec.hparams is not None:
            survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_its_argument_is_a_setting(self, registry: Plugins, spec: DatasetSpec, hparams: dict[str, object]) -> None:
        """``NAME:ARGUMENT`` gives the records that the setting gives."""
        if not spec.argument:
            return
        assert spec.hparams is not None
        known = [setting.name for setting in describe(resolve(spec.hparams))]
        assert spec.argument in known, f"its argument sets {spec.argument}, which is none of its hyperparameters"
        assert spec.argument in hparams, f"give the fixture hparams a value of {spec.argument}, which its argument sets"
        others = {name: value for name, value in hparams.items() if name != spec.argument}
        value = hparams[spec.argument]
        text = value if isinstance(value, str) else toml_lines({"value": value}).partition("=")[2].strip()
        found = load_records(f"{spec.name}:{text}", plugins=registry, settings={spec.name: others})
        expected = load_records(spec.name, plugins=registry, settings={spec.name: hparams})
        assert content_hash(found) == content_hash(expected)

    def test_it_is_a_sequence_of_fact_records(self, load: Load) -> None:
        """There is at least one, and all are of that class itself, because fields of a subclass would be lost in a
        run."""
        records = load()
        assert isinstance(records, Sequence), f"{type(records).__name__} is no sequence"
        assert len(records), "there are no records"
        others = {type(record).__name__ for record in records if type(record) is not FactRecord}
        assert not others, f"records are of the class {', '.join(sorted(others))}; fields of their own go into 'extra'"

    def test_ids_are_unique(self, load: Load) -> None:
        """Otherwise a run would change ids that come again."""
        ids = [record.request.id for record in load()]
        several = sorted(identity for identity, count in Counter(ids).items() if count > 1)
        assert not several, f"ids that come more than once: {', '.join(several[:5])}"

    def test_records_survive_json(self, load: Load) -> None:
        """A run keeps its records as JSON lines, and reads them when it is resumed."""
        for record in load():
            again = FactRecord.model_validate_json(record.model_dump_json())
            assert again == record, f"the record {record.request.id} is another one when it went through JSON"

    def test_the_content_is_the_same_every_time(
        self, registry: Plugins, spec: DatasetSpec, hparams: dict[str, object], load: Load
    ) -> None:
        """It is the same in this process and in another one, where sets of strings have another order. Sweeps find
        earlier runs by it."""
        first = content_hash(load())
        assert content_hash(load()) == first, "loaded again it has another content"
        code = (
            "import json\nfrom editcore import Plugins\nfrom editcore.datasets import content_hash\n"
            "from editcore.plugins import resolve\nfrom editcore.settings import build\n"
            f"spec, given = Plugins.load().dataset({spec.name!r}), json.loads({json.dumps(hparams)!r})\n"
            "own = [] if spec.hparams is None else [build(resolve(spec.hparams), [given], owner=spec.name)]\n"
            "print(content_hash(resolve(spec.target)(*own)))"
        )
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        elsewhere = in_new_process(code, {"PYTHONHASHSEED": seed}, doing="loading")
        assert elsewhere.splitlines()[-1] == first, "in another process it has another content"

    def test_questions_are_whole(self, load: Load) -> None:
        """Prompts of probes have the subject filled in, and no answer is empty."""
        for record in load():
            for probe in record.probes:
                assert "{}" not in probe.prompt, f"{record.request.id}: a place is left open in {probe.prompt!r}"
                assert all(answer.strip() for answer in probe.answers), f"an answer of {record.request.id} is empty"
