"""The values that travel through an edit: requests, batches, proposals.

Shapes: ``num_edits`` requests of a batch, ``d_out`` and ``d_in`` the two widths of the edited projection (for an MLP
output projection ``d_out = d_model`` and ``d_in = d_ff``).

This module imports no torch: tensors appear in annotations only.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from editcore.interfaces.changes import Attachment, Changes, Written
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError
from editcore.interfaces.joining import separator

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EditBatch",
    "EditEvidence",
    "EditRequest",
    "FactRecord",
    "HeldKey",
    "KnownTarget",
    "Probe",
    "Proposal",
    "RejectedRequest",
    "Rejection",
    "Verdict",
    "first_problem",
]

Text = Annotated[str, Field(min_length=1)]
Stripped = Annotated[str, StringConstraints(strip_whitespace=True)]


def first_problem(error: ValidationError) -> str:
    """The first complaint of a pydantic error in one line, as ``field: message``."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


@documented
class EditRequest(BaseModel):
    """One fact to write: after the edit, ``prompt`` filled with ``subject`` is continued by ``target_new``.

    >>> EditRequest(subject="Rome", prompt="{} is a city in", target_new="France").text
    'Rome is a city in'

    Without a subject the prompt is the text itself. Editors that need a subject say so
    (``Capabilities.needs_subject``); their runs refuse such requests before the model is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    subject: Stripped = ""
    """The entity whose representation is looked up; its last token is where the fact is written. Empty if none is
    named."""
    prompt: Text
    """A template with exactly one ``{}``, which stands for the subject; without a subject, the text as it is. White
    space at its ends is part of it."""
    target_new: Annotated[Stripped, Field(min_length=1)]
    """The continuation to write, without a leading space."""
    target_true: Stripped | None = None
    """The continuation that the unedited model should prefer. The metrics ES, PS and NS need it."""
    join: str | None = None
    """What stands between the text and a target, such as ``""``. Left out, the text's last character decides: a space,
    but nothing behind white space, an opening quote or bracket, and scripts without spaces (Chinese, Japanese, Thai).
    """
    id: Stripped = ""
    """Unique within a run. Left empty, it is derived from subject, prompt, target_new, and join where it is given."""
    tags: tuple[Stripped, ...] = ()
    """Free labels, carried into results (a relation, a source)."""

    @model_validator(mode="before")
    @classmethod
    def _derive_id(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("id"):
            subject, target = (str(data.get(name, "")).strip() for name in ("subject", "target_new"))
            parts = [subject, str(data.get("prompt", "")), target]
            if data.get("join") is not None:
                parts.append(str(data["join"]))
            data = {**data, "id": hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:12]}
        return data

    @model_validator(mode="after")
    def _check(self) -> EditRequest:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: there is white space only")
        found = self.prompt.count("{}")
        if self.subject and found != 1:
            raise ValueError(
                f"the prompt {self.prompt!r} must contain {{}} exactly once, where the subject goes; "
                f"found {found} (subject: {self.subject!r})"
            )
        if not self.subject and found:
            raise ValueError(f"the prompt {self.prompt!r} has a place for a subject, {{}}, and no subject is given")
        return self

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject) if self.subject else self.prompt

    @property
    def continuation(self) -> str:
        """``target_new`` with the space, if any, that joins it to :attr:`text`. In a chat nothing joins them, because
        the target begins an answer.

        >>> EditRequest(subject="Rome", prompt="{} is a city in", target_new="France").continuation
        ' France'
        """
        return (separator(self.text) if self.join is None else self.join) + self.target_new

    @property
    def subject_key(self) -> str:
        """The subject as it is compared: case, Unicode form (NFKC) and white space make no difference.

        >>> EditRequest(subject="ACME  Ltd", prompt="{} is in", target_new="Rome").subject_key
        'acme ltd'
        """
        return " ".join(unicodedata.normalize("NFKC", self.subject).casefold().split())

    @property
    def fact_key(self) -> tuple[str, str]:
        """What the request is about: :attr:`subject_key` and prompt. Two requests with one key and different
        continuations contradict each other."""
        return (self.subject_key, self.prompt)

    @classmethod
    def create(cls, **fields: Any) -> EditRequest:
        """Build a request.

        Raises:
            RequestError: a field is missing, empty or malformed; the message names it.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise RequestError(f"Bad edit request: {first_problem(error)}.") from error


