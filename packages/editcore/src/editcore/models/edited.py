"""A model with its edits: in its weights, through a backend, and beside them, through attachments.

Whoever edits, tries, undoes or reopens does it through :class:`EditedModel`. So weights and attachments always belong
to the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.folders import refuse_existing
from editcore._util.origin import write_base
from editcore.interfaces.changes import Attachment, Changes, Written
from editcore.interfaces.errors import ModelError
from editcore.interfaces.protocols import AttachmentKind, Backend, OverlaysWeights, RewritesPrompts
from editcore.interfaces.specs import BackendSpec
from editcore.models.loading import dtype_of
from editcore.plugins.calls import boundary, resolve
from editcore.plugins.registry import Plugins

if TYPE_CHECKING:
    import torch

    from editcore.models.language_model import LanguageModel

__all__ = ["EditedModel", "attached_reason"]


def attached_reason(model: str, kinds: Sequence[str], what: str) -> str:
    """Why a model with attachments cannot be saved, merged or exported, in a sentence."""
    return (
        f"The edits of {model} cannot be {what}: they are kept beside the weights (attachment "
        f"{' and '.join(kinds)}), and a folder of weights has no place for them. 'editctl generate' and sessions use "
        "them, and 'editctl pack' takes them along."
    )


class EditedModel:
    """A model whose weights a backend changes, with attachments beside them.

    Its state depends on the base weights and on the active batches in their order, and on nothing else.

    Args:
        model: unedited.
        backend: opened on ``model``.
        spec: the backend's announcement.
        plugins: have the kinds of attachments.
    """

    def __init__(self, model: LanguageModel, backend: Backend, *, spec: BackendSpec, plugins: Plugins) -> None:
        self.model, self.backend, self.spec, self.plugins = model, backend, spec, plugins
        self._active: list[Written] = []
        self._installed: list[Attachment] = []
        self._beside = ExitStack()
        """Removes the installed attachments when it is closed."""

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The installed attachments, oldest first."""
        return tuple(self._installed)

    def apply(self, written: Written) -> None:
        """Add one batch after the active ones.

        Raises:
            EditcoreError: the backend cannot express its changes, or its attachment cannot be installed. The model is
                as before.
        """
        installed = list(self._installed)
        try:
            with self._beside_removed([*installed, *_attachments([written])]):
                if written.changes:
                    self.backend.apply(written.changes)
        except BaseException:
            self.rebuild(self._active)
            raise
        self._active.append(written)

    def rebuild(self, active: Sequence[Written]) -> None:
        """Put exactly these batches, in this order, into the model; without any it is unedited.

        Raises:
            EditcoreError: as :meth:`apply`. The model is unedited.
        """
        try:
            with self._beside_removed(_attachments(active)):
                self.backend.rebuild([written.changes for written in active if written.changes])
        except BaseException:
            self._active = []
            if active:
                self.backend.rebuild([])
            raise
        self._active = list(active)

    @contextmanager
    def trial(self, written: Written) -> Iterator[None]:
        """The model with one more batch, inside the block only."""
        before = list(self._installed)
        with ExitStack() as stack:
            stack.callback(self._install, before)
            self._install([])
            if written.changes:
                stack.enter_context(self.backend.trial(written.changes))
            stack.callback(self._install, [])
            self._install([*before, *_attachments([written])])
            yield

    def trial_of(self, changes: Changes, attachment: Attachment | None = None) -> AbstractContextManager[None]:
        """:meth:`trial`, in the form that editors are given (:class:`editcore.Trial`)."""
        return self.trial(Written(changes=changes, attachment=attachment))

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The base model, inside the block only."""
        active = self._active
        self.rebuild([])
        try:
            yield
        finally:
            self.rebuild(active)

    def save(self, directory: Path | str, *, dtype: str | None = None) -> None:
        """Write the edited model as a folder that ``from_pretrained`` loads: all of it or nothing.

        Its ``editcore.json`` names the base model, so that a preset for the base fits the folder too.

        Args:
            dtype: of the weights in the folder; left out, as in the folder that the model was loaded from. The sum of
                base and changes is rounded to it once.

        Raises:
            ModelError: a part of the edits is not in the weights.
            UnknownNameError: there is no such type.
            StorageError: the folder is there already, or cannot be written.
        """
        directory = Path(directory)
        self.check_all_in_weights("saved")
        refuse_existing(directory)
        with (
            self._held_as(self.model.saved_dtype if dtype is None else dtype_of(dtype)),
            self.backend.written() if isinstance(self.backend, OverlaysWeights) else nullcontext(),
        ):
            self.model.save(directory)
        write_base(directory, self.model.name, self.model.base_fingerprint)

    @contextmanager
    def _held_as(self, dtype: torch.dtype) -> Iterator[None]:
        """The edited model with its weights in another type, inside the block only."""
        if dtype == self.model.dtype == self.model.compute_dtype:
            yield
            return
        active = self._active
        try:
            self.rebuild([])
            with self.model.held_as(dtype):
                self.rebuild(active)
                try:
                    yield
                finally:
                    self.rebuild([])
        finally:
            self.rebuild(active)

    def check_all_in_weights(self, what: str) -> None:
        """Refuse where a part of the edits is not in the weights.

        Args:
            what: what was asked for, as a participle, such as ``saved``.

        Raises:
            ModelError: the backend keeps changes elsewhere, or there are attachments.
        """
        if kinds := sorted({attachment.kind for attachment in self._installed}):
            raise ModelError(attached_reason(self.model.name, kinds, what))
        if not self.spec.writes_weights and self._active:
            raise ModelError(
                f"The edits of {self.model.name} cannot be {what}: the backend '{self.spec.name}' does not keep them "
                "in weights. Make the run with another backend, such as --backend raw."
            )

    @contextmanager
    def _beside_removed(self, afterwards: list[Attachment]) -> Iterator[None]:
        """Remove attachments inside the block, and install ``afterwards`` after it.

        A backend may wrap the same modules as an attachment, so it works without attachments.
        """
        self._install([])
        yield
        self._install(afterwards)

    def _install(self, attachments: list[Attachment]) -> None:
        """Install exactly these attachments, each kind through one object."""
        if not attachments and not self._installed:
            return
        self._installed = []
        self._beside.close()
        by_kind: dict[str, list[Attachment]] = {}
        for attachment in attachments:
            by_kind.setdefault(attachment.kind, []).append(attachment)
        with ExitStack() as stack:  # removes the installed kinds if a later one fails
            for kind in sorted(by_kind):
                with boundary(f"The attachment '{kind}' cannot be installed: "):
                    keeper: AttachmentKind = resolve(self.plugins.attachment(kind).target)()
                    keeper.install(self.model, tuple(by_kind[kind]))
                stack.callback(keeper.remove)
                if isinstance(keeper, RewritesPrompts):
                    stack.enter_context(self.model.rewriting(keeper.rewrite))
            self._beside = stack.pop_all()
        self._installed = attachments


def _attachments(active: Sequence[Written]) -> list[Attachment]:
    return [written.attachment for written in active if written.attachment is not None]
