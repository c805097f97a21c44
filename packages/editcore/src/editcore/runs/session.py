"""A session: one model, one editor, one backend, and the extensions that listen to it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from editcore._util.files import json_text, uninterrupted
from editcore.evaluation.measures import Measure, measures_of
from editcore.evaluation.measuring import measure
from editcore.evaluation.summaries import Measurement
from editcore.interfaces.changes import Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError
from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterUndo,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
)
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.metrics import Observation
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.protocols import (
    Backend,
    EditContext,
    Evaluator,
    Remembers,
    ReportsStatistics,
    Resolves,
)
from editcore.interfaces.specs import EvaluatorSpec
from editcore.interfaces.values import (
    EditBatch,
    EditRequest,
    FactRecord,
    KnownTarget,
    Proposal,
    RejectedRequest,
    Verdict,
)
from editcore.ledger.ledger import Ledger, entry_without
from editcore.ledger.lines import HeaderLine
from editcore.ledger.undo import change
from editcore.models import LanguageModel
from editcore.models.edited import EditedModel
from editcore.models.sources import look_at
from editcore.models.tokens import refuse_too_long
from editcore.plugins.registry import Lifecycle, Plugins, boundary, lifecycle
from editcore.runs.backends import open_backend, rebuild
from editcore.runs.batches import (
    check_written,
    entry_of,
    ids_of,
    judgement,
    on_cpu,
    refuse_contradictions,
    refuse_equal_ids,
    refuse_no_rest,
    rejected_by,
    scaled,
    with_additions,
)
from editcore.runs.config import SessionConfig
from editcore.runs.fit import check_subjects
from editcore.runs.parts import Parts, make_parts
from editcore.runs.resolved import resolve_session
from editcore.runs.rounding import Asked
from editcore.runs.saying import not_said, with_what_is_said
from editcore.runs.statistics import statistics_of
from editcore.second_moments.corpora import open_corpus

__all__ = ["BatchResult", "EditSession"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of one batch."""

    batch: EditBatch
    """Without the requests that were rejected one by one."""
    proposal: Proposal
    """For what is in ``batch``; empty if nothing is."""
    applied: bool
    """Whether anything was put into the model."""
    reason: str = ""
    """Why a gate rejected or scaled the batch; empty if it was accepted as it was."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """By the name of the extension that judged, in the order in which they did."""
    rejected: tuple[RejectedRequest, ...] = ()
    """Requests that were left out while the others went on."""
    seconds: float = 0.0
    """Wall time of the batch, without evaluation."""

    @property
    def not_said(self) -> str:
        """A sentence about facts that the model does not say to their bare prompts though they were written; empty if
        it says all."""
        return not_said(self.batch.new_requests, self.proposal.evidence) if self.applied else ""


class EditSession:
    """Edits a model, measures it, and can take every batch back.

    Open one with :meth:`open`. The session owns the model it is given: its weights are the base weights plus the active
    batches, until the session is closed.

    >>> config = SessionConfig(editor="emmet", plugins=["replay"])
    >>> session = EditSession.open("smollm2-135m", config)  # doctest: +SKIP
    >>> session.edit([EditRequest(subject="Rome", prompt="{} is in", target_new="France")])  # doctest: +SKIP
    """

    def __init__(
        self,
        edited: EditedModel,
        parts: Parts,
        *,
        ledger: Ledger,
        context: EditContext,
        lifecycle: Lifecycle,
        plugins: Plugins,
    ) -> None:
        self.edited = edited
        """The model with what is active in its weights and beside them."""
        self.model = model = edited.model
        self.ledger = ledger
        self.plugins = plugins
        self.context = context
        self.settings = parts.resolved.settings
        """Resolved hyperparameters, by the name of editor, backend, extension and evaluator."""
        self._editor, self._editor_spec, self._backend = parts.editor, parts.resolved.editor, parts.backend
        self._evaluators = parts.evaluators
        self._unedited: dict[str, dict[str, Sequence[Observation]]] = {spec.name: {} for spec, _ in parts.evaluators}
        """By evaluator and request id, what was observed of the unedited model."""
        self._lifecycle = lifecycle
        self.extensions = parts.extensions
        self.next_batch = ledger.batches[-1].batch + 1 if ledger.batches else 0
        """Index of the next batch. A rejected batch has used its index up, one that failed has not."""
        # Everything that reads the unedited model happens here, before the first edit.
        self.provenance: Mapping[str, Any] = self._editor.prepare(model, context)
        open_backend(self._backend, model, statistics=lambda: context.statistics, directory=ledger.directory)
        rebuild(self.edited, ledger)
        self._recall(ledger.history())
        self._lifecycle.before_run(
            BeforeRun(
                model=model,
                history=ledger.history(),
                directory=ledger.directory,
                records=tuple(context.records.values()),
            )
        )

    @classmethod
    def open(
        cls,
        model: LanguageModel | str | Path,
        config: SessionConfig,
        *,
        records: Sequence[FactRecord] = (),
        directory: Path | str | None = None,
        registry: Plugins | None = None,
        progress: Progress = silent,
    ) -> EditSession:
        """Open a session.

        Args:
            model: a :class:`LanguageModel`, a catalogue name, a folder or a hub id. A model that is loaded already
                keeps its device and its type.
            config: the editor, its companions, and all settings.
            records: what an editor may know of the facts beside their requests.
            directory: where the ledger is kept; left out, it is kept in memory. Batches that are there are applied.
            registry: the installed plugins, if they are loaded already.

        Raises:
            EditcoreError: a name is unknown, a setting is wrong, the model cannot be loaded.
        """
        model = str(model) if isinstance(model, Path) else model
        registry = registry or Plugins.load()
        if isinstance(model, str):
            look_at(model)
        resolved = resolve_session(registry, model if isinstance(model, str) else model.name, config)
        parts = make_parts(resolved, registry, seed=config.seed, progress=progress)
        open_corpus(config.corpus, seed=config.corpus_seed)  # found now rather than after the model was loaded
        if isinstance(model, str):
            model = LanguageModel.load(
                model,
                device=config.device,
                dtype=config.dtype,
                chat_template=config.chat_template,
                families=registry.family_paths(),
                progress=progress,
            )
        elif config.chat_template:
            model.use_chat_template()
        header = HeaderLine(model=model.name, fingerprint=model.base_fingerprint, editor=config.editor)
        edited = EditedModel(model, parts.backend, spec=resolved.backend, plugins=registry)
        return cls(
            edited,
            parts,
            ledger=Ledger(header=header) if directory is None else Ledger.open(Path(directory), header),
            context=EditContext(
                statistics=statistics_of(config, model, progress=progress),
                trial=edited.trial_of,
                plugins=registry,
                records={record.request.id: record for record in records},
                seed=config.seed,
                progress=progress,
            ),
            lifecycle=lifecycle(parts.extensions),
            plugins=registry,
        )

    def edit(
        self,
        requests: Sequence[EditRequest],
        *,
        batch_size: int | None = None,
        known: Mapping[str, KnownTarget] | None = None,
    ) -> list[BatchResult]:
        """Write facts, ``batch_size`` at a time (all at once if left out), each batch durable before the next one
        starts.

        Args:
            known: by request id, keys and values that need no optimisation.

        Raises:
            RequestError: no request, one that is longer than the model's positions, or two requests of one batch
                contradict each other.
            EditcoreError: a batch could not be solved; the batches before it stay applied.
        """
        if not requests:
            raise RequestError("There is nothing to edit: the list of requests is empty.")
        check_subjects(requests, self._editor_spec)
        refuse_too_long(self.model, requests)
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"A batch has at least one request; batch_size is {batch_size}.")
        size = min(number for number in (batch_size, self.max_batch, len(requests)) if number is not None)
        starts = range(0, len(requests), size)
        return [self._edit_batch(tuple(requests[start : start + size]), known or {}) for start in starts]

    @property
    def backend(self) -> Backend:
        """What holds the changes; a backend may offer more than the protocol asks for."""
        return self._backend

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The metrics of its evaluators."""
        return measures_of(spec for spec, _ in self._evaluators)

    @property
    def max_batch(self) -> int | None:
        """Most requests that the editor solves together; ``None`` for no limit."""
        return self._editor_spec.capabilities.max_batch

    def _edit_batch(self, requests: tuple[EditRequest, ...], known: Mapping[str, KnownTarget]) -> BatchResult:
        start = time.perf_counter()
        refuse_equal_ids(requests)
        mine = {one.id: known[one.id] for one in requests if one.id in known}
        batch = replace(EditBatch.of(requests, index=self.next_batch), known=mine)
        additions = self._lifecycle.before_batch(BeforeBatch(model=self.model, batch=batch))
        rejected = list(rejected_by(batch, {name: addition.withdrawn for name, addition in additions}))
        batch = batch.without(ids_of(rejected))
        refuse_contradictions(batch.requests)
        proposal = Proposal()
        verdicts: dict[str, Verdict] = {}
        if batch.num_new:
            batch = with_additions(batch, [addition for _, addition in additions])
            if batch.held and not self._editor_spec.capabilities.uses_held:
                _log.warning(
                    "batch %d: %s does not look at the keys that it shall leave alone",
                    batch.index,
                    self._editor_spec.name,
                )
            proposal = self._proposed(batch)
            batch, proposal, verdicts, more = self._judged(batch, proposal)
            rejected += more
        scale, reason = judgement(verdicts) if batch.num_new else (0.0, "every request was rejected")
        entry = entry_of(batch, proposal, scale, reason, verdicts, rejected)
        for one in rejected:
            asked = f"'{one.request.text}' → '{one.request.target_new}'"
            _log.warning("batch %d: %s was rejected (%s: %s)", batch.index, asked, one.by, one.reason)
        if not entry.applied:
            _log.warning("batch %d was rejected: %s", batch.index, reason)
        with uninterrupted():
            before = Asked(self.edited, batch, proposal)
            if entry.applied:
                self.edited.apply(entry.written)  # first: what is refused must not be in the ledger
            try:
                if entry.applied:
                    proposal = self._told(before, proposal, entry)
                    proposal = replace(proposal, evidence=with_what_is_said(self.model, batch, proposal.evidence))
                    entry = replace(entry, evidence=proposal.evidence, notes=proposal.notes)
                self.ledger.append(entry)
            except BaseException:
                if entry.applied:
                    self.edited.rebuild(self.ledger.active())
                raise
            self.next_batch += 1
            seconds = time.perf_counter() - start
            if entry.applied:
                if isinstance(self._editor, Remembers):
                    self._editor.absorb(entry)
                self._lifecycle.after_batch(
                    AfterBatch(model=self.model, batch=batch, proposal=proposal, entry=entry, seconds=seconds)
                )
        result = BatchResult(
            batch=batch,
            proposal=proposal,
            applied=entry.applied,
            reason=reason,
            verdicts=verdicts,
            rejected=entry.rejected,
            seconds=seconds,
        )
        if result.not_said:
            _log.warning("batch %d: %s", batch.index, result.not_said)
        return result

    def _proposed(self, batch: EditBatch) -> Proposal:
        """What the editor proposes, checked."""
        proposal = self._propose(batch)
        self._say(batch.index, proposal.notes)
        return proposal

    def _told(self, before: Asked, proposal: Proposal, entry: LedgerEntry) -> Proposal:
        """The proposal with what has become of it in the weights."""
        told = before.told(proposal, entry.changes, plugins=self.plugins)
        self._say(entry.batch, told.notes[len(proposal.notes) :])
        return told

    @staticmethod
    def _say(batch: int, notes: Sequence[str]) -> None:
        for note in notes:
            _log.warning("batch %d: %s", batch, note)

    def _propose(self, batch: EditBatch) -> Proposal:
        proposal = self._editor.propose(self.model, batch, self.context)
        check_written(self.model, proposal.written, self._editor_spec, self.edited.spec)
        if all(change.norm() == 0 for change in proposal.changes.values()) and proposal.attachment is None:
            note = "The change of this batch is zero: the model is as it was, and says what it said."
            proposal = replace(proposal, notes=(*proposal.notes, note))
        return proposal

    def _recall(self, history: Sequence[LedgerEntry]) -> None:
        if isinstance(self._editor, Remembers):
            self._editor.recall(history)

    @contextmanager
    def _trial(self, proposal: Proposal, scale: float) -> Iterator[None]:
        with self.edited.trial(scaled(proposal.written, scale)):
            yield

    def _judged(
        self, batch: EditBatch, proposal: Proposal
    ) -> tuple[EditBatch, Proposal, dict[str, Verdict], list[RejectedRequest]]:
        """Ask the gates until they reject no more requests: at most once per new request, because each round takes one.

        Returns:
            What is left of the batch, its proposal, the last verdicts, and what was rejected.
        """
        whole, asked = batch, proposal
        verdicts: dict[str, Verdict] = {}
        rejected: list[RejectedRequest] = []

        def without(ids: Collection[str]) -> Proposal:
            return self._propose_rest(whole, asked, {*ids_of(rejected), *ids})

        while batch.num_new:
            event = BeforeApply(model=self.model, batch=batch, proposal=proposal, trial=self._trial, without=without)
            verdicts = dict(self._lifecycle.before_apply(event))
            found = list(rejected_by(batch, {name: verdict.rejected for name, verdict in verdicts.items()}))
            if not found or judgement(verdicts)[0] == 0:
                break
            rejected += found
            batch = whole.without(ids_of(rejected))
            if batch.num_new:
                proposal = without(())
        if not batch.num_new:  # what was added to the batch goes with it
            batch = batch.without({request.id for request in batch.requests})
            proposal, verdicts = Proposal(), {}
        return batch, proposal, verdicts, rejected

    def _propose_rest(self, batch: EditBatch, proposal: Proposal, rejected: Collection[str]) -> Proposal:
        """The proposal for a batch without some of its new requests, with the targets that ``proposal`` found: nothing
        is optimised again."""
        rest = batch.without(rejected, proposal.known)
        refuse_no_rest(rest, batch, rejected)
        again = self._propose(rest)
        stages = [*proposal.seconds, *(name for name in again.seconds if name not in proposal.seconds)]
        return replace(
            again,
            notes=tuple(dict.fromkeys([*proposal.notes, *again.notes])),
            seconds={name: proposal.seconds.get(name, 0.0) + again.seconds.get(name, 0.0) for name in stages},
        )

    def undo(self, *edits: str, batches: Sequence[int] = ()) -> tuple[EditRequest, ...]:
        """Take edits out, by id or with whole batches, in any order; the model is then as if they had never been made.

        A batch that keeps some of its edits is solved again without the others, from what the ledger has of it: for one
        layer that is what the batch would have been without them. Later batches stay as they were solved.

        Returns:
            The requests that are out now and were not before.

        Raises:
            RunError: there is no such edit or batch, or all are undone already.
            StorageError: the ledger cannot be written; nothing was changed.
        """
        return self._change("undo", edits, batches)

    def redo(self, *edits: str, batches: Sequence[int] = ()) -> tuple[EditRequest, ...]:
        """Put undone edits back; a batch that is complete again has its first bits. As :meth:`undo` otherwise."""
        return self._change("redo", edits, batches)

    def _change(
        self, kind: Literal["undo", "redo"], edits: Sequence[str], batches: Sequence[int]
    ) -> tuple[EditRequest, ...]:
        with uninterrupted():
            before = {entry.batch: self.ledger.undone(entry.batch) for entry in self.ledger.entries}
            changed = change(self.ledger, kind, edits, batches, solve=self.solve_without)
            history = self.ledger.history()
            try:
                self.edited.rebuild([entry.written for entry in history])
            except BaseException:  # what a backend refuses must not stay in the ledger
                marked = [(batch, name) for batch, out in before.items() for name in out ^ self.ledger.undone(batch)]
                self.ledger.mark("redo" if kind == "undo" else "undo", marked)
                self.edited.rebuild(self.ledger.active())
                raise
            self._recall(history)
            self._lifecycle.after_undo(
                AfterUndo(
                    model=self.model,
                    history=history,
                    undone=changed if kind == "undo" else (),
                    redone=changed if kind == "redo" else (),
                )
            )
        return changed

    def solve_without(self, entry: LedgerEntry, undone: frozenset[str]) -> Written:
        """What a batch writes without some of its new requests; the model is as before when this returns.

        Raises:
            NumericalError: the rest cannot be solved.
        """
        written = None
        if isinstance(self._editor, Resolves):
            written = self._editor.resolve(self.model, entry, entry.kept_rows(undone), self.context)
        if written is None:
            written = self._propose_again(entry_without(entry, undone, Written()))
        check_written(self.model, written, self._editor_spec, self.edited.spec)
        return on_cpu(written)

    def _propose_again(self, entry: LedgerEntry) -> Written:
        """Propose a batch with the targets it had, on the model as it was when the batch came: what was undone since
        makes no difference, so the order of undoing does not show."""
        earlier = self.ledger.history_before(entry.batch)
        try:
            self.edited.rebuild([one.written for one in earlier])
            self._recall(earlier)
            proposal = self._editor.propose(self.model, entry.as_batch(), self.context)
        finally:
            self.edited.rebuild(self.ledger.active())
            self._recall(self.ledger.history())
        return scaled(proposal.written, entry.scale)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The facts that are active, oldest first; a fact edited again counts where it was edited last."""
        return self.ledger.facts()

    def evaluate(self, records: Sequence[FactRecord], *, phase: str = "after") -> Measurement:
        """Measure the model as it is now on ``records``.

        Evaluators that compare are handed what they observed of the unedited model; where that is not known yet, it is
        measured first, with the edits taken out meanwhile.
        """
        comparing = [(spec, evaluator) for spec, evaluator in self._evaluators if spec.compares]
        for spec, evaluator in comparing:
            known = self._unedited[spec.name]
            missing = [record for record in records if record.request.id not in known]
            if missing:
                with self.edited.unedited():
                    self.remember_unedited(self._measured([(spec, evaluator)], missing, unedited=None), missing)
        unedited = {
            name: [one for record in records for one in known.get(record.request.id, ())]
            for name, known in self._unedited.items()
        }
        found = self._measured(self._evaluators, records, unedited=unedited)
        self.tell_measured(found, records, phase=phase)
        return found

    def evaluate_unedited(self, records: Sequence[FactRecord]) -> Measurement:
        """Measure the base model on ``records``, and remember what was observed; the edits are back when this
        returns."""
        with self.edited.unedited():
            found = self._measured(self._evaluators, records, unedited=None)
            self.remember_unedited(found, records)
            self.tell_measured(found, records, phase="before")
        return found

    def _measured(
        self,
        evaluators: Sequence[tuple[EvaluatorSpec, Evaluator]],
        records: Sequence[FactRecord],
        *,
        unedited: Mapping[str, Sequence[Observation]] | None,
    ) -> Measurement:
        seed, progress = self.context.seed, self.context.progress
        return measure(evaluators, self.model, records, unedited=unedited, seed=seed, progress=progress)

    def remember_unedited(self, found: Measurement, records: Sequence[FactRecord]) -> None:
        """Take what was observed of the unedited model on ``records``, here or in an earlier process."""
        for evaluator, observations in found.observations.items():
            of_record: dict[str, list[Observation]] = {record.request.id: [] for record in records}
            for one in observations:
                of_record[one.request_id].append(one)
            self._unedited[evaluator] |= of_record

    def tell_measured(self, found: Measurement, records: Sequence[FactRecord], *, phase: str) -> None:
        """Tell the extensions what was measured of the model as it is; :meth:`evaluate` does."""
        self._lifecycle.after_evaluation(
            AfterEvaluation(
                model=self.model,
                phase=phase,
                num_edits=len(self.requests),
                records=tuple(records),
                observations=found.observations,
                scores=found.summary.values(),
            )
        )

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """Greedy continuations by the model as it is now."""
        return self.model.generate(prompts, max_new_tokens=max_new_tokens)

    def generate_unedited(self, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """Greedy continuations by the base model; the edits are back when this returns."""
        return self.without_edits(lambda: self.model.generate(prompts, max_new_tokens=max_new_tokens))

    def without_edits(self, action: Callable[[], T]) -> T:
        """Do something with the base model; the edits are back when this returns."""
        with self.edited.unedited():
            return action()

    def save(self, directory: Path | str, *, dtype: str | None = None) -> None:
        """Write the edited model as a folder that ``from_pretrained`` loads: whole or not at all.

        Args:
            dtype: of the weights in the folder; left out, as in the folder that the model was loaded from.

        Raises:
            ModelError: a part of the edits is kept outside the weights.
            StorageError: the folder is there already, or cannot be written.
        """
        self.edited.save(Path(directory), dtype=dtype)

    def finish(self) -> None:
        """Tell the extensions that all edits are made and measured."""
        self._lifecycle.after_run(
            AfterRun(
                model=self.model,
                records=tuple(self.context.records.values()),
                directory=self.ledger.directory,
                num_edits=len(self.requests),
            )
        )

    def statistics(self) -> dict[str, dict[str, Any]]:
        """What extensions and the backend count about themselves, by their names; see
        :class:`editcore.ReportsStatistics`."""
        found = {}
        for name, extension in {self.edited.spec.name: self._backend, **self.extensions}.items():
            if isinstance(extension, ReportsStatistics):
                with boundary(f"The plugin '{name}' failed in statistics: "):
                    found[name] = json.loads(json_text(dict(extension.statistics())))
        return found

    def close(self) -> None:
        """Take all edits out: the model has its base bits again."""
        self.edited.rebuild([])
