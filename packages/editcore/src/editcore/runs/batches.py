"""The steps of a batch from its requests to its ledger entry: checks, additions, verdicts, scaling."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from editcore.interfaces.changes import Attachment, Written, as_change
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import NumericalError, PluginError, RequestError
from editcore.interfaces.events import BatchAddition
from editcore.interfaces.history import LedgerEntry
from editcore.interfaces.specs import BackendSpec, EditorSpec
from editcore.interfaces.values import (
    EditBatch,
    EditRequest,
    HeldKey,
    Proposal,
    RejectedRequest,
    Rejection,
    Verdict,
)
from editcore.models import LanguageModel
from editcore.models.writing import misfits
from editcore.runs.backends import shape_in_words
from editcore.runs.saying import not_said

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BatchResult",
    "Judged",
    "check_rejected",
    "check_written",
    "entry_of",
    "ids_of",
    "judgement",
    "on_cpu",
    "refuse_equal_ids",
    "rejected_by",
    "scaled",
    "with_additions",
]


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
        """A sentence about facts that were written and that the model still does not say to their bare prompts; empty
        if it says all of them."""
        return not_said(self.batch.requests, self.proposal.evidence) if self.applied else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the gates left of a batch."""

    batch: EditBatch
    """Without the requests that were rejected one by one; empty if all were."""
    proposal: Proposal
    """For what is in ``batch``."""
    verdicts: Mapping[str, Verdict]
    """The last ones, by the name of the extension."""
    rejected: Sequence[RejectedRequest]
    """What was rejected one by one."""


def refuse_equal_ids(requests: Sequence[EditRequest]) -> None:
    """Refuse a batch in which two requests have one id.

    Raises:
        RequestError: two requests have the same id.
    """
    ids: dict[str, EditRequest] = {}
    for request in requests:
        if (other := ids.get(request.id)) is not None:
            if other == request:
                raise RequestError(f"A request is twice in one batch: '{request.text}' → '{request.target_new}'.")
            raise RequestError(
                f"Two requests of one batch have the id '{request.id}': '{other.text}' and '{request.text}'."
            )
        ids[request.id] = request


def rejected_by(batch: EditBatch, by: Mapping[str, Mapping[str, Rejection]]) -> Iterator[RejectedRequest]:
    """The requests of a batch that extensions reject, each once, in the order of the batch.

    Raises:
        PluginError: an extension rejects something that is not a new request of the batch.
    """
    new = {request.id for request in batch.new_requests}
    for name, rejections in by.items():
        for request_id in rejections:
            if request_id not in new:
                raise PluginError(
                    f"The plugin '{name}' rejects '{request_id}', which is not a new request of the batch."
                )
    for request in batch.new_requests:
        for name, rejections in by.items():
            if (why := rejections.get(request.id)) is not None:
                yield RejectedRequest(request=request, by=name, reason=why.reason, figures=why.figures)
                break


def ids_of(rejected: Sequence[RejectedRequest]) -> set[str]:
    """The ids of rejected requests."""
    return {rejection.request.id for rejection in rejected}


def check_rejected(rest: EditBatch, batch: EditBatch, rejected: Collection[str]) -> None:
    """Check that the rejected requests are new requests of the batch, and that other new requests are left.

    Raises:
        PluginError: one of the two does not hold.
    """
    unknown = set(rejected) - {request.id for request in batch.new_requests}
    if unknown:
        raise PluginError(f"A batch cannot be solved without '{min(unknown)}', which is not a new request of it.")
    if not rest.num_new:
        raise PluginError("A batch cannot be solved without any of its new requests: nothing is left to edit.")


def with_additions(batch: EditBatch, additions: Sequence[BatchAddition]) -> EditBatch:
    """The batch with the requests and held keys that extensions add. Facts that the batch edits itself are not added.

    A key that several extensions hold is held once, with the largest weight. A key is not held if the batch writes its
    fact again, because the fact then has a value in the batch.
    """
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
    held: dict[tuple[int, str], HeldKey] = {}
    for key in (*batch.held, *(key for addition in additions for key in addition.held)):
        other = held.get((key.batch, key.request_id))
        if key.request_id not in taken and (other is None or key.weight > other.weight):
            held[key.batch, key.request_id] = key
    return replace(
        batch, requests=tuple(requests), weights=tuple(weights), known=known, held=HeldKey.ordered(held.values())
    )


