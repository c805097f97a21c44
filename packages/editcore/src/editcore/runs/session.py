"""A session: one model, one editor, one backend, and the extensions that listen to it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from editcore._util.files import json_text, uninterrupted
from editcore.interfaces.errors import HParamsError, NumericalError, PluginError, RequestError, UnknownNameError
from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
)
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.protocols import (
    Backend,
    EditContext,
    Editor,
    Evaluator,
    ExtensionContext,
    ReportsStatistics,
    Resolves,
)
from editcore.interfaces.specs import BackendSpec, EditorSpec, ExtensionSpec, Spec
from editcore.interfaces.values import (
    EditBatch,
    EditEvidence,
    EditRequest,
    FactoredDelta,
    FactRecord,
    HeldKey,
    KnownTarget,
    Proposal,
    RejectedRequest,
    Rejection,
    Verdict,
)
from editcore.ledger.ledger import Ledger, entry_without
from editcore.ledger.lines import HeaderLine
from editcore.ledger.undo import change
from editcore.models import LanguageModel
from editcore.models.writing import misfits
from editcore.plugins.registry import Lifecycle, Plugins, boundary, lifecycle, resolve
from editcore.runs.backends import open_backend, rebuild, save_edited
from editcore.second_moments.statistics import StatisticsStore
from editcore.settings.hparams import HParams, build, describe
from editcore.settings.presets import get_preset, preset_for, presets_of

if TYPE_CHECKING:
    from editcore.evaluation import PromptScore, Summary

__all__ = ["BatchResult", "EditSession", "make_backend", "resolve_settings"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of one batch."""

    batch: EditBatch
    """Without the requests that were rejected one by one."""
    proposal: Proposal
    """For what is in ``batch``; empty if nothing is."""
    applied: bool
    reason: str = ""
    """Why a gate rejected or scaled the batch; empty if it was accepted as it was."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """By the name of the extension that judged, in the order in which they did."""
    rejected: tuple[RejectedRequest, ...] = ()
    """Requests that were left out while the others went on."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a session is made of, resolved from names."""

    editor: Editor
    editor_spec: EditorSpec
    backend: Backend
    backend_name: str
    extensions: Mapping[str, object]
    settings: Mapping[str, HParams]
    """Resolved hyperparameters by name of editor, backend and extension."""


