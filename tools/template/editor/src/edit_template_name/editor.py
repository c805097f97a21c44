"""The editor: the method's solve inside the shared way of locate-then-edit methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from editcore import EditBatch, EditContext, Proposal
from editcore.locate_then_edit import Prepared, prepare, propose

from edit_template_name.hparams import TemplateNameHParams
from edit_template_name.solve import solve

if TYPE_CHECKING:
    from editcore import LanguageModel

__all__ = ["TemplateNameEditor"]


class TemplateNameEditor:
    """TEMPLATE SUMMARY"""

    def __init__(self, hparams: TemplateNameHParams) -> None:
        self.hparams = hparams
        self._prepared: Prepared | None = None

    def prepare(self, model: LanguageModel, context: EditContext) -> Mapping[str, Any]:
        """Fetch second moments and context templates from the unedited model."""
        self._prepared = prepare(model, self.hparams, context, owner="template-name")
        return self._prepared.provenance()

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Solve one batch on the model as it is now."""
        if self._prepared is None:
            self.prepare(model, context)
        assert self._prepared is not None
        return propose(
            model,
            batch,
            context,
            hparams=self.hparams,
            prepared=self._prepared,
            solve=partial(solve, ridge=self.hparams.ridge),
            ridge=self.hparams.ridge,
        )