def check_written(model: LanguageModel, written: Written, editor: EditorSpec, backend: BackendSpec) -> None:
    """Refuse a change that could not be applied or kept, before it reaches the ledger."""
    kinds = {change.kind for change in written.changes.values()}
    if written.attachment is not None:
        kinds.add("attachment")
    who = f"The editor '{editor.name}' proposed"
    if not kinds:
        raise PluginError(f"{who} nothing: no change and no attachment; nothing was applied.")
    if undeclared := sorted(kinds - editor.capabilities.gives):
        raise PluginError(
            f"{who} {_kinds_in_words(undeclared)}, which its announcement does not list (Capabilities.gives is "
            f"{', '.join(sorted(editor.capabilities.gives))}); nothing was applied."
        )
    if refused := sorted(kinds - backend.takes):
        raise PluginError(
            f"{who} {_kinds_in_words(refused)}, which the backend '{backend.name}' does not take; nothing was applied."
        )
    for address, found, expected in misfits(model, written.changes):
        raise PluginError(
            f"{who} a change of {shape_in_words(found)} for {address}, which is {shape_in_words(expected)} (out, in); "
            "nothing was applied."
        )
    for address, delta in written.changes.items():
        if not delta.is_finite():
            raise NumericalError(f"{who} NaN or Inf for {address}; nothing was applied.")
    beside = {} if written.attachment is None else written.attachment.tensors
    for name, tensor in {**beside, **written.memory}.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NumericalError(f"{who} to keep NaN or Inf in the tensor '{name}'; nothing was applied.")
    if written.attachment is not None:
        try:
            json.dumps(dict(written.attachment.fields), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"{who} an attachment whose fields cannot be written as JSON ({error}); nothing was applied."
            ) from error


def _kinds_in_words(kinds: Sequence[str]) -> str:
    return " and ".join("an attachment" if kind == "attachment" else f"a {kind} change" for kind in kinds)


def scaled(written: Written, scale: float) -> Written:
    """A copy with every change multiplied by ``scale``.

    Raises:
        PluginError: there is an attachment, which has no scale.
    """
    if scale != 1 and written.attachment is not None:
        raise PluginError(
            f"An attachment ('{written.attachment.kind}') cannot be scaled by {scale:g}; accept it or reject it."
        )
    changes = {address: change.scaled(scale) for address, change in written.changes.items()}
    return replace(written, changes=changes)


def on_cpu(written: Written) -> Written:
    """A copy as the ledger stores it: on the CPU, contiguous, sorted by name, fields as they come back from JSON. A
    resumed run reads exactly this, and arithmetic over other strides may round differently.

    Raises:
        PluginError: an attachment's fields cannot be written as JSON.
    """
    beside = written.attachment
    return Written(
        changes={
            address: as_change(_contiguous(change.tensors())) for address, change in sorted(written.changes.items())
        },
        attachment=beside and replace(beside, tensors=_contiguous(beside.tensors), fields=_json_fields(beside)),
        memory=_contiguous(written.memory),
    )


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}


def _json_fields(attachment: Attachment) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(json.dumps(dict(attachment.fields), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"The fields of the attachment '{attachment.kind}' cannot be written as JSON: {error}."
        ) from error
    return fields


def judgement(verdicts: Mapping[str, Verdict]) -> tuple[float, str]:
    """The scale to apply (0 rejects), and the reasons of the extensions that did not accept the whole batch."""
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


def entry_of(judged: Judged, scale: float, reason: str) -> LedgerEntry:
    """The ledger entry of a batch.

    Args:
        scale: the smallest scale that a gate asked for; 0 for a batch that was rejected.
        reason: why it was scaled or rejected.
    """
    batch, proposal, applied = judged.batch, judged.proposal, scale > 0
    # Kept as solved, in float64: the sum over batches is rounded once, when a weight is written.
    written = on_cpu(scaled(proposal.written, scale)) if applied else Written()
    return LedgerEntry(
        batch=batch.index,
        requests=batch.requests,
        weights=batch.weights,
        num_new=batch.num_new,
        changes=written.changes,
        attachment=written.attachment,
        known={name: replace(known, figures={}) for name, known in proposal.known.items()} if applied else {},
        memory=written.memory,
        diagnostics=proposal.diagnostics,
        scale=scale,
        evidence=proposal.evidence,
        notes=proposal.notes,
        reason=reason,
        verdicts=judged.verdicts,
        held=batch.held,
        rejected=tuple(judged.rejected),
    )
