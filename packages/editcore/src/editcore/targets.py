"""Value optimisation: for each fact, the δ that makes the model say its target.

METHODS: minimise over δ (ROME, arXiv 2202.05262, eq. 4)

    L(δ) = mean over contexts of −(1/T) Σₜ log p(target_t | context, prompt, target_<t ; h += δ)
         + kl_factor · KL( p_δ(· | "{subject} is a") ‖ p(· | "{subject} is a") )
         + v_weight_decay · ‖δ‖ / ‖h₀‖²

by Adam, projected to ‖δ‖ ≤ clamp_norm_factor · ‖h₀‖ after every step. δ is added at the lookup token to the output of
the edited projection, which is what the update of its weight can change; in models without a norm behind the projection
this is the same as adding it to the residual stream, where MEMIT's reference code does.

All facts of a batch share one tensor of rows. Each fact has its own Adam state and its own stop, so its δ does not
depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from editcore._errors import NumericalError
from editcore._progress import Progress, silent
from editcore._rows import PreparedRows, fits, forward_logits, prepare_plain, prepare_tails
from editcore._values import EditRequest
from editcore.tracing import TokenRow, capture, continuation_row, lookup_row

if TYPE_CHECKING:
    from editcore.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["Targets", "optimise_targets"]

ESSENCE_PROMPT = "{} is a"
"""ROME, section 3.1: the prompt on which the subject's essence must not drift."""

