"""A session: one model, one editor, one backend, and the extensions that listen to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcore._errors import RequestError, UnknownNameError
from editcore._events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    Verdict,
)
from editcore._hparams import HParams, build, load_preset
from editcore._ledger import Ledger, LedgerEntry
from editcore._plugins import Lifecycle, Plugins, lifecycle, resolve
from editcore._progress import Progress, silent
from editcore._protocols import Backend, EditContext, Editor, Evaluator, ExtensionContext
from editcore._specs import EditorSpec
from editcore._values import EditBatch, EditRequest, FactoredDelta, FactRecord, Proposal
from editcore.models import LanguageModel
from editcore.statistics import StatisticsStore

if TYPE_CHECKING:
    from editcore.evaluation import PromptScore, Summary

__all__ = ["BatchResult", "EditSession"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of one batch."""

    batch: EditBatch
    proposal: Proposal
    applied: bool
    reason: str = ""
    """Why a gate rejected or scaled the batch; empty if it was accepted as it was."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a session is made of, resolved from names."""

    editor: Editor
    editor_spec: EditorSpec
    backend: Backend
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
    ) -> None:
        self.model = model
        self.ledger = ledger
        self.plugins = plugins
        self.context = context
        self.settings = parts.settings
        self._editor, self._editor_spec, self._backend = parts.editor, parts.editor_spec, parts.backend
        self._lifecycle = lifecycle
        self.extensions = parts.extensions
        # Everything that reads the unedited model happens here, before the first delta.
        self.provenance: Mapping[str, Any] = self._editor.prepare(model, context)
        self._backend.open(model)
        if ledger.entries:
            self._backend.rebuild(ledger.active())
        self._lifecycle.before_run(BeforeRun(model=model, history=tuple(ledger.entries), directory=ledger.directory))

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
            corpus: text behind the second moments; see :func:`editcore.corpora.open_corpus`.
            directory: where the ledger is kept; left out, it is kept in memory. Batches that are there are applied.

        Raises:
            EditcoreError: a name is unknown, a setting is wrong, the model cannot be loaded.
        """
        registry = registry or Plugins.load()
        parts = _resolve(registry, model, editor, plugins, backend, preset, settings or {}, seed, progress)
        if isinstance(model, str):
            model = LanguageModel.load(model, device=device, dtype=dtype, plugins=registry, progress=progress)
        store = StatisticsStore(model, corpus=corpus, tokens=corpus_tokens, seed=seed, progress=progress)
        return cls(
            model,
            parts,
            ledger=Ledger.open(directory) if directory is not None else Ledger(),
            context=EditContext(statistics=store, seed=seed, progress=progress),
            lifecycle=lifecycle(parts.extensions),
            plugins=registry,
        )

    def edit(self, requests: Sequence[EditRequest], *, batch_size: int | None = None) -> list[BatchResult]:
        """Write facts, ``batch_size`` at a time (all at once if left out), each batch durable before the next one
        starts.

        Raises:
            RequestError: no request, or two requests of one batch contradict each other.
            EditcoreError: a batch could not be solved; the batches before it stay applied.
        """
        if not requests:
            raise RequestError("There is nothing to edit: the list of requests is empty.")
        size = min(
            number
            for number in (batch_size, self._editor_spec.capabilities.max_batch, len(requests))
            if number is not None
        )
        starts = range(0, len(requests), size)
        return [self._edit_batch(tuple(requests[start : start + size])) for start in starts]

    def _edit_batch(self, requests: tuple[EditRequest, ...]) -> BatchResult:
        start = time.perf_counter()
        _refuse_contradictions(requests)
        batch = EditBatch.of(requests, index=len(self.ledger.entries))
        additions = self._lifecycle.before_batch(BeforeBatch(model=self.model, batch=batch))
        batch = _with_additions(batch, [addition for _, addition in additions])
        proposal = self._editor.propose(self.model, batch, self.context)
        for note in proposal.notes:
            _log.warning("batch %d: %s", batch.index, note)
        verdicts = self._lifecycle.before_apply(BeforeApply(model=self.model, batch=batch, proposal=proposal))
        scale, reason = _judge(verdicts)
        if scale == 0:
            _log.warning("batch %d was rejected: %s", batch.index, reason)
            return BatchResult(
                batch=batch, proposal=proposal, applied=False, reason=reason, seconds=time.perf_counter() - start
            )
        entry = _entry(batch, proposal, scale)
        self.ledger.append(entry)
        self._backend.apply(entry.deltas)
        seconds = time.perf_counter() - start
        self._lifecycle.after_batch(
            AfterBatch(model=self.model, batch=batch, proposal=proposal, entry=entry, seconds=seconds)
        )
        return BatchResult(batch=batch, proposal=proposal, applied=True, reason=reason, seconds=seconds)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The facts that are active, oldest first; a fact edited again counts where it was edited last."""
        latest: dict[tuple[str, str], EditRequest] = {}
        for entry in self.ledger.entries:
            for request in entry.requests[: entry.num_new]:
                latest.pop(request.fact_key, None)
                latest[request.fact_key] = request
        return tuple(latest.values())

    def evaluate(
        self, records: Sequence[FactRecord], *, phase: str = "after", evaluator: str = "counterfact"
    ) -> tuple[list[PromptScore], Summary]:
        """Measure the model as it is now on ``records``: every score, and their summary.

        Raises:
            UnknownNameError: there is no such evaluator.
        """
        from editcore.evaluation import summarize

        made: Evaluator = resolve(self.plugins.evaluator(evaluator).target)()
        scores = made.evaluate(self.model, records, progress=self.context.progress)
        summary = summarize(scores)
        self._lifecycle.after_evaluation(
            AfterEvaluation(phase=phase, num_edits=len(self.requests), scores=summary.percentages())
        )
        return scores, summary

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """Greedy continuations by the model as it is now."""
        return self.model.generate(prompts, max_new_tokens=max_new_tokens)

    def generate_unedited(self, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """Greedy continuations by the base model; the edits are back when this returns."""
        return self._without_edits(lambda: self.model.generate(prompts, max_new_tokens=max_new_tokens))

    def _without_edits(self, action: Callable[[], list[str]]) -> list[str]:
        self._backend.rebuild([])
        try:
            return action()
        finally:
            self._backend.rebuild(self.ledger.active())

    def save(self, directory: Path | str) -> None:
        """Write the edited model as a folder that ``from_pretrained`` loads."""
        self.model.save(Path(directory))

    def finish(self) -> None:
        """Tell the extensions that all edits are made and measured."""
        self._lifecycle.after_run(AfterRun(directory=self.ledger.directory, num_edits=len(self.requests)))

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
    editor_spec, backend_spec = registry.editor(editor), registry.backend(backend)
    extension_specs = [registry.extension(name) for name in plugins]
    named = {editor, backend, *plugins}
    for owner in settings:
        if owner not in named:
            raise UnknownNameError("settings section", owner, named, hint="A section is named after what it sets.")
    resolved: dict[str, HParams] = {}
    preset_values = _preset(editor_spec, preset, model if isinstance(model, str) else model.name)
    resolved[editor] = build(resolve(editor_spec.hparams), [preset_values, settings.get(editor, {})], owner=editor)
    made_editor: Editor = resolve(editor_spec.target)(resolved[editor])
    made_backend: Backend
    if backend_spec.hparams:
        resolved[backend] = build(resolve(backend_spec.hparams), [settings.get(backend, {})], owner=backend)
        made_backend = resolve(backend_spec.target)(resolved[backend])
    else:
        made_backend = resolve(backend_spec.target)()
    extensions: dict[str, object] = {}
    context = ExtensionContext(plugins=registry, seed=seed, progress=progress)
    for spec in extension_specs:
        if spec.hparams:
            resolved[spec.name] = build(resolve(spec.hparams), [settings.get(spec.name, {})], owner=spec.name)
        extensions[spec.name] = resolve(spec.target)(resolved.get(spec.name), context)
    return _Parts(
        editor=made_editor, editor_spec=editor_spec, backend=made_backend, extensions=extensions, settings=resolved
    )


def _preset(spec: EditorSpec, preset: str | None, model_name: str) -> Mapping[str, Any]:
    if spec.presets is None:
        return {}
    if preset is not None:
        return load_preset(spec.presets, preset)
    try:
        return load_preset(spec.presets, Path(model_name).name)
    except UnknownNameError:
        return {}


def _refuse_contradictions(requests: Sequence[EditRequest]) -> None:
    seen: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        other = seen.setdefault(request.fact_key, request)
        if other.target_new != request.target_new:
            raise RequestError(
                f"Two requests of one batch contradict each other: '{request.text}' → '{other.target_new}' and → "
                f"'{request.target_new}'. Keep one of them, or put them into different batches."
            )
        if other is not request:
            raise RequestError(f"A request is twice in one batch: '{request.text}' → '{request.target_new}'.")


def _with_additions(batch: EditBatch, additions: Sequence[BatchAddition]) -> EditBatch:
    """The batch with what extensions added, without what this batch edits anew."""
    taken = {request.id for request in batch.requests}
    edited = {request.fact_key for request in batch.requests}
    requests, weights = list(batch.requests), list(batch.weights)
    known = dict(batch.known)
    for addition in additions:
        for request, weight in zip(addition.requests, addition.weights, strict=True):
            if request.id in taken or request.fact_key in edited:
                continue
            taken.add(request.id)
            requests.append(request)
            weights.append(weight)
            if request.id in addition.known:
                known[request.id] = addition.known[request.id]
    return replace(batch, requests=tuple(requests), weights=tuple(weights), known=known)


def _judge(verdicts: Sequence[tuple[str, Verdict]]) -> tuple[float, str]:
    """The scale to apply (0 rejects) and the reasons of those who asked for less than all."""
    doubts = [(name, verdict) for name, verdict in verdicts if verdict.action != "accept"]
    reason = "; ".join(f"{name}: {verdict.reason}" for name, verdict in doubts)
    if any(verdict.action == "reject" for _, verdict in doubts):
        return 0.0, reason
    return min([1.0, *(verdict.scale for _, verdict in doubts)]), reason


def _entry(batch: EditBatch, proposal: Proposal, scale: float) -> LedgerEntry:
    # Kept as solved, in float64: the sum over batches is rounded once, when a weight is written.
    deltas = {
        name: FactoredDelta((delta.left * scale).cpu(), delta.right.cpu()) for name, delta in proposal.deltas.items()
    }
    return LedgerEntry(
        batch=batch.index,
        requests=batch.requests,
        weights=batch.weights,
        num_new=batch.num_new,
        deltas=deltas,
        known=proposal.known,
        diagnostics=proposal.diagnostics,
        scale=scale,
    )