class EditSession:
    """Edits a model, measures it, and can take every batch back.

    Open one with :meth:`open`. The session owns the model it is given: its weights are the base weights plus the active
    batches, until the session is closed.

    >>> session = EditSession.open("smollm2-135m", editor="emmet", plugins=["replay"])  # doctest: +SKIP
    >>> session.edit([EditRequest(subject="Rome", prompt="{} is in", target_new="France")])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: LanguageModel,
        parts: _Parts,
        *,
        ledger: Ledger,
        context: EditContext,
        lifecycle: Lifecycle,
        plugins: Plugins,
        evaluator: Evaluator,
    ) -> None:
        self.model = model
        self.ledger = ledger
        self.plugins = plugins
        self.context = context
        self.settings = parts.settings
        self._editor, self._editor_spec, self._backend = parts.editor, parts.editor_spec, parts.backend
        self._backend_name = parts.backend_name
        self._evaluator = evaluator
        self._lifecycle = lifecycle
        self.extensions = parts.extensions
        self.next_batch = ledger.batches[-1].batch + 1 if ledger.batches else 0
        """Index of the next batch. A rejected batch has used its index up, one that failed has not."""
        # Everything that reads the unedited model happens here, before the first delta.
        self.provenance: Mapping[str, Any] = self._editor.prepare(model, context)
        open_backend(self._backend, model, statistics=lambda: context.statistics, directory=ledger.directory)
        rebuild(self._backend, model, ledger)
        self._lifecycle.before_run(BeforeRun(model=model, history=ledger.history(), directory=ledger.directory))

    @classmethod
    def open(
        cls,
        model: LanguageModel | str,
        *,
        editor: str,
        plugins: Sequence[str] = (),
        backend: str = "raw",
        preset: str | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        corpus: str = "self",
        corpus_tokens: int | None = None,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "float32",
        chat_template: bool = False,
        evaluator: str = "counterfact",
        directory: Path | None = None,
        registry: Plugins | None = None,
        progress: Progress = silent,
    ) -> EditSession:
        """Open a session.

        Args:
            model: a :class:`LanguageModel`, a catalogue name, a folder or a hub id.
            editor: name of an installed editor.
            plugins: names of extensions, in the order in which they were asked for.
            preset: a preset of the editor; left out, the one named like the model is used where there is one.
            settings: hyperparameters by the name of the editor, backend or extension: ``{"emmet": {"layers": [3]}}``.
            corpus: text behind the second moments; see :func:`editcore.second_moments.corpora.open_corpus`.
            chat_template: put the model's chat template around every prompt, of edits and of measurements.
            evaluator: what :meth:`evaluate` measures by.
            directory: where the ledger is kept; left out, it is kept in memory. Batches that are there are applied.

        Raises:
            EditcoreError: a name is unknown, a setting is wrong, the model cannot be loaded.
        """
        registry = registry or Plugins.load()
        measure = registry.evaluator(evaluator)
        parts = _resolve(registry, model, editor, plugins, backend, preset, settings or {}, seed, progress)
        if isinstance(model, str):
            model = LanguageModel.load(
                model,
                device=device,
                dtype=dtype,
                chat_template=chat_template,
                families=registry.family_paths(),
                progress=progress,
            )
        elif chat_template:
            model.use_chat_template()
        store = StatisticsStore(model, corpus=corpus, tokens=corpus_tokens, seed=seed, progress=progress)
        header = HeaderLine(model=model.name, fingerprint=model.base_fingerprint, editor=editor)
        return cls(
            model,
            parts,
            ledger=Ledger.open(directory, header) if directory is not None else Ledger(header=header),
            context=EditContext(statistics=store, seed=seed, progress=progress),
            lifecycle=lifecycle(parts.extensions),
            plugins=registry,
            evaluator=_make("evaluator", measure),
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
            RequestError: no request, or two requests of one batch contradict each other.
            EditcoreError: a batch could not be solved; the batches before it stay applied.
        """
        if not requests:
            raise RequestError("There is nothing to edit: the list of requests is empty.")
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"A batch has at least one request; batch_size is {batch_size}.")
        size = min(number for number in (batch_size, self.max_batch, len(requests)) if number is not None)
        starts = range(0, len(requests), size)
        return [self._edit_batch(tuple(requests[start : start + size]), known or {}) for start in starts]

    @property
    def backend(self) -> Backend:
        """What holds the deltas; a backend may offer more than the protocol asks for."""
        return self._backend

    @property
    def max_batch(self) -> int | None:
        """Most requests that the editor solves together; ``None`` for no limit."""
        return self._editor_spec.capabilities.max_batch

    def _edit_batch(self, requests: tuple[EditRequest, ...], known: Mapping[str, KnownTarget]) -> BatchResult:
        start = time.perf_counter()
        _refuse_equal_ids(requests)
        mine = {one.id: known[one.id] for one in requests if one.id in known}
        batch = replace(EditBatch.of(requests, index=self.next_batch), known=mine)
        additions = self._lifecycle.before_batch(BeforeBatch(model=self.model, batch=batch))
        rejected = list(_rejected(batch, {name: addition.withdrawn for name, addition in additions}))
        batch = batch.without(_ids(rejected))
        _refuse_contradictions(batch.requests)
        proposal = Proposal(deltas={}, evidence=(), known={})
        verdicts: dict[str, Verdict] = {}
        if batch.num_new:
            batch = _with_additions(batch, [addition for _, addition in additions])
            if batch.held and not self._editor_spec.capabilities.uses_held:
                _log.warning(
                    "batch %d: %s does not look at the keys that it shall leave alone",
                    batch.index,
                    self._editor_spec.name,
                )
            proposal = self._proposed(batch)
            batch, proposal, verdicts, more = self._judged(batch, proposal)
            rejected += more
        scale, reason = _judge(verdicts) if batch.num_new else (0.0, "every request was rejected")
        entry = _entry(batch, proposal, scale, reason, verdicts, rejected)
        for one in rejected:
            asked = f"'{one.request.text}' → '{one.request.target_new}'"
            _log.warning("batch %d: %s was rejected (%s: %s)", batch.index, asked, one.by, one.reason)
        if not entry.applied:
            _log.warning("batch %d was rejected: %s", batch.index, reason)
        with uninterrupted():
            if entry.applied:
                self._backend.apply(entry.deltas)  # first: what it refuses must not be in the ledger
            try:
                self.ledger.append(entry)
            except BaseException:
                if entry.applied:
                    self._backend.rebuild(self.ledger.active())
                raise
            self.next_batch += 1
            seconds = time.perf_counter() - start
            if entry.applied:
                self._lifecycle.after_batch(
                    AfterBatch(model=self.model, batch=batch, proposal=proposal, entry=entry, seconds=seconds)
                )
        return BatchResult(
            batch=batch,
            proposal=proposal,
            applied=entry.applied,
            reason=reason,
            verdicts=verdicts,
            rejected=entry.rejected,
            seconds=seconds,
        )

    def _proposed(self, batch: EditBatch) -> Proposal:
        """What the editor proposes, checked."""
        proposal = self._editor.propose(self.model, batch, self.context)
        for note in proposal.notes:
            _log.warning("batch %d: %s", batch.index, note)
        _check_deltas(self.model, proposal.deltas, editor=self._editor_spec.name)
        return proposal

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
            return self._propose_rest(whole, asked, {*_ids(rejected), *ids})

        while batch.num_new:
            event = BeforeApply(model=self.model, batch=batch, proposal=proposal, without=without)
            verdicts = dict(self._lifecycle.before_apply(event))
            found = list(_rejected(batch, {name: verdict.rejected for name, verdict in verdicts.items()}))
            if not found or _judge(verdicts)[0] == 0:
                break
            rejected += found
            batch = whole.without(_ids(rejected))
            if batch.num_new:
                proposal = without(())
        if not batch.num_new:  # what was added to the batch goes with it
            batch = batch.without({request.id for request in batch.requests})
            proposal, verdicts = Proposal(deltas={}, evidence=(), known={}), {}
        return batch, proposal, verdicts, rejected

    def _propose_rest(self, batch: EditBatch, proposal: Proposal, rejected: Collection[str]) -> Proposal:
        """The proposal for a batch without some of its new requests, with the targets that ``proposal`` found.

        What is known of how a target was optimised is taken over; nothing is optimised again.
        """
        rest = batch.without(rejected, proposal.known)
        _refuse_no_rest(rest, batch, rejected)
        again = self._editor.propose(self.model, rest, self.context)
        _check_deltas(self.model, again.deltas, editor=self._editor_spec.name)
        first = {one.request_id: one for one in proposal.evidence}
        stages = [*proposal.seconds, *(name for name in again.seconds if name not in proposal.seconds)]
        return replace(
            again,
            evidence=tuple(_with_optimisation(one, first.get(one.request_id, one)) for one in again.evidence),
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
                self._backend.rebuild([entry.deltas for entry in history])
            except BaseException:  # what a backend refuses must not stay in the ledger
                marked = [(batch, name) for batch, out in before.items() for name in out ^ self.ledger.undone(batch)]
                self.ledger.mark("redo" if kind == "undo" else "undo", marked)
                self._backend.rebuild(self.ledger.active())
                raise
            self._lifecycle.after_undo(
                AfterUndo(
                    model=self.model,
                    history=history,
                    undone=changed if kind == "undo" else (),
                    redone=changed if kind == "redo" else (),
                )
            )
        return changed

    def solve_without(self, entry: LedgerEntry, undone: frozenset[str]) -> Mapping[str, FactoredDelta]:
        """The deltas of a batch without some of its new requests; the model is as before when this returns.

        Raises:
            NumericalError: the rest cannot be solved.
        """
        rows = entry.kept_rows(undone)
        deltas = None
        if isinstance(self._editor, Resolves):
            deltas = self._editor.resolve(self.model, entry.as_batch(), entry.deltas, rows, self.context)
        if deltas is None:
            deltas = self._propose_again(entry_without(entry, undone, {}))
        _check_deltas(self.model, deltas, editor=self._editor_spec.name)
        return {name: FactoredDelta(delta.left.cpu(), delta.right.cpu()) for name, delta in deltas.items()}

    def _propose_again(self, entry: LedgerEntry) -> Mapping[str, FactoredDelta]:
        """Propose a batch with the targets it had, on the model with the active batches before it."""
        self._backend.rebuild([earlier.deltas for earlier in self.ledger.history() if earlier.batch < entry.batch])
        try:
            proposal = self._editor.propose(self.model, entry.as_batch(), self.context)
        finally:
            self._backend.rebuild(self.ledger.active())
        return {name: FactoredDelta(delta.left * entry.scale, delta.right) for name, delta in proposal.deltas.items()}

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The facts that are active, oldest first; a fact edited again counts where it was edited last."""
        return self.ledger.facts()

    def evaluate(self, records: Sequence[FactRecord], *, phase: str = "after") -> tuple[list[PromptScore], Summary]:
        """Measure the model as it is now on ``records``: every score, and their summary."""
        from editcore.evaluation import summarize

        scores = self._evaluator.evaluate(self.model, records, progress=self.context.progress)
        summary = summarize(scores)
        self.tell_measured(summary, phase=phase)
        return scores, summary

    def tell_measured(self, summary: Summary, *, phase: str) -> None:
        """Tell the extensions what was measured; :meth:`evaluate` does."""
        self._lifecycle.after_evaluation(
            AfterEvaluation(phase=phase, num_edits=len(self.requests), scores=summary.percentages())
        )

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """Greedy continuations by the model as it is now."""
        return self.model.generate(prompts, max_new_tokens=max_new_tokens)

    def generate_unedited(self, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """Greedy continuations by the base model; the edits are back when this returns."""
        return self.without_edits(lambda: self.model.generate(prompts, max_new_tokens=max_new_tokens))

    def without_edits(self, action: Callable[[], T]) -> T:
        """Do something with the base model; the edits are back when this returns."""
        self._backend.rebuild([])
        try:
            return action()
        finally:
            self._backend.rebuild(self.ledger.active())

    def save(self, directory: Path | str) -> None:
        """Write the edited model as a folder that ``from_pretrained`` loads."""
        save_edited(self.model, self._backend, Path(directory))

    def finish(self) -> None:
        """Tell the extensions that all edits are made and measured."""
        self._lifecycle.after_run(AfterRun(directory=self.ledger.directory, num_edits=len(self.requests)))

    def statistics(self) -> dict[str, dict[str, Any]]:
        """What extensions and the backend count about themselves, by their names; see
        :class:`editcore.ReportsStatistics`."""
        found = {}
        for name, extension in {self._backend_name: self._backend, **self.extensions}.items():
            if isinstance(extension, ReportsStatistics):
                with boundary(f"The plugin '{name}' failed in statistics: "):
                    found[name] = json.loads(json_text(dict(extension.statistics())))
        return found

    def close(self) -> None:
        """Take all deltas out: the model has its base bits again."""
        self._backend.rebuild([])


def _resolve(
    registry: Plugins,
    model: LanguageModel | str,
    editor: str,
    plugins: Sequence[str],
    backend: str,
    preset: str | None,
    settings: Mapping[str, Mapping[str, Any]],
    seed: int,
    progress: Progress,
) -> _Parts:
    """Names to objects. Everything that can be wrong with names and settings is found here, before a model is
    loaded."""
    model_name = model if isinstance(model, str) else model.name
    resolved = resolve_settings(
        registry, model_name, editor=editor, plugins=plugins, backend=backend, preset=preset, settings=settings
    )
    editor_spec = registry.editor(editor)
    made_editor: Editor = _make("editor", editor_spec, resolved[editor])
    made_backend, _ = make_backend(registry.backend(backend), settings.get(backend, {}))
    extensions: dict[str, object] = {}
    context = ExtensionContext(plugins=registry, seed=seed, progress=progress)
    for name in plugins:
        extensions[name] = _make("plugin", registry.extension(name), resolved.get(name), context)
    return _Parts(
        editor=made_editor,
        editor_spec=editor_spec,
        backend=made_backend,
        backend_name=backend,
        extensions=extensions,
        settings=resolved,
    )


def resolve_settings(
    registry: Plugins,
    model_name: str,
    *,
    editor: str,
    plugins: Sequence[str],
    backend: str,
    preset: str | None,
    settings: Mapping[str, Mapping[str, Any]],
    note: Callable[[str], None] = lambda text: _log.warning("%s", text),
) -> dict[str, HParams]:
    """Every hyperparameter of a session, by the name of editor, backend or extension; nothing is made.

    Args:
        note: told which preset was chosen, where that is not plain.

    Raises:
        UnknownNameError: a name or a section is unknown.
        HParamsError: a setting is unknown, missing or wrong.
    """
    editor_spec, backend_spec = registry.editor(editor), registry.backend(backend)
    companions: list[BackendSpec | ExtensionSpec] = [backend_spec, *(registry.extension(name) for name in plugins)]
    named = {editor, backend, *plugins}
    for owner in settings:
        if owner not in named:
            raise UnknownNameError("settings section", owner, named, hint="A section is named after what it sets.")
    resolved: dict[str, HParams] = {}
    resolved[editor] = _editor_settings(editor_spec, preset, settings.get(editor, {}), model_name, note)
    for spec in companions:
        own = _settings(spec, spec.hparams, settings.get(spec.name, {}))
        if own is not None:
            resolved[spec.name] = own
    return resolved


def make_backend(spec: BackendSpec, settings: Mapping[str, Any]) -> tuple[Backend, HParams | None]:
    """A backend with its hyperparameters, if it has any.

    Raises:
        HParamsError: a setting is unknown or wrong.
        PluginError: the backend's own code failed.
    """
    own = _settings(spec, spec.hparams, settings)
    backend: Backend = _make("backend", spec) if own is None else _make("backend", spec, own)
    return backend, own


def _make(kind: str, spec: Spec, *arguments: object) -> Any:
    target = resolve(spec.target)
    with boundary(f"The {kind} '{spec.name}' cannot be set up: "):
        return target(*arguments)


def _settings(spec: Spec, hparams: str | None, given: Mapping[str, Any]) -> HParams | None:
    if hparams is not None:
        made: HParams = build(resolve(hparams), [given], owner=spec.name)
        return made
    if given:
        raise HParamsError(f"{spec.name}: unknown setting '{next(iter(given))}'. It has no hyperparameters.")
    return None


def _editor_settings(
    spec: EditorSpec,
    preset: str | None,
    given: Mapping[str, Any],
    model_name: str,
    note: Callable[[str], None],
) -> HParams:
    hparams: type[HParams] = resolve(spec.hparams)
    chosen = get_preset(spec, preset) if preset is not None else preset_for(spec, model_name)
    if chosen is not None and chosen.note:
        note(chosen.note)
    values = {**(chosen.values() if chosen is not None else {}), **given}
    known = {setting.name: setting for setting in describe(hparams)}
    missing = [setting for setting in known.values() if setting.required and setting.name not in values]
    presets = presets_of(spec)
    # With an unknown name among the values, that one was probably meant: build says so.
    if missing and presets and preset is None and known.keys() >= values.keys():
        lacking = missing[0]
        kind = f"{lacking.type}, {lacking.allowed}" if lacking.allowed else lacking.type
        example = "[3]" if lacking.type == "list of int" else "VALUE"
        raise HParamsError(
            f"{spec.name}: {lacking.name} is required ({kind}), and no preset is named like the model '{model_name}'. "
            f"Set it, such as --set {lacking.name}={example}, let 'editctl onboard {model_name}' find it, or choose "
            f"another model's preset with --preset ({', '.join(presets)})."
        )
    return build(hparams, [values], owner=spec.name)


def default_editor(registry: Plugins, model_name: str) -> str:
    """The editor for someone who names none: the first by name that has a preset for the model, or the only one.

    Raises:
        HParamsError: no editor is installed, or none of several has such a preset.
    """
    editors = registry.editors()
    fitting = [name for name in sorted(editors) if preset_for(editors[name], model_name) is not None]
    if fitting or len(editors) == 1:
        return [*fitting, *editors][0]
    installed = ", ".join(sorted(editors)) or "none"
    raise HParamsError(f"No editor was given, and none has a preset for {model_name}. Installed: {installed}.")


def _refuse_equal_ids(requests: Sequence[EditRequest]) -> None:
    ids: dict[str, EditRequest] = {}
    for request in requests:
        if (other := ids.get(request.id)) is not None:
            if other == request:
                raise RequestError(f"A request is twice in one batch: '{request.text}' → '{request.target_new}'.")
            raise RequestError(
                f"Two requests of one batch have the id '{request.id}': '{other.text}' and '{request.text}'."
            )
        ids[request.id] = request


def _refuse_contradictions(requests: Sequence[EditRequest]) -> None:
    facts: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        if (other := facts.get(request.fact_key)) is not None:
            if other.target_new == request.target_new:
                raise RequestError(f"A request is twice in one batch: '{request.text}' → '{request.target_new}'.")
            raise RequestError(
                f"Two requests of one batch contradict each other: '{request.text}' → '{other.target_new}' and → "
                f"'{request.target_new}'. Keep one of them, or put them into different batches."
            )
        facts[request.fact_key] = request


def _rejected(batch: EditBatch, by: Mapping[str, Mapping[str, Rejection]]) -> Iterator[RejectedRequest]:
    """What extensions reject of a batch, each request once, in the batch's order.

    Raises:
        PluginError: one of them names what is no new request of the batch.
    """
    new = {request.id for request in batch.new_requests}
    for name, rejections in by.items():
        for one in rejections:
            if one not in new:
                raise PluginError(f"The plugin '{name}' rejects '{one}', which is no new request of the batch.")
    for request in batch.new_requests:
        for name, rejections in by.items():
            if (why := rejections.get(request.id)) is not None:
                yield RejectedRequest(request=request, by=name, reason=why.reason, figures=why.figures)
                break


def _ids(rejected: Sequence[RejectedRequest]) -> set[str]:
    return {one.request.id for one in rejected}


def _refuse_no_rest(rest: EditBatch, batch: EditBatch, rejected: Collection[str]) -> None:
    unknown = set(rejected) - {request.id for request in batch.new_requests}
    if unknown:
        raise PluginError(f"A batch cannot be solved without '{min(unknown)}', which is no new request of it.")
    if not rest.num_new:
        raise PluginError("A batch cannot be solved without any of its new requests: nothing is left to edit.")


def _with_optimisation(again: EditEvidence, first: EditEvidence) -> EditEvidence:
    """Evidence of a second solve, with what the first one's optimisation said."""
    return replace(
        again,
        steps=first.steps,
        target_loss=first.target_loss,
        target_probability=first.target_probability,
        delta_norm=first.delta_norm,
        value_norm=first.value_norm,
    )


def _with_additions(batch: EditBatch, additions: Sequence[BatchAddition]) -> EditBatch:
    """The batch with what extensions added, without what this batch edits anew."""
    taken = {request.id for request in batch.requests}
    edited = {request.fact_key for request in batch.requests}
    requests, weights = list(batch.requests), list(batch.weights)
    known, held = dict(batch.known), list(batch.held)
    for addition in additions:
        held += addition.held
        for request, weight in zip(addition.requests, addition.weights, strict=True):
            if request.id in taken or request.fact_key in edited:
                continue
            taken.add(request.id)
            requests.append(request)
            weights.append(weight)
            if request.id in addition.known:
                known[request.id] = addition.known[request.id]
    return replace(batch, requests=tuple(requests), weights=tuple(weights), known=known, held=HeldKey.ordered(held))


def _check_deltas(model: LanguageModel, deltas: Mapping[str, FactoredDelta], *, editor: str) -> None:
    """Refuse what no backend could write: the ledger must never hold it."""
    for name, found, expected in misfits(model, deltas):
        raise PluginError(
            f"The editor '{editor}' proposed a change of {found[0]} by {found[1]} for {name}, which is "
            f"{expected[0]} by {expected[1]} (out, in); nothing was applied."
        )
    for name, delta in deltas.items():
        if not delta.is_finite():
            raise NumericalError(f"The editor '{editor}' proposed NaN or Inf for {name}; nothing was applied.")


def _judge(verdicts: Mapping[str, Verdict]) -> tuple[float, str]:
    """The scale to apply (0 rejects) and the reasons of those who asked for less than all."""
    for name, verdict in verdicts.items():
        if verdict.action not in ("accept", "scale", "reject"):
            raise PluginError(f"The plugin '{name}' judged '{verdict.action}'; it may accept, scale or reject.")
        if verdict.action == "scale" and not 0 <= verdict.scale <= 1:
            raise PluginError(f"The plugin '{name}' asked for scale {verdict.scale}; it lies between 0 and 1.")
    doubts = {name: verdict for name, verdict in verdicts.items() if verdict.action != "accept"}
    reason = "; ".join(f"{name}: {verdict.reason}" for name, verdict in doubts.items())
    if any(verdict.action == "reject" for verdict in doubts.values()):
        return 0.0, reason
    return min([1.0, *(verdict.scale for verdict in doubts.values())]), reason


def _entry(
    batch: EditBatch,
    proposal: Proposal,
    scale: float,
    reason: str,
    verdicts: Mapping[str, Verdict],
    rejected: Sequence[RejectedRequest],
) -> LedgerEntry:
    # Kept as solved, in float64: the sum over batches is rounded once, when a weight is written.
    deltas = {
        name: FactoredDelta((delta.left * scale).cpu(), delta.right.cpu()) for name, delta in proposal.deltas.items()
    }
    applied = scale > 0
    return LedgerEntry(
        batch=batch.index,
        requests=batch.requests,
        weights=batch.weights,
        num_new=batch.num_new,
        deltas=deltas if applied else {},
        known=proposal.known if applied else {},
        diagnostics=proposal.diagnostics,
        scale=scale,
        evidence=proposal.evidence,
        notes=proposal.notes,
        reason=reason,
        verdicts=verdicts,
        held=batch.held,
        rejected=tuple(rejected),
    )
