"""The contract suite of extensions."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editcore.interfaces.errors import RequestError
from editcore.interfaces.hookspecs import PROJECT
from editcore.interfaces.protocols import ExtensionContext, ReportsStatistics
from editcore.interfaces.specs import ExtensionSpec
from editcore.interfaces.values import EditRequest, FactRecord, Verdict
from editcore.plugins.calls import resolve
from editcore.plugins.extensions import Lifecycle, lifecycle
from editcore.plugins.registry import Plugins
from editcore.runs.batches import BatchResult
from editcore.runs.config import SessionConfig
from editcore.runs.parts import make_target
from editcore.runs.session import EditSession
from editcore.settings.hparams import build
from editcore.testing.contract import (
    CORPUS_TOKENS,
    Contract,
    MakeModel,
    ModelState,
    imports_nothing_heavy,
    renumbered,
    survives_json,
)
from editcore.testing.facts import tiny_records
from editcore.testing.suite_editor import NAME, with_suite_editor

__all__ = ["ExtensionContract"]

Open = Callable[[str], EditSession]

_STATISTIC = re.compile(r"[a-z][a-z0-9_]*")


class ExtensionContract(Contract):
    """The contract of every extension. Give ``extension_name``; ``hparams`` if some are required, or if it would reject
    all batches of a tiny model without them; ``editor_name`` and ``editor_hparams`` if it needs a certain editor."""

    @pytest.fixture
    def extension_name(self) -> str:
        """The name under which the extension is announced."""
        raise NotImplementedError("give the fixture extension_name")

    @pytest.fixture
    def registry(self) -> Plugins:
        """The installed plugins and the suite's own editor."""
        return with_suite_editor()

    @pytest.fixture
    def editor_name(self) -> str:
        """The editor of the sessions: a quick one that comes with the suite."""
        return NAME

    @pytest.fixture
    def editor_hparams(self) -> dict[str, object]:
        """Its hyperparameters."""
        return {}

    @pytest.fixture
    def records(self) -> tuple[FactRecord, ...]:
        """Six facts or more that do not contradict each other; three batches of two are edited."""
        return tiny_records(6)

    @pytest.fixture
    def batches(self, records: Sequence[FactRecord]) -> list[list[EditRequest]]:
        """Three batches."""
        requests = [record.request for record in records]
        return [requests[start : start + 2] for start in (0, 2, 4)]

    @pytest.fixture
    def spec(self, registry: Plugins, extension_name: str) -> ExtensionSpec:
        """The announcement."""
        return registry.extension(extension_name)

    @pytest.fixture
    def session_config(
        self,
        spec: ExtensionSpec,
        hparams: dict[str, object],
        editor_name: str,
        editor_hparams: dict[str, object],
        corpus: str,
    ) -> SessionConfig:
        """The configuration of the sessions."""
        own = {spec.name: hparams} if spec.hparams is not None else {}
        return SessionConfig(
            editor=editor_name,
            plugins=(spec.name,),
            settings={**own, editor_name: editor_hparams},
            corpus=corpus,
            corpus_tokens=CORPUS_TOKENS,
            evaluators=("counterfact",),
        )

    @pytest.fixture
    def open_session(
        self,
        registry: Plugins,
        session_config: SessionConfig,
        make_model: MakeModel,
        records: Sequence[FactRecord],
        tmp_path: Path,
    ) -> Open:
        """Opens a session with the extension on a new model, in the folder of that name, which may have a session
        already."""

        def make(folder: str) -> EditSession:
            directory = tmp_path / folder
            directory.mkdir(exist_ok=True)
            return EditSession.open(
                make_model(), session_config, records=records, directory=directory, registry=registry
            )

        return make

    @pytest.fixture
    def reopen(self, open_session: Open, tmp_path: Path) -> Callable[[EditSession, str], EditSession]:
        """Opens a copy of a session's folder, as a process does that resumes the run."""

        def again(session: EditSession, folder: str) -> EditSession:
            assert session.ledger.directory is not None
            shutil.copytree(session.ledger.directory, tmp_path / folder)
            return open_session(folder)

        return again

    def test_is_announced(self, registry: Plugins, extension_name: str, hparams: dict[str, object]) -> None:
        """The name is registered, and its target can be called with hyperparameters and an ``ExtensionContext``."""
        spec = registry.extension(extension_name)
        assert spec.name == extension_name
        assert spec.summary
        _made(registry, spec, hparams)

    def test_announcement_imports_no_torch(self, registry: Plugins, spec: ExtensionSpec) -> None:
        """Listing extensions stays fast."""
        imports_nothing_heavy(registry, "extension", spec.name, spec.hparams)

    def test_hparams_survive_json_and_refuse_unknown_names(
        self, spec: ExtensionSpec, hparams: dict[str, object]
    ) -> None:
        """What a run records can be read back, and a misspelt setting is not ignored."""
        if spec.hparams is not None:
            survives_json(resolve(spec.hparams), hparams, spec.name)

    def test_its_hooks_exist_and_are_marked(
        self, registry: Plugins, spec: ExtensionSpec, hparams: dict[str, object]
    ) -> None:
        """A misspelt hook, and one without ``@hookimpl``, would never be called."""
        made = _made(registry, spec, hparams)
        named = [name for name in dir(type(made)) if name.startswith("editcore_")]
        unmarked = [name for name in named if not hasattr(getattr(made, name), f"{PROJECT}_impl")]
        assert not unmarked, f"without @hookimpl: {', '.join(unmarked)}"
        assert named, "it has no hook"
        lifecycle({spec.name: made})

    def test_every_hook_leaves_the_model_as_it_is(
        self,
        open_session: Open,
        reopen: Callable[[EditSession, str], EditSession],
        batches: Sequence[Sequence[EditRequest]],
        records: Sequence[FactRecord],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Weights, hooks and flags stay, to the bit. Editors propose changes, and backends write them."""
        lifecycles: list[_RecordingLifecycle] = []

        def recording(instances: Mapping[str, object]) -> _RecordingLifecycle:
            lifecycles.append(_RecordingLifecycle(lifecycle(instances)))
            return lifecycles[-1]

        monkeypatch.setattr("editcore.runs.session.lifecycle", recording)
        session = open_session("run")
        session.evaluate(records[:2], phase="before")
        edited = _edit(session, batches[:2])
        session.evaluate(records[:2])
        for change in (session.undo, session.redo):
            change(_ids(edited[-1])[0])
        session.finish()
        reopen(session, "reopened")
        assert len(lifecycles) == 2
        changed = [change for recorded in lifecycles for change in recorded.changed]
        assert not changed, "the model changed in a hook"

    def test_statistics_are_numbers(
        self,
        open_session: Open,
        extension_name: str,
        batches: Sequence[Sequence[EditRequest]],
        records: Sequence[FactRecord],
    ) -> None:
        """Statistics have ``lower_case`` names and are finite or ``None``, before the first batch and after the last.
        Asking does not change them."""
        session = open_session("run")
        extension = session.extensions[extension_name]
        if not isinstance(extension, ReportsStatistics):
            return
        _check_statistics(extension)
        session.edit(batches[0])
        session.evaluate(records[:2])
        session.finish()
        _check_statistics(extension)

    def test_what_it_adds_is_active(self, open_session: Open, batches: Sequence[Sequence[EditRequest]]) -> None:
        """It adds only requests that were edited and not undone, and keys of such batches."""
        session = open_session("run")
        [_, last] = _edit(session, batches[:2])
        session.undo(*_ids(last))
        active = {request.id: request for request in session.requests}
        solved = {(entry.batch, request.id) for entry in session.ledger.history() for request in entry.requests}
        batch = session.edit(batches[2])[0].batch
        for request in batch.requests[batch.num_new :]:
            assert active.get(request.id) == request, f"the added request {request.id} is not active"
        missing = {(key.batch, key.request_id) for key in batch.held} - solved
        assert not missing, f"it holds keys of batches that are not active: {sorted(missing)}"

    def test_two_runs_are_alike(
        self,
        open_session: Open,
        extension_name: str,
        batches: Sequence[Sequence[EditRequest]],
    ) -> None:
        """The same seed and facts give the same result: no global random generator and no clock decides anything."""
        first, second = open_session("first"), open_session("second")
        for requests in batches:
            _assert_alike(first, second, extension_name, requests)

    def test_an_evaluation_changes_no_answer(
        self,
        open_session: Open,
        batches: Sequence[Sequence[EditRequest]],
        records: Sequence[FactRecord],
    ) -> None:
        """The ledger has no evaluations, and a resumed run does not repeat them to the extension."""
        plain, measured = open_session("plain"), open_session("measured")
        measured.evaluate(records[:2], phase="before")
        for session in (plain, measured):
            _edit(session, batches[:2])
        measured.evaluate(records[:2], phase="4")
        first, second = (_outcome(session.edit(batches[2])[0]) for session in (plain, measured))
        _assert_same(first, second, "on the next batch")

    def test_after_an_undo_it_is_as_if_the_edits_had_never_been_made(
        self,
        open_session: Open,
        reopen: Callable[[EditSession, str], EditSession],
        extension_name: str,
        batches: Sequence[Sequence[EditRequest]],
    ) -> None:
        """After an undo of a whole batch; and of a part of one, compared with a session that is opened with the
        rest."""
        plain, undone = open_session("plain"), open_session("undone")
        _edit(plain, batches[:1])
        [first, last] = _edit(undone, batches[:2])
        undone.undo(*_ids(last))
        renumbered(plain, undone)
        _assert_alike(plain, undone, extension_name, batches[2])
        undone.undo(_ids(first)[0])
        _assert_alike(undone, reopen(undone, "reopened"), extension_name, batches[1])

    def test_after_a_redo_it_is_as_if_nothing_had_been_undone(
        self, open_session: Open, extension_name: str, batches: Sequence[Sequence[EditRequest]]
    ) -> None:
        """After an undo and redo of one edit, and of all edits of a batch."""
        plain, redone = open_session("plain"), open_session("redone")
        _edit(plain, batches[:2])
        first, last = _edit(redone, batches[:2])
        for ids in (_ids(last)[:1], _ids(first)):
            redone.undo(*ids)
            redone.redo(*ids)
        _assert_alike(plain, redone, extension_name, batches[2])

    def test_a_session_that_is_opened_again_goes_on_alike(
        self,
        open_session: Open,
        reopen: Callable[[EditSession, str], EditSession],
        extension_name: str,
        batches: Sequence[Sequence[EditRequest]],
    ) -> None:
        """A run that was killed and resumed: what the extension knows is a function of the ledger."""
        whole = open_session("whole")
        _edit(whole, batches[:2])
        _assert_alike(whole, reopen(whole, "reopened"), extension_name, batches[2])

    def test_conflicts_that_it_settles_are_settled(
        self, open_session: Open, spec: ExtensionSpec, batches: Sequence[Sequence[EditRequest]]
    ) -> None:
        """An extension that announces this leaves at most one request per fact in a batch, because a session refuses
        two."""
        if not spec.settles_conflicts:
            return
        [first, second] = batches[0]
        other = first.model_copy(update={"id": "other", "target_new": second.target_new})
        try:
            open_session("run").edit([first, other, second])
        except RequestError as error:
            pytest.fail(f"it announces that it settles conflicts, and did not: {error}")


class _RecordingLifecycle:
    """Passes every event on, and records the hooks that changed the model."""

    def __init__(self, inner: Lifecycle) -> None:
        self.inner = inner
        self.changed: list[str] = []

    @property
    def reworks(self) -> bool:
        return self.inner.reworks

    def __getattr__(self, hook: str) -> Callable[[Any], object]:
        def call(event: Any) -> object:
            before = ModelState.of(event.model)
            answer: object = getattr(self.inner, hook)(event)
            self.changed += [f"{hook}: {name}" for name in before.differences(ModelState.of(event.model))]
            return answer

        return call


def _made(registry: Plugins, spec: ExtensionSpec, hparams: Mapping[str, object]) -> object:
    own = None if spec.hparams is None else build(resolve(spec.hparams), [hparams], owner=spec.name)
    made: object = make_target("plugin", spec, own, ExtensionContext(plugins=registry))
    return made


def _edit(session: EditSession, batches: Sequence[Sequence[EditRequest]]) -> list[BatchResult]:
    """Edit the batches one after the other. Each must write something that can be undone."""
    results = [session.edit(requests)[0] for requests in batches]
    assert all(result.applied for result in results), "it rejects whole batches; give hparams that let facts in"
    return results


def _ids(result: BatchResult) -> list[str]:
    """The edits of a batch."""
    return [request.id for request in result.batch.new_requests]


def _check_statistics(extension: ReportsStatistics) -> None:
    numbers = extension.statistics()
    for name, value in numbers.items():
        assert _STATISTIC.fullmatch(name), f"the name {name!r} is not lower_case"
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        assert value is None or number, f"{name} is {value!r}, which is no number"
    json.dumps(dict(numbers), allow_nan=False)
    assert extension.statistics() == numbers, "asked again, it tells something else"


def _assert_alike(first: EditSession, second: EditSession, name: str, requests: Sequence[EditRequest]) -> None:
    """Two sessions have the same statistics, treat the next batch alike, and have the same statistics after it."""
    _assert_same(_statistics(first, name), _statistics(second, name), "in its statistics")
    _assert_same(_outcome(first.edit(requests)[0]), _outcome(second.edit(requests)[0]), "on the next batch")
    _assert_same(_statistics(first, name), _statistics(second, name), "in its statistics after the next batch")


def _assert_same(first: Mapping[str, object], second: Mapping[str, object], where: str) -> None:
    differing = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    assert not differing, f"it differs {where}: " + "; ".join(
        f"{name}: {first.get(name)!r:.120} and {second.get(name)!r:.120}" for name in differing
    )


def _statistics(session: EditSession, name: str) -> dict[str, object]:
    extension = session.extensions[name]
    return dict(extension.statistics()) if isinstance(extension, ReportsStatistics) else {}


def _outcome(result: BatchResult) -> dict[str, object]:
    """Everything about a batch that an extension can influence, to be compared to the bit."""
    batch = result.batch
    return {
        "applied": result.applied,
        "reason": result.reason,
        "requests": [request.id for request in batch.requests],
        "weights": batch.weights,
        "known": {name: (_bits(target.keys), _bits(target.values)) for name, target in batch.known.items()},
        "held": [(key.batch, key.request_id, key.weight, _bits(key.keys)) for key in batch.held],
        "verdicts": {name: _verdict_parts(verdict) for name, verdict in result.verdicts.items()},
        "rejected": [
            (rejected.request.id, rejected.by, rejected.reason, repr(dict(rejected.figures)))
            for rejected in result.rejected
        ],
        "changes": {address: _bits(change.tensors()) for address, change in result.proposal.changes.items()},
    }


def _verdict_parts(verdict: Verdict) -> tuple[object, ...]:
    # As text, in which NaN is NaN.
    return verdict.action, verdict.reason, verdict.scale, repr(dict(verdict.figures)), repr(dict(verdict.rejected))


def _bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found[name] = (str(tensor.dtype), tuple(tensor.shape), raw.numpy().tobytes())
    return found
