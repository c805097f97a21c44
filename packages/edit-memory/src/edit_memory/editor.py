"""The editor: keys and values as in other locate-then-edit methods, kept instead of solved for.

Shapes: ``facts`` of one layer, ``d_in`` and ``d_out`` the widths of its projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from editcore import (
    Attachment,
    EditBatch,
    EditContext,
    EditEvidence,
    KnownTarget,
    LanguageModel,
    LedgerEntry,
    Proposal,
    Written,
)
from editcore.locate_then_edit import LocateThenEdit
from torch import Tensor

from edit_memory.hparams import MemoryHParams

__all__ = ["MemoryEditor"]

_OF_THE_SOLVE = {"key_energy", "preservation_cost"}
"""Figures about a change of the weight, which is not made."""


class MemoryEditor(LocateThenEdit):
    """NeuralDB's and GRACE's memories. No weight changes; the same steps find k and v as in MEMIT and ROME.

    Departures from NeuralDB: one layer; a new fact with an old key replaces the older one. Departures from GRACE: every
    token is looked up, not only the last one of the prompt; v is optimised as in ROME, with a bounded δ, instead of by
    100 steps at a rate of 1.
    """

    name: ClassVar[str] = "memory"
    hparams: MemoryHParams

    def propose(self, model: LanguageModel, batch: EditBatch, context: EditContext) -> Proposal:
        """Keys and values of a batch, as an attachment. The change that the steps end with is dropped.

        A fact that was added to the batch keeps the row that it has, unless it is about a subject of a new one: a
        second row would stay when the fact is undone.

        Raises:
            RequestError: the batch is empty.
            SubjectNotFoundError: a subject is not found in its tokens.
            NumericalError: a value is not finite.
        """
        subjects = {request.subject_key for request in batch.new_requests}
        written = [
            row for row, request in enumerate(batch.requests) if row < batch.num_new or request.subject_key in subjects
        ]
        solved = super().propose(model, batch.keep(written), context)
        tensors: dict[str, Tensor] = {}
        layers = sorted(map(model.layout.layer_of, solved.changes))
        for layer in layers:
            tensors |= self._facts_at(model, layer, batch, solved.known)
        settings = self.hparams
        attachment = Attachment(
            kind="memory",
            tensors=tensors,
            fields={
                "rule": settings.rule,
                "gate": settings.gate,
                "radius": settings.radius,
                "layers": layers,
                "targets": [request.target_new for request in batch.requests],
            },
        )
        # Without known: the ledger has keys and values once, and they are not those of a weight.
        return Proposal(
            attachment=attachment,
            evidence=_evidence(batch, solved),
            diagnostics={"slots": float(len(batch))},
            notes=solved.notes,
            seconds=solved.seconds,
        )

    def _facts_at(
        self, model: LanguageModel, layer: int, batch: EditBatch, known: Mapping[str, KnownTarget]
    ) -> dict[str, Tensor]:
        """Keys ``[facts, d_in]``, values ``[facts, d_out]`` and rows in the batch ``[facts]`` of a layer, by name."""
        name = model.layout.weight_name(layer)
        ids = [request.id for request in batch.requests]
        rows = [row for row, request_id in enumerate(ids) if request_id in known and name in known[request_id].keys]
        targets = [known[ids[row]] for row in rows]
        keys = torch.stack([target.keys[name] for target in targets])  # [facts, d_in]
        values = torch.stack([target.values[name] for target in targets])  # [facts, d_out]
        if self.hparams.rule == "neuraldb":
            # forward, not a call: the hooks of the memory itself do not count.
            with torch.inference_mode():
                values = values - model.projection(layer).forward(keys.to(model.weight(name))).to(values)
        found = {"keys": keys.float(), "values": values.float(), "rows": torch.tensor(rows)}
        return {f"layer_{layer}.{kind}": tensor for kind, tensor in found.items()}

    def resolve(self, model: LanguageModel, entry: LedgerEntry, rows: Sequence[int], context: EditContext) -> Written:
        """The batch without the keys and values of some facts; see :class:`editcore.Resolves`."""
        attachment = entry.attachment
        assert attachment is not None
        place = {row: number for number, row in enumerate(rows)}
        tensors: dict[str, Tensor] = {}
        layers = []
        for layer in attachment.fields["layers"]:
            names = {kind: f"layer_{layer}.{kind}" for kind in ("keys", "values", "rows")}
            before = attachment.tensors[names["rows"]].tolist()
            kept = [number for number, row in enumerate(before) if row in place]
            if not kept:
                continue
            layers.append(layer)
            tensors |= {names[kind]: attachment.tensors[names[kind]][kept] for kind in ("keys", "values")}
            tensors[names["rows"]] = torch.tensor([place[before[number]] for number in kept])
        targets = [attachment.fields["targets"][row] for row in rows]
        fields = {**attachment.fields, "layers": layers, "targets": targets}
        return Written(attachment=replace(attachment, tensors=tensors, fields=fields))


def _evidence(batch: EditBatch, solved: Proposal) -> tuple[EditEvidence, ...]:
    """One per request, without the figures of the solve; empty for a fact that the batch did not write again."""
    found = {
        evidence.request_id: replace(
            evidence,
            figures={name: value for name, value in evidence.figures.items() if name not in _OF_THE_SOLVE},
        )
        for evidence in solved.evidence
    }
    return tuple(
        found.get(request.id, EditEvidence(request_id=request.id, replayed=True)) for request in batch.requests
    )
