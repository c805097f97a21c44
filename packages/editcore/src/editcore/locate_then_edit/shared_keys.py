"""Facts that share a key.

A causal model has read the same tokens before the last token of "Acme Ltd" in "Acme Ltd is based in" and in "Acme Ltd
was founded by", so both facts have one key, for which a weight gives one output. They cannot be two constraints. They
are one, whose value is optimised for both.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

from editcore.interfaces.values import EditBatch, EditRequest, KnownTarget

if TYPE_CHECKING:
    from torch import Tensor

    from editcore.second_moments.linalg import Metric

__all__ = ["facts_by_key", "requests_by_value", "rows_with_a_subject_in_common"]

_UNKNOWN = KnownTarget(keys={}, values={})


def rows_with_a_subject_in_common(batch: EditBatch, *, but: Container[str]) -> list[int]:
    """Rows of the requests whose subject another request of the batch has, too: those that may share a key.

    Args:
        but: ids of requests that are not looked up at their subject.
    """
    rows: dict[str, list[int]] = {}
    for row, request in enumerate(batch.requests):
        if request.subject and request.id not in but:
            rows.setdefault(request.subject_key, []).append(row)
    return sorted(row for group in rows.values() if len(group) > 1 for row in group)


def facts_by_key(keys: Tensor, metric: Metric, *, cosine: float) -> list[list[int]]:
    """Numbers of the facts, those with one key together.

    Two keys count as one if kᵢᵀC⁻¹kⱼ ≥ ``cosine`` · √(kᵢᵀC⁻¹kᵢ · kⱼᵀC⁻¹kⱼ). In this product a solve sees them: what is
    written at one key reaches the other by this share.

    Args:
        keys: ``[n, d_in]`` float64.
        metric: C.
    """
    products = keys @ metric.inverse_times(keys.T)  # [n, n]
    norms = products.diagonal().sqrt()
    equal = products >= cosine * norms[:, None] * norms[None, :]
    groups: list[list[int]] = []
    for fact in range(len(keys)):
        group = next((group for group in groups if bool(equal[group[0], fact])), None)
        if group is None:
            groups.append([fact])
        else:
            group.append(fact)
    return groups


def requests_by_value(
    batch: EditBatch, weights: set[str], sharing: Sequence[Sequence[int]]
) -> list[tuple[EditRequest, ...]]:
    """The requests whose values must be optimised, those that share a value together, in the order of the batch.

    These are the requests without a known value, and those that share a key with one of them: a value that other facts
    had before does not say the new one.

    Args:
        weights: addresses at which a value is needed.
        sharing: rows of the batch, those with one key together.
    """
    # A replayed fact may have been written at other layers (layer_selection = "random") and has no value at these.
    # The model says it already, as a rule, so its optimisation ends with the first evaluation.
    missing = {
        row
        for row, request in enumerate(batch.requests)
        if request.id not in batch.known
        or (row >= batch.num_new and not weights <= batch.known.get(request.id, _UNKNOWN).values.keys())
    }
    group_of: Mapping[int, Sequence[int]] = {row: group for group in sharing for row in group}
    found: list[tuple[EditRequest, ...]] = []
    for row in range(len(batch)):
        group = group_of.get(row, (row,))
        if row == group[0] and not missing.isdisjoint(group):
            found.append(tuple(batch.requests[member] for member in group))
    return found