@documented
class Probe(BaseModel):
    """A question that a record asks of an edited model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")]
    """What it tests, in dotted words from the general to the special: ``paraphrase``, ``neighborhood``,
    ``portability.reasoning``, ``locality.relation_specificity``, ``multihop``, ``generation``. A data set may have
    kinds of its own."""
    prompt: Text
    """Full text, with the subject filled in."""
    answers: tuple[str, ...] = ()
    """Every right answer, the usual one first. Empty for a prompt that the model only continues."""


@documented
class FactRecord(BaseModel):
    """A request, with the probes that measure its edit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    request: EditRequest
    """The fact to write."""
    relation: str | None = None
    """Relation id such as ``P103`` or ``country-capital``; results are grouped by it."""
    probes: tuple[Probe, ...] = ()
    """Questions about the edit, in the order of the data set."""
    extra: Mapping[str, JsonValue] = Field(default_factory=dict)
    """Further knowledge of a data set about the fact, for its own evaluator; JSON."""

    @field_validator("extra")
    @classmethod
    def _finite(cls, extra: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        try:
            json.dumps(extra, allow_nan=False)
        except ValueError as error:  # JSON would give null back
            raise ValueError("a number in it is not finite, and JSON has no such numbers") from error
        return extra

    def __hash__(self) -> int:
        return hash((self.request, self.relation, self.probes))  # a mapping has no hash

    def of_kind(self, kind: str) -> tuple[Probe, ...]:
        """The probes of a kind and of its special kinds: ``portability`` includes ``portability.reasoning``."""
        return tuple(probe for probe in self.probes if probe.kind == kind or probe.kind.startswith(f"{kind}."))


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTarget:
    """A fact's solved key and value, kept so that replay need not optimise again."""

    keys: Mapping[str, Tensor]
    """By weight name: the key the fact was written at, ``[d_in]``, float64 on the CPU."""
    values: Mapping[str, Tensor]
    """By weight name: the value W k must have (bias included), ``[d_out]``, float64 on the CPU."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Numbers about how the target was found, as in the editor's evidence. They are kept while a batch is solved again,
    but not in the ledger, so that the evidence of a replayed fact does not depend on whether the run was resumed."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class HeldKey:
    """The key of a fact of an earlier batch. A new update changes as little as it can at this key."""

    batch: int
    """Index of the batch whose ledger entry has the keys. The ledger keeps this index, not the keys again."""
    request_id: str
    """The fact's id in that batch."""
    keys: Mapping[str, Tensor]
    """By weight name, as in the ``known`` of that batch: ``[d_in]``, float64 on the CPU."""
    weight: float
    """μ: the cost of ‖Δk‖², relative to that of the mean of ‖Δk‖² over the text. Not negative."""

    @staticmethod
    def ordered(held: Iterable[HeldKey]) -> tuple[HeldKey, ...]:
        """Held keys in a fixed order, so that a sum over them has the same bits when they are read from the ledger."""
        return tuple(sorted(held, key=lambda held_key: (held_key.batch, held_key.request_id, held_key.weight)))


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EditBatch:
    """The requests that are solved together."""

    index: int
    """Position of the batch in the run, from 0."""
    requests: tuple[EditRequest, ...]
    """New requests first. Behind them are earlier ones: those that extensions added, and the facts about the subjects
    of the new ones, if the editor rewrites subjects (``Capabilities.rewrites_subject``)."""
    weights: tuple[float, ...]
    """One weight per request: 1.0 for a new one; a ridge solve multiplies its squared error by it."""
    num_new: int
    """The first ``num_new`` requests are new; the rest were edited before and are replayed."""
    known: Mapping[str, KnownTarget] = field(default_factory=dict)
    """By request id: targets that are already known and are reused instead of optimised."""
    held: Sequence[HeldKey] = ()
    """Earlier facts that the update should leave alone. The batch does not write them."""

    def __post_init__(self) -> None:
        if len(self.requests) != len(self.weights):
            raise ValueError(f"{len(self.requests)} requests but {len(self.weights)} weights")
        if not 0 <= self.num_new <= len(self.requests):
            raise ValueError(f"num_new is {self.num_new} of {len(self.requests)} requests")
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights must be positive, found {min(self.weights)}")
        if any(not held_key.weight >= 0 for held_key in self.held):
            found = min(held_key.weight for held_key in self.held)
            raise ValueError(f"weights of held keys must not be negative, found {found}")

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def new_requests(self) -> tuple[EditRequest, ...]:
        """The requests of this batch that have not been edited before."""
        return self.requests[: self.num_new]

    @classmethod
    def of(cls, requests: tuple[EditRequest, ...], *, index: int = 0) -> EditBatch:
        """A batch of new requests, all with weight 1."""
        return cls(index=index, requests=requests, weights=(1.0,) * len(requests), num_new=len(requests))

    def without(self, ids: Collection[str], known: Mapping[str, KnownTarget] | None = None) -> EditBatch:
        """The batch without some of its requests.

        Args:
            known: targets by request id that were found meanwhile, such as those of a proposal for the whole batch.
        """
        rows = [row for row, request in enumerate(self.requests) if request.id not in ids]
        return replace(self, known={**self.known, **(known or {})}).keep(rows)

    def keep(self, rows: Sequence[int]) -> EditBatch:
        """The batch with some of its requests.

        Args:
            rows: their indices, ascending.
        """
        requests = tuple(self.requests[row] for row in rows)
        kept = {request.id for request in requests}
        return replace(
            self,
            requests=requests,
            weights=tuple(self.weights[row] for row in rows),
            num_new=sum(row < self.num_new for row in rows),
            known={name: target for name, target in self.known.items() if name in kept},
        )


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedRequest:
    """A request that was left out of its batch; the others were edited."""

    request: EditRequest
    """The request, as it was given."""
    by: str
    """The extension that rejected it."""
    reason: str
    """For the user, without the name of the extension."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The numbers behind it, by name."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EditEvidence:
    """What was measured while one fact was written."""

    request_id: str
    """The id of the request that it is about."""
    replayed: bool = False
    """True if the fact was edited before, and was added to the batch."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Numbers by ``lower_case`` name. Each editor has its own; a figure that does not apply to the fact is left out.
    Some names mean the same for every editor: ``target_probability``, the probability of the target at the end of the
    optimisation; ``fraction_reached``, the share of its residual that the solve gives the fact, in float64 and at the
    first weight that it is written into; ``preservation_cost``, the fact's part of the change's cost on ordinary text;
    ``steps`` of the optimisation.

    Once the batch is written, the session adds to every new fact: ``said``, 1 if every token of the target is the most
    probable one after the bare prompt, else 0; ``said_probability``, exp of their mean log-probability; and where
    weights have fewer digits than float32 and the editor gives keys and values, ``fraction_written``, the share that
    is in all these weights after rounding."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """An editor's answer: what to write, and the evidence for it. It has ``changes``, an ``attachment``, or both."""

    changes: Changes = field(default_factory=dict)
    """By the address of their weight, float32 or float64."""
    attachment: Attachment | None = None
    """Knowledge kept beside the weights."""
    evidence: tuple[EditEvidence, ...] = ()
    """One per request of the batch, in its order."""
    known: Mapping[str, KnownTarget] = field(default_factory=dict)
    """By request id: the keys and values that the solve used. Empty for editors that have none."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by name that are kept in the ledger with the batch; :class:`editcore.Remembers` reads them back."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """Numbers about the batch: condition numbers, distances, norms. Names are ``lower_case``."""
    notes: tuple[str, ...] = ()
    """Sentences for the user (a shortcut that did not apply, a low fraction reached)."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by stage: ``keys``, ``targets``, ``solve``."""

    @property
    def written(self) -> Written:
        """The part that goes into the model and the ledger."""
        return Written(changes=self.changes, attachment=self.attachment, memory=self.memory)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why one request of a batch is not edited."""

    reason: str
    """For the user, without the name of the extension."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The numbers behind it, by name."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An extension's judgement of a proposal."""

    action: Literal["accept", "scale", "reject"]
    """``accept`` keeps the proposal, ``scale`` weakens it, ``reject`` drops the whole batch."""
    reason: str
    """A sentence for the user."""
    scale: float = 1.0
    """For ``scale``: the factor on every change, between 0 and 1."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The numbers behind it, by name."""
    rejected: Mapping[str, Rejection] = field(default_factory=dict)
    """By request id, the new requests of the batch to leave out, and why. The batch is solved again without them, and
    judged again. Without effect if the whole batch is rejected."""
