"""The hooks of editcore: ten registrations and eight moments in a run.

Registration hooks are implemented at module level in a plugin's ``plugin.py`` and only announce. Lifecycle hooks are
implemented as methods of an extension, and are called only in the runs that ask for it (``--plugin NAME``).
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterSolve,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    Registration,
    Rework,
)
from editcore.interfaces.specs import (
    AttachmentSpec,
    BackendSpec,
    CommandSpec,
    ComponentSpec,
    DatasetSpec,
    EditorSpec,
    EvaluatorSpec,
    ExecutorSpec,
    ExtensionSpec,
    ModelFamilySpec,
)
from editcore.interfaces.values import Verdict

PROJECT = "editcore"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RegistrationHooks:
    """Announcements. Called once per process, when the registry of that kind is first asked for.

    Order does not matter: two plugins that claim one name are an error that names both. An implementation may leave
    the event out of its signature. Returning an empty list is the same as not implementing the hook. Implementations
    must import neither torch nor transformers.
    """

    @hookspec
    def editcore_editors(self, event: Registration) -> Sequence[EditorSpec]:
        """Announce editing methods.

        Called once per process, before the first look at any editor, in no particular order. Nothing may be changed.
        The returned specs become choices of ``--editor``.
        """
        raise NotImplementedError

    @hookspec
    def editcore_backends(self, event: Registration) -> Sequence[BackendSpec]:
        """Announce ways to put changes of weights into a model.

        Called once per process, before the first look at any backend, in no particular order. Nothing may be changed.
        The returned specs become choices of ``--backend``.
        """
        raise NotImplementedError

    @hookspec
    def editcore_extensions(self, event: Registration) -> Sequence[ExtensionSpec]:
        """Announce companions of a run.

        Called once per process, before the first look at any extension, in no particular order. Nothing may be
        changed. The returned specs become choices of ``--plugin``.
        """
        raise NotImplementedError

    @hookspec
    def editcore_attachments(self, event: Registration) -> Sequence[AttachmentSpec]:
        """Announce kinds of knowledge kept beside the weights.

        Called once per process, before the first attachment is installed, in no particular order. Nothing may be
        changed. A returned spec installs the attachments of its name, in proposals and in ledgers.
        """
        raise NotImplementedError

    @hookspec
    def editcore_evaluators(self, event: Registration) -> Sequence[EvaluatorSpec]:
        """Announce measurements.

        Called once per process, before the first look at any evaluator, in no particular order. Nothing may be
        changed. The returned specs become choices of ``--evaluator``.
        """
        raise NotImplementedError

    @hookspec
    def editcore_datasets(self, event: Registration) -> Sequence[DatasetSpec]:
        """Announce sources of fact records.

        Called once per process, before the first look at any data set, in no particular order. Nothing may be changed.
        The returned specs become choices of ``--dataset``.
        """
        raise NotImplementedError

    @hookspec
    def editcore_executors(self, event: Registration) -> Sequence[ExecutorSpec]:
        """Announce places where independent trials run.

        Called once per process, before the first look at any executor, in no particular order. Nothing may be changed.
        The returned specs become choices of ``--executor``.
        """
        raise NotImplementedError

    @hookspec
    def editcore_model_families(self, event: Registration) -> Sequence[ModelFamilySpec]:
        """Announce module paths of architectures whose structure cannot be detected.

        Called once per process, before the first model is loaded, in no particular order. Nothing may be changed. A
        returned spec overrides detection for its ``model_types``; the forward check still has to pass.
        """
        raise NotImplementedError

    @hookspec
    def editcore_commands(self, event: Registration) -> Sequence[CommandSpec]:
        """Announce subcommands of ``editctl``.

        Called once per start of ``editctl``, in no particular order. Nothing may be changed. Each returned spec becomes
        ``editctl NAME ...``; its module is imported when that command runs.
        """
        raise NotImplementedError

    @hookspec
    def editcore_components(self, event: Registration) -> Sequence[ComponentSpec]:
        """Announce parts for another plugin's extension point.

        Called once per process, before the first look at any component, in no particular order. Nothing may be changed.
        The returned specs are grouped by ``kind``; names are unique within a kind.
        """
        raise NotImplementedError


class LifecycleHooks:
    """Moments in a run. Called on the extensions of that run, the last one given on the command line first."""

    @hookspec
    def editcore_before_run(self, event: BeforeRun) -> None:
        """Get ready for a run.

        Called once, after the model is loaded and before the first batch. ``event.history`` holds what a resumed run
        has applied already: an extension rebuilds its state from it. The model must not be changed. The return value
        is ignored. An exception ends the run with the extension's name.
        """
        raise NotImplementedError

    @hookspec
    def editcore_before_batch(self, event: BeforeBatch) -> BatchAddition | None:
        """Add requests to a batch, or take new ones out of it.

        Called once per batch, before its keys are computed. The model must not be changed. A returned addition is
        appended to the new requests; ``None`` adds nothing. A request that is new in this batch is dropped from the
        addition. Additions of several extensions are joined in call order; of two requests with one id, the first is
        used. A new request that an extension withdraws is not edited. A batch that loses all its requests is rejected.
        """
        raise NotImplementedError

    @hookspec
    def editcore_after_solve(self, event: AfterSolve) -> Rework | None:
        """Rework the changes that an editor proposes.

        Called whenever an editor has solved a batch: before it is judged, again for the rest of a batch that lost
        requests, and when an undo or redo solves a batch again. Each extension is given what the one before it left.
        ``None`` leaves the changes as they are. What it does must follow from ``event.model`` and ``event.changes``
        alone, so that an undo gives the same in any order. The model must not be changed.
        """
        raise NotImplementedError

    @hookspec
    def editcore_before_apply(self, event: BeforeApply) -> Verdict | None:
        """Judge a proposal.

        Called after the solve and before anything is written: once per batch, and again whenever requests were rejected
        and the rest was solved again. An implementation that changes the model in order to measure must restore it.
        ``None`` accepts. If any extension rejects the batch, it is rejected. Otherwise, requests that a verdict rejects
        are left out, and the others are judged again. Otherwise, the smallest scale is used. The last verdicts and
        their figures are written to the run's log; so are rejected requests, with their figures.
        """
        raise NotImplementedError

    @hookspec
    def editcore_after_batch(self, event: AfterBatch) -> None:
        """React to an applied batch.

        Called once per applied batch, in the order of the batches, after the edits are in the model and durable in the
        ledger, before any evaluation. The model must not be changed. The return value is ignored.
        """
        raise NotImplementedError

    @hookspec
    def editcore_after_undo(self, event: AfterUndo) -> None:
        """React to edits that were undone or redone.

        Called once per undo or redo of a session, after the ledger is durable and the model is rebuilt. An extension
        forgets its state about undone edits and restores it for redone ones. ``event.history`` holds the active
        batches, as in ``editcore_before_run``. The model must not be changed. The return value is ignored.
        """
        raise NotImplementedError

    @hookspec
    def editcore_after_evaluation(self, event: AfterEvaluation) -> None:
        """React to a measurement of all edits made so far.

        Called after every evaluation: before the first edit, at checkpoints, and after the last edit. Nothing may be
        changed. The return value is ignored.
        """
        raise NotImplementedError

    @hookspec
    def editcore_after_run(self, event: AfterRun) -> None:
        """Finish.

        Called once, after the last evaluation, before the summary is written. Nothing may be changed. The return value
        is ignored.
        """
        raise NotImplementedError
