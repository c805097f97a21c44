"""The extension: listens to a run, and counts."""

from __future__ import annotations

import logging

from editcore import AfterBatch, BeforeRun, ExtensionContext, hookimpl

from edit_template_name.hparams import TemplateNameHParams

__all__ = ["TemplateNameExtension"]

_log = logging.getLogger(__name__)


class TemplateNameExtension:
    """TEMPLATE SUMMARY

    Its state is a function of the ledger, so that a resumed run goes on as if it had not been interrupted.
    """

    def __init__(self, hparams: TemplateNameHParams, context: ExtensionContext) -> None:
        self.hparams = hparams
        self.context = context
        self.batches = 0
        self.edits = 0

    @hookimpl
    def editcore_before_run(self, event: BeforeRun) -> None:
        """Count what is applied already."""
        self.batches = len(event.history)
        self.edits = sum(entry.num_new for entry in event.history)

    @hookimpl
    def editcore_after_batch(self, event: AfterBatch) -> None:
        """Count a batch, and say so now and then."""
        self.batches += 1
        self.edits += event.batch.num_new
        if self.batches % self.hparams.every == 0:
            _log.info("%d batches, %d edits", self.batches, self.edits)
