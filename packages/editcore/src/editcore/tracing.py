"""Where a fact is looked up, and what passes through the edited projection there.

Shapes: ``rows`` token rows, ``seq`` their padded length, ``d_in`` and ``d_out`` the widths of a projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from editcore._errors import SubjectNotFoundError
from editcore._memory import in_halves
from editcore._values import EditRequest, FactoredDelta

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = [
    "Captured",
    "Climb",
    "FactToken",
    "TokenRow",
    "add_delta",
    "applied",
    "capture",
    "continuation_row",
    "first_tensor",
    "hooks",
    "join_continuation",
    "last_index_covering",
    "lookup_row",
    "misfits",
    "pad_rows",
    "project",
    "standing_aside",
    "stop_after",
]

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One text as tokens, with the position where the fact is looked up."""

    ids: tuple[int, ...]
    lookup: int
    """Index into ``ids``; δ is added and the key is read here."""
    target_start: int
    """Index of the first target token, ``len(ids)`` if the row has no target."""

    @property
    def targets(self) -> tuple[int, ...]:
        """Token ids of the target; empty for a row without one."""
        return self.ids[self.target_start :]


def last_index_covering(offsets: Sequence[tuple[int, int]], position: int) -> int | None:
    """The last token whose character span covers ``position``; ``None`` if no token does.

    The last one, because a character that takes several byte-level tokens gives all of them the same span.
    """
    covering = [index for index, (start, end) in enumerate(offsets) if start <= position < end]
    return covering[-1] if covering else None


def lookup_row(
    model: LanguageModel, request: EditRequest, *, template: str = "{}", fact_token: FactToken = "subject_last"
) -> TokenRow:
    """Tokens of the filled prompt inside ``template``, and the lookup token from the tokenizer's character offsets.

    Padding and special tokens never move it, because the position is found in the text and not counted in tokens. What
    the model's prompt form puts around the whole is in the row, too.

    Raises:
        SubjectNotFoundError: no token covers the subject, or there is no token after it where one is asked for.
    """
    before, _, after = template.partition("{}")
    start = len(before) + request.prompt.index("{}")
    text = before + request.text + after
    ids, offsets = model.read_prompt(text)
    start += len(model.prompt_form.before)
    return TokenRow(ids, _lookup_index(offsets, text, start, request.subject, fact_token, len(ids)), len(ids))


def continuation_row(
    model: LanguageModel,
    request: EditRequest,
    *,
    template: str = "{}",
    fact_token: FactToken = "subject_last",
) -> TokenRow:
    """:func:`lookup_row` followed by the tokens of ``" " + target_new`` (in a chat, of ``target_new``).

    The prompt and the target are tokenised apart and joined, which is how the target will be generated. Where the
    tokenizer merges across the border (the joint encoding differs), the joint encoding is used.
    """
    row = lookup_row(model, request, template=template, fact_token=fact_token)
    before, _, after = template.partition("{}")
    text = before + request.text + after
    ids, target_start = join_continuation(model, text, row.ids, request.target_new)
    return TokenRow(ids, row.lookup, target_start)


def join_continuation(
    model: LanguageModel, text: str, text_ids: tuple[int, ...], target: str
) -> tuple[tuple[int, ...], int]:
    """Ids of the prompt ``text`` continued by ``target``, and the index of the first target token.

    Args:
        text_ids: those of the prompt alone.
    """
    continuation = model.prompt_form.continuation(target)
    alone = tuple(model.tokenizer(continuation, add_special_tokens=False)["input_ids"])
    joint, offsets = model.read_prompt(text, then=continuation)
    while joint and offsets[-1] == (0, 0):  # a tokenizer that appends an end token would end the target with it
        joint, offsets = joint[:-1], offsets[:-1]
    if joint == text_ids + alone:
        return joint, len(text_ids)
    if joint[: len(text_ids)] == text_ids:
        return joint, len(text_ids)
    end_of_prompt = len(model.prompt_form.wrap(text))
    first = next(index for index, (_, end) in enumerate(offsets) if end > end_of_prompt)
    return joint, first