_MAX_TOKENS = {"cpu": 256}
"""Tokens run per step by device type: enough to keep matrix products efficient, few enough that rows of one chunk are
about as long as each other (batches of ten CounterFact facts are padded to 1.50 times their tokens at 1,024, to 1.24
at 256)."""
_MAX_TOKENS_ELSEWHERE = 8192
_MAX_LOGITS = 2**25
"""Logits held per step (128 MB in float32; backward needs about four times that)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The optimised values of ``n`` facts."""

    deltas: Tensor
    """δ, ``[n, d_out]`` float32."""
    base: Tensor
    """h₀: output of the edited projection at the lookup token of the bare prompt, ``[n, d_out]``."""
    losses: tuple[float, ...]
    steps: tuple[int, ...]
    """Adam steps taken."""
    probabilities: tuple[float, ...]
    """exp(−NLL) averaged over the contexts, at the last δ evaluated."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fact:
    """Token rows of one fact: its contexts, then one row for the essence term."""

    rows: tuple[TokenRow, ...]
    """The bare prompt first; the last row is the essence prompt if ``has_essence``."""
    essence_position: int | None
    """Token of the last row where the KL term reads the distribution; ``None`` without that term."""

    @property
    def width(self) -> int:
        """Tokens from the lookup token on, of the longest row."""
        return max(len(row.ids) - row.lookup for row in self.rows)

    @property
    def num_contexts(self) -> int:
        return len(self.rows) - (self.essence_position is not None)

    @property
    def num_scored(self) -> int:
        """Positions whose logits are needed."""
        return sum(len(row.targets) for row in self.rows) + (self.essence_position is not None)


def optimise_targets(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    *,
    layer: int,
    templates: Sequence[str],
    hparams: LocateThenEditHParams,
    shortcut: bool = True,
    progress: Progress = silent,
) -> Targets:
    """The δ of every request at ``layer``.

    Args:
        templates: contexts with ``{}`` for the prompt; the first must be the bare ``"{}"``.
        shortcut: compute only what δ can change, if the model family allows it (it is checked); otherwise, or when
            ``False``, run whole rows and say so in ``notes``.

    Raises:
        SubjectNotFoundError: a subject is not found in its tokens.
        NumericalError: the loss becomes NaN or Inf.
    """
    facts = [_tokenise(model, request, templates, hparams) for request in requests]
    notes: list[str] = []
    use_tails = shortcut and fits(model, facts[0].rows, layer)
    if shortcut and not use_tails:
        notes.append(
            f"{type(model.hf).__name__}: the prefix cache does not reproduce its logits; whole rows were run instead."
        )
    results: list[_Result | None] = [None] * len(facts)
    with progress.task("optimising targets", len(facts)) as advance:
        for chunk in _chunks(facts, model):
            solver = _Chunk(model, [facts[index] for index in chunk], layer, hparams, tails=use_tails)
            for index, result in zip(chunk, solver.run(advance), strict=True):
                results[index] = result
    done = [result for result in results if result is not None]
    return Targets(
        deltas=torch.stack([result.delta for result in done]),
        base=torch.stack([result.base for result in done]),
        losses=tuple(result.loss for result in done),
        steps=tuple(result.steps for result in done),
        probabilities=tuple(result.probability for result in done),
        notes=tuple(notes),
    )


def _tokenise(
    model: LanguageModel, request: EditRequest, templates: Sequence[str], hparams: LocateThenEditHParams
) -> _Fact:
    rows = [
        continuation_row(model, request, template=template, fact_token=hparams.fact_token) for template in templates
    ]
    if hparams.kl_factor == 0:
        return _Fact(rows=tuple(rows), essence_position=None)
    essence = request.model_copy(update={"prompt": ESSENCE_PROMPT})
    row = lookup_row(model, essence, fact_token="subject_last" if hparams.fact_token == "last" else hparams.fact_token)
    position = row.lookup if hparams.kl_position == "lookup" else len(row.ids) - 1
    return _Fact(rows=(*rows, row), essence_position=position)


def _chunks(facts: Sequence[_Fact], model: LanguageModel) -> Iterator[list[int]]:
    """Facts of similar length together, within the budgets of tokens and logits."""
    max_tokens = _MAX_TOKENS.get(model.device.type, _MAX_TOKENS_ELSEWHERE)
    order = sorted(range(len(facts)), key=lambda index: (facts[index].width, index))
    chunk: list[int] = []
    for index in order:
        trial = [*chunk, index]
        width = max(facts[i].width for i in trial)
        tokens = width * sum(len(facts[i].rows) for i in trial)
        logits = model.layout.vocab_size * sum(facts[i].num_scored for i in trial)
        if chunk and (tokens > max_tokens or logits > _MAX_LOGITS):
            yield chunk
            trial = [index]
        chunk = trial
    if chunk:
        yield chunk


@dataclass(frozen=True, slots=True)
class _Result:
    delta: Tensor
    base: Tensor
    loss: float
    steps: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Which tokens of which rows enter which fact's loss. ``rows`` rows, ``tokens`` scored target tokens, ``n``
    facts."""

    row_fact: Tensor
    """``[rows]``"""
    row_share: Tensor
    """``[rows]`` 1 / (number of contexts) for a context, 0 for an essence row."""
    token_row: Tensor
    """``[tokens]``"""
    token_position: Tensor
    """``[tokens]`` where the token is predicted from, as a column of the prepared ids."""
    token_label: Tensor
    """``[tokens]``"""
    token_share: Tensor
    """``[tokens]`` 1 / T of its row."""
    essence_row: Tensor
    """``[n]``, or ``[0]`` without the essence term."""
    essence_position: Tensor
    """``[n]`` or ``[0]``"""

    def select(self, facts: Tensor) -> tuple[_Layout, Tensor]:
        """The layout of some facts, renumbered, and the rows that belong to them."""
        number = torch.full((int(self.row_fact.max()) + 1,), -1, device=facts.device)
        number[facts] = torch.arange(len(facts), device=facts.device)
        rows = (number[self.row_fact] >= 0).nonzero()[:, 0]
        row_number = torch.full((len(self.row_fact),), -1, device=facts.device)
        row_number[rows] = torch.arange(len(rows), device=facts.device)
        kept = row_number[self.token_row] >= 0
        essence = facts if len(self.essence_row) else facts[:0]
        return _Layout(
            row_fact=number[self.row_fact[rows]],
            row_share=self.row_share[rows],
            token_row=row_number[self.token_row[kept]],
            token_position=self.token_position[kept],
            token_label=self.token_label[kept],
            token_share=self.token_share[kept],
            essence_row=row_number[self.essence_row[essence]],
            essence_position=self.essence_position[essence],
        ), rows


def _layout(facts: Sequence[_Fact], *, tails: bool, device: torch.device) -> _Layout:
    lists: dict[str, list[float]] = {name: [] for name in _Layout.__slots__}
    for number, fact in enumerate(facts):
        for row in fact.rows:
            index = len(lists["row_fact"])
            start = row.lookup if tails else 0  # the token that column 0 of the prepared ids holds
            lists["row_fact"].append(number)
            lists["row_share"].append(1 / fact.num_contexts if row.targets else 0.0)
            for offset, label in enumerate(row.targets):
                lists["token_row"].append(index)
                lists["token_position"].append(row.target_start - 1 + offset - start)
                lists["token_label"].append(label)
                lists["token_share"].append(1 / len(row.targets))
            if not row.targets:
                assert fact.essence_position is not None
                lists["essence_row"].append(index)
                lists["essence_position"].append(fact.essence_position - start)
    return _Layout(
        **{
            name: torch.tensor(values, device=device, dtype=torch.float32 if name.endswith("share") else torch.long)
            for name, values in lists.items()
        }
    )


