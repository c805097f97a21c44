"""A session: one model, one editor, one backend, and the extensions that listen to it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from editcore._util.files import json_text, uninterrupted
from editcore.evaluation.measures import Measure, measures_of
from editcore.evaluation.summaries import Measurement
from editcore.interfaces.changes import Written
from editcore.interfaces.errors import RequestError
from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterUndo,
    BeforeBatch,
    BeforeRun,
)
from editcore.interfaces.history import LedgerEntry, Signature
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.protocols import (
    Backend,
    EditContext,
    ReportsStatistics,
)
from editcore.interfaces.values import (
    EditBatch,
    EditRequest,
    FactRecord,
    KnownTarget,
    Proposal,
)
from editcore.ledger.ledger import Ledger
from editcore.ledger.lines import HeaderLine
from editcore.ledger.states import Edit, LeftOut
from editcore.ledger.undo import change, named
from editcore.models import LanguageModel
from editcore.models.edited import EditedModel
from editcore.models.sources import look_at
from editcore.models.tokens import refuse_too_long
from editcore.plugins.calls import boundary
from editcore.plugins.extensions import Lifecycle, lifecycle
from editcore.plugins.registry import Plugins
from editcore.runs.backends import open_backend, rebuild
from editcore.runs.batches import (
    BatchResult,
    Judged,
    entry_of,
    ids_of,
    judgement,
    refuse_equal_ids,
    rejected_by,
    with_additions,
)
from editcore.runs.config import SessionConfig
from editcore.runs.fit import check_subjects, refuse_contradictions
from editcore.runs.observing import Observer
from editcore.runs.parts import Parts, make_parts
from editcore.runs.proposing import Proposer
from editcore.runs.record import learnt_before
from editcore.runs.resolved import resolve_session
from editcore.runs.rounding import RoundingCheck
from editcore.runs.saying import with_said_figures
from editcore.runs.statistics import statistics_of
from editcore.second_moments.corpora import open_corpus

__all__ = ["EditSession"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


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
        """The model with its active edits, in the weights and beside them."""
        self.model = model = edited.model
        self.ledger = ledger
        self.plugins = plugins
        self.context = context
        self.settings = parts.resolved.settings
        """Resolved hyperparameters, by the name of editor, backend, extension and evaluator."""
        self._editor, self._editor_spec, self._backend = parts.editor, parts.resolved.editor, parts.backend
        self._proposer = Proposer(parts.editor, parts.resolved.editor, edited, context, lifecycle)
        self._observer = Observer(parts.evaluators, edited, context, folder=ledger.directory)
        self._lifecycle = lifecycle
        self.extensions = parts.extensions
        self.next_batch = ledger.batches[-1].batch + 1 if ledger.batches else 0
        """Index of the next batch. A rejected batch uses its index up; a batch that failed does not."""
        # Everything that reads the unedited model happens here, before the first edit.
        self.provenance: Mapping[str, Any] = self._editor.prepare(model, context)
        open_backend(self._backend, model, statistics=lambda: context.statistics, directory=ledger.directory)
        rebuild(self.edited, ledger)
        self._proposer.recall(ledger.history())
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
            config: the editor, backend, extensions and evaluators, and all settings.
            records: the facts with their probe prompts, for editors and extensions that use more than the requests.
            directory: where the ledger is kept; left out, it is kept in memory. The active batches of a ledger that is
                there are applied.
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
        open_corpus(
            config.corpus, seed=config.corpus_seed
        )  # an error is found now rather than after the model is loaded
        if isinstance(model, str):
            model = LanguageModel.load(model, config.load_options, families=registry.family_paths(), progress=progress)
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
                learnt=learnt_before(directory, resolved, model, seed=config.seed),
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
        signature: Signature | None = None,
    ) -> list[BatchResult]:
        """Write facts, ``batch_size`` at a time (all at once if left out). Each batch is durable before the next one
        starts.

        Args:
            known: by request id, keys and values that need no optimisation.
            signature: who writes them, and why, for the ledger.

        Raises:
            RequestError: there is no request, a request is longer than the model's positions, or two requests of one
                batch contradict each other.
            EditcoreError: a batch could not be solved; the batches before it stay applied.
        """
        if not requests:
            raise RequestError("There is nothing to edit: the list of requests is empty.")
        check_subjects(requests, self._editor_spec, self.settings[self._editor_spec.name])
        refuse_too_long(self.model, requests)
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"A batch has at least one request; batch_size is {batch_size}.")
        size = min(number for number in (batch_size, self.max_batch, len(requests)) if number is not None)
        starts = range(0, len(requests), size)
        batches = (tuple(requests[start : start + size]) for start in starts)
        return [self._edit_batch(batch, known or {}, signature) for batch in batches]

    @property
    def backend(self) -> Backend:
        """The backend that holds the changes. It may offer more than the protocol asks for."""
        return self._backend

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The metrics of the session's evaluators."""
        return measures_of(spec for spec, _ in self._observer.evaluators)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the evaluators told of measurements in this process."""
        return tuple(self._observer.notes)

    @property
    def max_batch(self) -> int | None:
        """Most requests that the editor solves together; ``None`` for no limit."""
        return self._editor_spec.capabilities.max_batch

    def _edit_batch(
        self, requests: tuple[EditRequest, ...], known: Mapping[str, KnownTarget], signature: Signature | None
    ) -> BatchResult:
        start = time.perf_counter()
        refuse_equal_ids(requests)
        targets = {request.id: known[request.id] for request in requests if request.id in known}
        batch = replace(EditBatch.of(requests, index=self.next_batch), known=targets)
        additions = self._lifecycle.before_batch(BeforeBatch(model=self.model, batch=batch))
        withdrawn = list(rejected_by(batch, {name: addition.withdrawn for name, addition in additions}))
        batch = batch.without(ids_of(withdrawn))
        refuse_contradictions(batch.requests)
        if batch.num_new:
            own = self._proposer.facts_of_its_subjects(batch)
            batch = with_additions(batch, [*(addition for _, addition in additions), own])
            judged = self._propose(batch)
        else:
            judged = Judged(batch=batch, proposal=Proposal(), verdicts={}, rejected=())
        judged = replace(judged, rejected=(*withdrawn, *judged.rejected))
        scale, reason = judgement(judged.verdicts) if judged.batch.num_new else (0.0, "every request was rejected")
        entry = replace(entry_of(judged, scale, reason), builds_on=self._builds_on(judged.batch), signature=signature)
        _warn_of_rejections(entry)
        with uninterrupted():
            proposal, entry = self._write(judged, entry)
            self.next_batch += 1
            seconds = time.perf_counter() - start
            if entry.applied:
                self._proposer.absorb(entry)
                self._lifecycle.after_batch(
                    AfterBatch(model=self.model, batch=judged.batch, proposal=proposal, entry=entry, seconds=seconds)
                )
        result = BatchResult(
            batch=judged.batch,
            proposal=proposal,
            applied=entry.applied,
            reason=reason,
            verdicts=MappingProxyType(dict(judged.verdicts)),
            rejected=entry.rejected,
            seconds=seconds,
        )
        _warn(entry.batch, [result.not_said] if result.not_said else [])
        return result

    def _builds_on(self, batch: EditBatch) -> tuple[Edit, ...]:
        """The earlier edits whose undo or redo changes what the batch must be."""
        if not self._editor_spec.capabilities.rewrites_subject:
            return ()
        return self.ledger.edits_about(batch.new_requests)

    def _propose(self, batch: EditBatch) -> Judged:
        """What the editor proposes, and what the gates leave of it."""
        if batch.held and not self._editor_spec.capabilities.uses_held:
            _log.warning(
                "batch %d: %s ignores the held keys, whose facts it should leave alone",
                batch.index,
                self._editor_spec.name,
            )
        proposal = self._proposer.propose(batch)
        _warn(batch.index, proposal.notes)
        return self._proposer.judged(batch, proposal)

    def _write(self, judged: Judged, entry: LedgerEntry) -> tuple[Proposal, LedgerEntry]:
        """Put a batch into the model and the ledger, or into neither.

        Returns:
            The proposal and the entry, with the figures that were measured after writing.
        """
        batch, proposal = judged.batch, judged.proposal
        before = RoundingCheck(self.edited, batch, proposal)
        if entry.applied:
            self.edited.apply(entry.written)  # first: a change that the backend refuses must not be in the ledger
        try:
            if entry.applied:
                rounded = before.compared(proposal, entry.changes, plugins=self.plugins)
                _warn(batch.index, rounded.notes[len(proposal.notes) :])
                proposal = replace(rounded, evidence=with_said_figures(self.model, batch, rounded.evidence))
                entry = replace(entry, evidence=proposal.evidence, notes=proposal.notes)
            kept = self.ledger.append(entry)
        except BaseException:
            if entry.applied:
                self.edited.rebuild(self.ledger.active())
            raise
        return proposal, kept

    def undo(
        self,
        *edits: str,
        batches: Sequence[int] = (),
        signature: Signature | None = None,
        as_if_never: bool = False,
    ) -> tuple[EditRequest, ...]:
        """Take edits out by id or by batch, in any order.

        A batch that keeps some of its edits is solved again without the others, from its tensors in the ledger. For an
        editor of one layer this is what the batch would have been without them. Later batches stay as they were solved.

        Args:
            as_if_never: whether later batches are solved again, as if these edits had never been solved.

        Returns:
            The requests that this call took out.

        Raises:
            RunError: there is no such edit or batch, or all are undone already.
            StorageError: the ledger cannot be written; nothing was changed.
        """
        meant = named(self.ledger, "undo", edits, batches)
        return self.change("undo", meant, signature, as_if_never=as_if_never)

    def redo(
        self, *edits: str, batches: Sequence[int] = (), signature: Signature | None = None
    ) -> tuple[EditRequest, ...]:
        """Put undone edits back. A batch that is complete again has its original bits. Otherwise as :meth:`undo`."""
        return self.change("redo", named(self.ledger, "redo", edits, batches), signature)

    def change(
        self,
        kind: Literal["undo", "redo"],
        edits: Sequence[Edit],
        signature: Signature | None = None,
        *,
        as_if_never: bool = False,
    ) -> tuple[EditRequest, ...]:
        """Undo or redo edits by batch and id, as :func:`editcore.ledger.undo.named` finds them."""
        with uninterrupted():
            before = {entry.batch: self.ledger.undone(entry.batch) for entry in self.ledger.entries}
            changed = change(
                self.ledger, kind, edits, solve=self.solve_without, signature=signature, as_if_never=as_if_never
            )
            history = self.ledger.history()
            try:
                self.edited.rebuild([entry.written for entry in history])
            except BaseException:  # a change that the backend refuses must not stay in the ledger
                marked = [(batch, name) for batch, out in before.items() for name in out ^ self.ledger.undone(batch)]
                self.ledger.mark("redo" if kind == "undo" else "undo", marked)
                self.edited.rebuild(self.ledger.active())
                raise
            self._proposer.recall(history)
            self._lifecycle.after_undo(
                AfterUndo(
                    model=self.model,
                    history=history,
                    undone=changed if kind == "undo" else (),
                    redone=changed if kind == "redo" else (),
                )
            )
        return changed

    def solve_without(
        self, entry: LedgerEntry, out: LeftOut, ledger: Ledger | None = None
    ) -> tuple[Written, EditBatch | None]:
        """What a batch writes without some edits, and what was solved for it; the model is as before when this
        returns.

        Args:
            out: what to leave out.
            ledger: has the solutions of earlier batches that this one needs; left out, the session's own.

        Raises:
            NumericalError, RunError: the rest cannot be solved.
        """
        return self._proposer.solve_without(entry, out, ledger or self.ledger)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The facts that are active, oldest first; a fact edited again counts where it was edited last."""
        return self.ledger.facts()

    def evaluate(self, records: Sequence[FactRecord], *, phase: str = "after") -> Measurement:
        """Measure the model as it is now on ``records``.

        Evaluators that compare are handed their observations of the unedited model. If these are not known yet, they
        are made first, with the edits taken out meanwhile.
        """
        found = self._observer.measure(records)
        self.tell_measured(found, records, phase=phase)
        return found

    def evaluate_unedited(self, records: Sequence[FactRecord]) -> Measurement:
        """Measure the base model on ``records``, and remember the observations. The edits are back when this
        returns."""
        with self.edited.unedited():
            found = self._observer.measure_unedited(records)
            self.tell_measured(found, records, phase="before")
        return found

    def remember_unedited(self, found: Measurement, records: Sequence[FactRecord]) -> None:
        """Remember observations of the unedited model on ``records``, made here or in an earlier process."""
        self._observer.remember(found, records)

    def tell_measured(self, found: Measurement, records: Sequence[FactRecord], *, phase: str) -> None:
        """Tell the extensions about a measurement of the model in its present state. :meth:`evaluate` does this
        itself."""
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
        """Write the edited model as a folder that ``from_pretrained`` loads. The folder is written whole or not at all.

        Args:
            dtype: type of the weights in the folder; left out, the type in the folder that the model was loaded from.

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


def _warn_of_rejections(entry: LedgerEntry) -> None:
    for rejected in entry.rejected:
        fact = f"'{rejected.request.text}' → '{rejected.request.target_new}'"
        _log.warning("batch %d: %s was rejected (%s: %s)", entry.batch, fact, rejected.by, rejected.reason)
    if not entry.applied:
        _log.warning("batch %d was rejected: %s", entry.batch, entry.reason)


def _warn(batch: int, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        _log.warning("batch %d: %s", batch, sentence)