def _lookup_index(
    offsets: Sequence[tuple[int, int]], text: str, start: int, subject: str, fact_token: FactToken, length: int
) -> int:
    if fact_token == "last":
        return length - 1
    position = start if fact_token == "subject_first" else start + len(subject) - 1
    found = last_index_covering(offsets, position)
    if found is None:
        raise SubjectNotFoundError(
            f"No token covers the subject {subject!r} in {text!r}; the tokenizer drops its characters. "
            "Write the subject with other characters."
        )
    if fact_token == "subject_first_after_last":
        found += 1
        if found >= length:
            raise SubjectNotFoundError(
                f"fact_token is 'subject_first_after_last', but {text!r} ends with the subject {subject!r}. "
                "Use fact_token = 'subject_last'."
            )
    return found


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """``(input_ids, attention_mask)``, both ``[rows, seq]`` int64."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    return ids.to(device), mask.to(device)


class _Enough(Exception):  # noqa: N818  a signal, not an error
    """Ends a forward pass once the deepest layer of interest has run."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What passed through one layer at the captured positions."""

    inputs: Tensor
    """Projection input (the key), ``[rows, d_in]``."""
    outputs: Tensor
    """Projection output, bias included, ``[rows, d_out]``."""
    block_outputs: Tensor
    """Output of the whole block (the residual stream), ``[rows, d_model]``."""


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a module that returns them alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def hooks() -> Iterator[list[torch.utils.hooks.RemovableHandle]]:
    """A list of hook handles that are removed at the end, exceptions included."""
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stop_after(model: LanguageModel, layer: int) -> Iterator[None]:
    """Ends a forward pass inside the block once ``layer`` has run: no later block, no logits."""

    def stop(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        raise _Enough

    with hooks() as handles, contextlib.suppress(_Enough):
        handles.append(model.block(layer).register_forward_hook(stop))
        yield


@contextmanager
def standing_aside(model: LanguageModel, count: int, hidden: Tensor | None, *, tuples: bool) -> Iterator[None]:
    """The first ``count`` blocks hand on ``hidden`` instead of computing it; with ``None`` they do as always.

    Args:
        hidden: what enters the block ``count``, ``[rows, seq, d_model]``.
        tuples: whether blocks return a tuple.
    """
    if hidden is None:
        yield
        return

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return (hidden,) if tuples else hidden

    blocks = [model.block(index) for index in range(count)]
    replaced = [block.__dict__.get("forward") for block in blocks]  # a forward set on the instance (accelerate does)
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block, earlier in zip(blocks, replaced, strict=True):
            if earlier is None:
                del block.forward
            else:
                block.forward = earlier


def capture(
    model: LanguageModel, rows: Sequence[TokenRow], layers: Sequence[int], *, max_tokens: int = 2048
) -> dict[int, Captured]:
    """Projection inputs and outputs and block outputs at each row's lookup token, all layers in one pass.

    The pass ends behind the deepest layer: no later block and no logits are computed, and no token behind the lookup
    token. Rows are grouped by length so that a chunk holds at most ``max_tokens`` tokens.
    """
    return Climb(model, max_tokens=max_tokens).capture(dict(enumerate(rows)), layers)


class Climb:
    """Captures at one layer after another, upwards, of a model whose weights change only from the last one on.

    What enters the lowest block of a capture is kept, up to ``keep_bytes``, and the next capture of the row begins
    there. That serves families in which a block reads nothing of the lower ones but the residual stream.
    """

    def __init__(self, model: LanguageModel, *, keep_bytes: int = 0, max_tokens: int = 2048) -> None:
        self.model, self.max_tokens, self._left = model, max_tokens, keep_bytes
        self._kept: dict[Hashable, tuple[int, Tensor]] = {}
        """By row, the block that it has come to and what enters it, ``[seq, d_model]``."""
        self._tuples = False

    @torch.inference_mode()
    def capture(self, rows: Mapping[Hashable, TokenRow], layers: Sequence[int]) -> dict[int, Captured]:
        """As :func:`capture`, for rows by name: the captured are in their order."""
        names = list(rows)
        for name in names:
            if name in self._kept and self._kept[name][0] > min(layers):
                self._left += self._kept.pop(name)[1].nbytes
        at = {name: self._kept[name][0] if name in self._kept else 0 for name in names}
        order = sorted(range(len(names)), key=lambda index: (at[names[index]], rows[names[index]].lookup))
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in layers}

        def run(chunk: Sequence[int]) -> list[dict[int, tuple[Tensor, Tensor, Tensor]]]:
            return [self._run({names[index]: rows[names[index]] for index in chunk}, layers)]

        lengths = [row.lookup + 1 for row in rows.values()]
        for start in sorted(set(at.values())):
            together = [index for index in order if at[names[index]] == start]
            for chunk in _chunks(together, lengths, self.max_tokens):
                for found in in_halves(run, chunk):
                    for layer, part in found.items():
                        parts[layer].append(part)
        restore = torch.tensor(order).argsort()
        return {
            layer: Captured(*(torch.cat(pieces)[restore.to(pieces[0].device)] for pieces in zip(*chunks, strict=True)))
            for layer, chunks in parts.items()
        }

    def _run(
        self, rows: Mapping[Hashable, TokenRow], layers: Sequence[int]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """One pass over rows that are all at the same block."""
        model, lowest = self.model, min(layers)
        ids, mask = pad_rows([row.ids[: row.lookup + 1] for row in rows.values()], model.pad_id, device=model.device)
        lookups = torch.tensor([row.lookup for row in rows.values()])
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        entering: list[Any] = []

        def at_lookup(hidden: Tensor) -> Tensor:
            places = torch.arange(hidden.shape[0], device=hidden.device)
            return hidden[places, lookups.to(hidden.device)]

        def on_projection(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                # Projections may see tokens flattened to [rows * seq, d_in] (OPT does); bring the row axis back.
                found[layer] += [at_lookup(part.reshape(*ids.shape, -1)) for part in (args[0], first_tensor(output))]

            return hook

        def on_block(layer: int) -> Any:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                found[layer].append(at_lookup(first_tensor(output)))

            return hook

        def on_entering(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            entering.append(output)

        kept = [self._kept[name] for name in rows if name in self._kept]
        hidden = pad_sequence([states for _, states in kept], batch_first=True) if kept else None
        with hooks() as handles, standing_aside(model, kept[0][0] if kept else 0, hidden, tuples=self._tuples):
            if lowest and self._left:
                handles.append(model.block(lowest - 1).register_forward_hook(on_entering))
            for layer in layers:
                handles.append(model.projection(layer).register_forward_hook(on_projection(layer)))
                handles.append(model.block(layer).register_forward_hook(on_block(layer)))
            with stop_after(model, max(layers)):
                model.hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        for output in entering:
            self._tuples = isinstance(output, tuple)
            self._keep(rows, lowest, first_tensor(output))
        return {layer: (parts[0], parts[1], parts[2]) for layer, parts in found.items()}

    def _keep(self, rows: Mapping[Hashable, TokenRow], block: int, hidden: Tensor) -> None:
        for place, (name, row) in enumerate(rows.items()):
            states = hidden[place, : row.lookup + 1].clone()
            if name in self._kept:
                self._left += self._kept.pop(name)[1].nbytes
            if states.nbytes <= self._left:
                self._kept[name] = block, states
                self._left -= states.nbytes


@torch.inference_mode()
def project(model: LanguageModel, layer: int, keys: Tensor) -> Tensor:
    """What the edited projection of ``layer`` gives for ``keys [n, d_in]``: ``[n, d_out]`` in the keys' type and place.

    It is asked of the module itself, so that its bias and whatever a backend put beside its weight count.
    """
    weight = model.weight(model.layout.weight_name(layer))
    found: Tensor = model.projection(layer)(keys.to(weight))
    return found.to(keys)


def _chunks(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Consecutive groups of ``order`` (ascending lengths) whose padded size stays within ``max_tokens``."""
    chunk: list[int] = []
    for index in order:
        if chunk and lengths[index] * (len(chunk) + 1) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


@contextmanager
def applied(model: LanguageModel, deltas: Mapping[str, FactoredDelta]) -> Iterator[None]:
    """The model with ``deltas`` added to its weights, inside the block only; the bits come back on every way out."""
    saved: dict[str, Tensor] = {}
    try:
        for name, delta in deltas.items():
            weight = model.weight(name)
            saved[name] = weight.detach().clone()
            add_delta(model, name, [delta])
        yield
    finally:
        with torch.no_grad():
            for name, bits in saved.items():
                model.weight(name).copy_(bits)


def misfits(
    model: LanguageModel, deltas: Mapping[str, FactoredDelta]
) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """``(weight name, found, expected)`` of each delta whose size, (out, in), is not that of its weight.

    Raises:
        ModelError: the model has no such weight.
    """
    for name, delta in deltas.items():
        d_out, d_in = model.as_out_in(name, model.weight(name)).shape
        found = (delta.left.shape[0], delta.right.shape[1])
        if found != (d_out, d_in):
            yield name, found, (d_out, d_in)


@torch.no_grad()
def add_delta(model: LanguageModel, name: str, deltas: Sequence[FactoredDelta], *, base: Tensor | None = None) -> None:
    """Write ``base + Σ left @ right``, summed in float64 in the given order and rounded once.

    ``base`` is a stored-orientation tensor, the present weight if left out.
    """
    weight = model.weight(name)
    total = model.as_out_in(name, weight if base is None else base).double()
    for delta in deltas:
        total = total + delta.left.to(total) @ delta.right.to(total)
    weight.copy_(model.as_out_in(name, total).to(weight))
