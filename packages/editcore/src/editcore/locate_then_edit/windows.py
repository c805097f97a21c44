"""Long targets, cut into windows that are written one by one (ARE, the autoregressive editing of AnyEdit).

    Write a letter to Ada.   Dear Ada, I have read    your notes on the engine   and I would add …
                         ^   |-- window 1 ---------|  |-- window 2 -----------|  |-- window 3 --
                         δ₁                        δ₂                         δ₃

Each window is a fact of its own: its value is optimised at the token before it, to make its tokens likely, with the
values of the windows before it in place. Keys are read at the same tokens, and the solve is that of any other facts.
Inside a batch the windows of a request are copies of it with ids of their own; outside there is only the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditBatch, EditEvidence, EditRequest
from editcore.models.tokens import TokenRow, continuation_row

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["PlantedRow", "Window", "Windows", "planted"]


@dataclass(frozen=True, slots=True)
class PlantedRow(TokenRow):
    """A row in which values are in place before its lookup token."""

    planted: tuple[tuple[int, Tensor], ...] = ()
    """Tokens, each with the δ ``[d_out]`` that is added to the output of the edited projection there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A window of a request's target."""

    request: EditRequest
    """The request itself."""
    number: int
    """0 for the first window."""
    start: int
    """Its first token, counted from the target's first one."""
    end: int
    """The token behind its last one."""
    last: bool
    """Whether the target ends with it."""

    @property
    def id(self) -> str:
        """The id of the copy of the request that stands for it."""
        return f"{self.request.id}#{self.number}"

    def row(self, model: LanguageModel, template: str) -> TokenRow:
        """Its tokens behind the prompt and the windows before it. The lookup token is the one before its first token.

        Raises:
            RequestError: the target has other tokens in this context than behind the bare prompt.
        """
        whole = continuation_row(model, self.request, template=template, fact_token="last")
        if len(whole.targets) < self.end or (self.last and len(whole.targets) != self.end):
            raise RequestError(
                f"The target of '{self.request.text}' cannot be cut into windows: behind a context it has "
                f"{len(whole.targets)} tokens. Leave target_window out, or use another context."
            )
        start = whole.target_start + self.start
        return TokenRow(whole.ids[: whole.target_start + self.end], start - 1, start)


class Windows(dict[str, Window]):
    """The windows of a batch, by id."""

    @classmethod
    def cut(cls, model: LanguageModel, batch: EditBatch, size: int | None) -> tuple[EditBatch, Windows]:
        """The batch with copies of its long requests, one per window, and these windows.

        Args:
            size: tokens of a window. A shorter target, and any without a size, is left whole.
        """
        if size is None:
            return batch, cls()
        windows: list[Window] = []
        requests: list[EditRequest] = []
        weights: list[float] = []
        num_new = 0
        for place, (request, weight) in enumerate(zip(batch.requests, batch.weights, strict=True)):
            length = len(continuation_row(model, request, fact_token="last").targets)
            starts = range(0, length, size) if length > size else ()
            parts = [
                Window(
                    request=request,
                    number=number,
                    start=start,
                    end=min(start + size, length),
                    last=start + size >= length,
                )
                for number, start in enumerate(starts)
            ]
            windows += parts
            requests += [request.model_copy(update={"id": part.id}) for part in parts] or [request]
            weights += [weight] * max(1, len(parts))
            num_new = len(requests) if place < batch.num_new else num_new
        return replace(batch, requests=tuple(requests), weights=tuple(weights), num_new=num_new), cls(
            {window.id: window for window in windows}
        )

    def before(self, window: Window) -> list[Window]:
        """The earlier windows of its request."""
        return [self[replace(window, number=number).id] for number in range(window.number)]

    def evidence_of(self, request: EditRequest, found: Mapping[str, EditEvidence]) -> EditEvidence:
        """The evidence of a request of the batch, from that of its windows if it has some."""
        own = [found[name] for name, window in self.items() if window.request.id == request.id]
        return _joined(own, request) if own else found[request.id]


def planted(row: TokenRow, window: Window, before: Sequence[tuple[Window, Tensor]]) -> TokenRow:
    """The row of a window with the values of the windows before it, each a δ, in place."""
    first = row.target_start - window.start
    places = tuple((first + earlier.start - 1, delta) for earlier, delta in before)
    return PlantedRow(row.ids, row.lookup, row.target_start, places)


def _joined(found: Sequence[EditEvidence], request: EditRequest) -> EditEvidence:
    """The evidence of a request from that of its windows: steps and costs are summed, the loss is the mean, probability
    and share are the smallest; everything else is that of the first window."""
    figures = {**found[0].figures, "windows": float(len(found))}
    for name, join in (
        ("steps", sum),
        ("preservation_cost", sum),
        ("target_loss", lambda values: sum(values) / len(values)),
        ("target_probability", min),
        ("fraction_reached", min),
    ):
        if all(name in evidence.figures for evidence in found):
            figures[name] = float(join([evidence.figures[name] for evidence in found]))
    return EditEvidence(request_id=request.id, replayed=found[0].replayed, figures=figures)