class _Chunk:
    """The facts of one chunk: what they lose at given δ."""

    def __init__(
        self, model: LanguageModel, facts: Sequence[_Fact], layer: int, hparams: LocateThenEditHParams, *, tails: bool
    ) -> None:
        rows = [row for fact in facts for row in fact.rows]
        self.model, self.layer, self.hparams = model, layer, hparams
        self.prepared = prepare_tails(model, rows, layer) if tails else prepare_plain(model, rows)
        self.layout = _layout(facts, tails=tails, device=model.device)
        # h₀ comes from the bare prompt alone, each fact's first row.
        self.base = capture(model, [fact.rows[0] for fact in facts], [layer])[layer].outputs.float()
        self.essence: Tensor | None = None
        if hparams.kl_factor > 0:
            with torch.no_grad():
                logits = self._logits(self.prepared, self.layout, torch.zeros_like(self.base))
            self.essence = logits[len(self.layout.token_row) :].float().log_softmax(-1)

    def _logits(self, prepared: PreparedRows, layout: _Layout, deltas: Tensor) -> Tensor:
        """Logits of the scored target tokens, then of the essence positions."""
        return forward_logits(
            self.model,
            prepared,
            self.layer,
            deltas[layout.row_fact],
            torch.cat([layout.token_row, layout.essence_row]),
            torch.cat([layout.token_position, layout.essence_position]),
        )

    def run(self, advance: Callable[[int], None]) -> list[_Result]:
        """Optimise every fact; the results are in the order of the facts."""
        hparams = self.hparams
        parameters = [nn.Parameter(torch.zeros_like(base)) for base in self.base]
        optimiser = torch.optim.Adam(parameters, lr=hparams.v_lr)
        limits = hparams.clamp_norm_factor * self.base.norm(dim=1)
        results: list[_Result | None] = [None] * len(parameters)
        active = torch.arange(len(parameters), device=self.base.device)
        layout, prepared = self.layout, self.prepared
        for step in range(hparams.v_num_grad_steps):
            deltas = torch.stack([parameters[index] for index in active.tolist()])
            losses, probabilities = self._losses(prepared, layout, deltas, active)
            if not torch.isfinite(losses).all():
                raise NumericalError("The value optimisation met NaN or Inf; nothing was applied. Lower v_lr.")
            done = losses < hparams.v_stop_loss
            if hparams.v_stop_probability is not None:
                done = done | (probabilities >= hparams.v_stop_probability)
            if step == hparams.v_num_grad_steps - 1:  # as in the reference code, the last evaluation takes no step
                done = torch.ones_like(done)
            for position in done.nonzero()[:, 0].tolist():
                results[int(active[position])] = _Result(
                    delta=deltas[position].detach().clone(),
                    base=self.base[active[position]],
                    loss=float(losses[position].detach()),
                    steps=step,
                    probability=float(probabilities[position]),
                )
            advance(int(done.sum()))
            if bool(done.all()):
                break
            optimiser.zero_grad(set_to_none=True)  # a fact without a gradient is not stepped
            losses[~done].sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                for index in active.tolist():
                    norm = parameters[index].norm()
                    if norm > limits[index]:
                        parameters[index].mul_(limits[index] / norm)
            if bool(done.any()):
                active = active[~done]
                layout, rows = self.layout.select(active)
                prepared = self.prepared.select(rows)
        return [result for result in results if result is not None]

    def _losses(self, prepared: PreparedRows, layout: _Layout, deltas: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and target probability of each active fact, both ``[active]``."""
        hparams, scored = self.hparams, len(layout.token_row)
        logits = self._logits(prepared, layout, deltas).float()
        nll = functional.cross_entropy(logits[:scored], layout.token_label.to(logits.device), reduction="none")
        row_nll = torch.zeros(len(layout.row_fact), device=nll.device).index_add(
            0, layout.token_row, nll * layout.token_share
        )
        nothing = torch.zeros(len(deltas), device=nll.device)
        losses = nothing.index_add(0, layout.row_fact, row_nll * layout.row_share)
        probabilities = nothing.index_add(0, layout.row_fact, (-row_nll.detach()).exp() * layout.row_share)
        if self.essence is not None:
            log_new, log_old = logits[scored:].log_softmax(-1), self.essence[active]
            losses = losses + hparams.kl_factor * (log_new.exp() * (log_new - log_old)).sum(-1)
        # ‖δ‖ over ‖h₀‖ squared, as the reference code has it; the paper's text squares neither.
        base = self.base[active]
        losses = losses + hparams.v_weight_decay * _norm(deltas) / base.square().sum(1)
        return losses, probabilities


def _norm(rows: Tensor) -> Tensor:
    """Row norms whose gradient at zero is zero, where δ starts."""
    squared = rows.square().sum(1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, torch.ones_like(squared)).sqrt(), squared)
