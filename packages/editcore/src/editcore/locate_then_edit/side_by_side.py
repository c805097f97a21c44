"""Optimises many values at once: which are active, in which passes they run, and when each is done.

Every value takes its own steps and stops by itself. As many values as fill a few passes are *active*. A value that is
done leaves, and once half of the room is free the next values from the queue become active. A value's δ does not depend
on its neighbours.

A value belongs to one fact, or to several that share a key (:mod:`editcore.locate_then_edit.shared_keys`). It is then
done when each of its facts is.

Shapes: ``facts`` and ``n`` values in all, ``active`` values optimised now, ``d_out`` the width of the edited
projection's output.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore._util.memory import is_out_of_memory, release
from editcore.interfaces.errors import NumericalError
from editcore.locate_then_edit.cached_prefixes import CachedPrefixes
from editcore.locate_then_edit.prepared_rows import whole_rows
from editcore.locate_then_edit.token_rows import ESSENCE, FactRows, RowName
from editcore.locate_then_edit.value_loss import LossPass, loss_pass, pass_losses
from editcore.locate_then_edit.value_steps import AdamSteps, LogOddsSteps, log_odds_aim
from editcore.models.capture import capture
from editcore.models.planning import PassBudget, numbers_per_token, plan_passes
from editcore.models.tokens import TokenRow

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["OptimisedValue", "ValueOptimiser"]

_log = logging.getLogger(__name__)

_PASSES_AT_ONCE = 4
"""Passes that the active values fill. More values mean more rows of the same length, and so less padding."""


@dataclass(frozen=True, slots=True)
class OptimisedValue:
    """The result for one fact. Facts that share a value have all but the probability in common."""

    delta: Tensor
    """δ, ``[d_out]``."""
    base: Tensor
    """h₀, ``[d_out]``."""
    output: Tensor
    """v₀, the output of the edited projection at the lookup token of the bare prompt, ``[d_out]``."""
    loss: float
    """Loss at the last δ evaluated."""
    steps: int
    """Steps taken."""
    probability: float
    """exp(−NLL) of the fact's target averaged over the contexts, at the last δ evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownOfLayer:
    """What is known of the layer at which values are optimised."""

    cache_prefixes: bool | None = None
    """Whether the model's family allows :class:`CachedPrefixes`; otherwise whole rows are run. ``None``: not known."""
    inverse_metric: Tensor | None = None
    """M⁻¹ of the steps along the log-odds, ``[d_out, d_out]`` (:class:`LogOddsSteps`); ``None``: the identity."""


class ValueOptimiser:
    """Optimises the values of one call, side by side.

    Args:
        facts: the token rows of each fact. Of the facts that share a value, the first alone has an essence row.
        values: for each value, the numbers of its facts.
        known: of the layer; without an entry ``cache_prefixes``, whole rows are run.
    """

    def __init__(
        self,
        model: LanguageModel,
        facts: Sequence[FactRows],
        values: Sequence[Sequence[int]],
        *,
        layer: int,
        hparams: LocateThenEditHParams,
        known: KnownOfLayer,
    ) -> None:
        self.model, self.facts, self.values, self.layer, self.hparams = model, facts, values, layer, hparams
        self.known = known
        self.prefixes = CachedPrefixes(model, rows_by_context(facts), layer=layer) if known.cache_prefixes else None
        # h₀ comes from the bare prompt alone, of the first of a value's facts.
        seen = capture(model, [facts[members[0]].model_input(0) for members in values], [layer])[layer]
        stream = hparams.clamp_norm == "stream"
        self.outputs = seen.outputs.float().to(model.device)
        """v₀, the output of the edited projection, ``[n, d_out]``."""
        self.base = seen.block_outputs.float().to(model.device) if stream else self.outputs
        self.added = abs(model.layout.residual_scale) if stream else 1.0
        """Factor from ‖δ‖ to the length of what δ adds to the quantity that ``base`` is."""
        self.deltas = torch.zeros_like(self.base)
        self.movement = self._movement()
        self.most_steps = torch.tensor(
            [hparams.v_num_grad_steps * len(members) for members in values], device=model.device
        )
        """Evaluations of each value, ``[n]``."""
        contexts = len(facts[0].contexts)
        self.probabilities = self.base.new_zeros(len(facts), contexts)
        """Probability of the target behind each context when it was last evaluated, ``[facts, contexts]``."""
        others = contexts - 1
        self.contexts_per_step = min(others, hparams.v_contexts_per_step or others)
        """Contexts beside the bare prompt that a step evaluates."""
        # The contexts of a step count for all of them.
        self.shares = [1 / contexts, *[others / max(1, self.contexts_per_step) / contexts] * others]
        self.pair_share = contexts * others / max(1, (1 + self.contexts_per_step) * self.contexts_per_step)
        """For one pair of the contexts of a step, how many pairs of all contexts it stands for."""
        self.first_choice = torch.zeros(len(facts), contexts, dtype=torch.bool, device=model.device)
        """Whether each token of the target behind a context was the most probable one, when it was last evaluated."""
        self.remaining = torch.full((len(values),), -1, device=model.device)
        """Steps that a value takes yet, ``[n]``; -1 before its targets are the most probable ones everywhere."""
        self.references: dict[int, Tensor] = {}
        """By number of the value, log p at δ = 0 where the essence term reads it, ``[vocab]``."""
        self.budget = PassBudget.backward(model, layer)
        # For a token before the lookup token, a block keeps a key and a value, repeated for every query head.
        self.past_share = 2 * model.layout.d_model / numbers_per_token(model) if known.cache_prefixes else 0.0
        # Sorted by length, so that neighbours in the queue need little padding.
        self.queue = deque(sorted(range(len(values)), key=lambda value: (max(self._lengths(value)), value)))
        self.active: list[int] = []
        self.passes: list[LossPass] = []

    def run(self, advance: Callable[[int], None]) -> list[OptimisedValue]:
        """Optimise every value. The results are in the order of the facts.

        Args:
            advance: called after each step with the number of facts whose value it finished.

        Raises:
            NumericalError: a loss or a gradient is NaN or Inf.
        """
        results: dict[int, OptimisedValue] = {}
        planned = False
        while self.queue or self.active:
            try:
                if not planned:
                    self._admit()
                    self._plan()
                finished = self._step()
            except (RuntimeError, MemoryError) as error:
                if self.budget.tokens == 1 or not is_out_of_memory(error):
                    raise
                finished = {}
                self._halve()
            results |= finished
            self.active = [value for value in self.active if self.values[value][0] not in finished]
            # If so, the next step reads other contexts.
            turning = self.contexts_per_step < len(self.facts[0].contexts) - 1
            planned = not finished and bool(self.passes) and not turning
            advance(len(finished))
        return [results[fact] for fact in range(len(self.facts))]

    # Which values and rows

    def _length(self, name: RowName) -> int:
        """Number of tokens of a row that a pass runs."""
        row = self.facts[name.fact].model_input(name.context)
        return len(row.ids) - row.lookup if self.prefixes is not None else len(row.ids)

    def _names(self, values: Sequence[int]) -> list[RowName]:
        return [
            RowName(fact, context)
            for value in values
            for fact in self.values[value]
            for context in self.facts[fact].contexts_and_essence()
        ]

    def _lengths(self, value: int) -> list[int]:
        return [self._length(name) for name in self._names([value])]

    def _rows_of_this_step(self, value: int) -> list[RowName]:
        """Of each fact the bare prompt, the contexts whose turn it is, and the essence prompt."""
        others = len(self.facts[0].contexts) - 1
        first = int(self.movement.steps[value]) * self.contexts_per_step
        turn = sorted(1 + (first + place) % others for place in range(self.contexts_per_step))
        return [
            RowName(fact, context)
            for fact in self.values[value]
            for context in (0, *turn, *([] if self.facts[fact].essence is None else [ESSENCE]))
        ]

    def _admit(self) -> None:
        """Once half of the places are free, fill them."""
        most = _PASSES_AT_ONCE * self.budget.tokens
        most_values = self.budget.positions()  # each value holds the log p of its essence prompt
        tokens = sum(sum(self._lengths(value)) for value in self.active)
        if self.active and (tokens > most // 2 or len(self.active) > most_values // 2):
            return
        new: list[int] = []
        for value in self.queue:
            tokens += sum(self._lengths(value))
            if (self.active or new) and (tokens > most or len(self.active) + len(new) >= most_values):
                break
            new.append(value)
        if new and self.prefixes is not None:
            self.passes = []  # they hold tensors that are about to be replaced
            rows = {name: self.facts[name.fact].model_input(name.context) for name in self._names(new)}
            self.prefixes.replace(self._names(self.active), rows, self.budget.with_tokens(most))
            release()  # memory of finished values and earlier passes, before passes of other sizes begin
        for _ in new:
            self.queue.popleft()
        self.active += new

    def _halve(self) -> None:
        """Continue with smaller passes and fewer active values. Values that go back into the queue keep their steps."""
        tokens = sum(sum(self._lengths(value)) for value in self.active) or self.budget.tokens
        self.budget = self.budget.with_tokens(max(1, min(self.budget.tokens, tokens) // 2))
        _log.warning("out of memory; going on with passes of %d tokens", self.budget.tokens)
        self.queue.extendleft(reversed(self.active))
        self.active, self.passes = [], []
        if self.prefixes is not None:
            self.prefixes.replace([], {}, self.budget)
        release()

    def _plan(self) -> None:
        """Cut the rows that the next step evaluates into passes."""
        self.passes = []  # free their tensors
        names = [name for value in self.active for name in self._rows_of_this_step(value)]
        active = [self.values[value] for value in self.active]
        for chosen in self._cut(names):
            prepared = (
                self.prefixes.take(chosen)
                if self.prefixes is not None
                else whole_rows(self.model, [self.facts[name.fact].model_input(name.context) for name in chosen])
            )
            self.passes.append(
                loss_pass(prepared, chosen, self.facts, active=active, shares=self.shares, pair_share=self.pair_share)
            )

    def _cut(self, names: Sequence[RowName]) -> list[list[RowName]]:
        """Rows by pass. If contexts are compared with each other, those of a fact are in one pass."""
        past = self.past_share * max(self.facts[name.fact].row(name.context).lookup for name in names)
        together: dict[Hashable, list[RowName]] = {}
        for name in names:
            together.setdefault(name.fact if self.hparams.v_context_factor else name, []).append(name)
        units = list(together.values())
        cuts = plan_passes(
            [len(unit) * max(map(self._length, unit)) for unit in units],
            self.budget,
            scored=[sum(self.facts[name.fact].num_scored(name.context) for name in unit) for unit in units],
            past=past * max(map(len, units)),
        )
        return [[name for index in members for name in units[index]] for members in cuts]

    # One step

    def _step(self) -> dict[int, OptimisedValue]:
        """Evaluate the active values and move those that are not done. Return the results of those that are."""
        hparams, index = self.hparams, torch.tensor(self.active, device=self.base.device)
        losses, gradient = self._evaluate(index)
        means = self.probabilities.mean(dim=1)  # [facts]
        # Of the fact that each value makes least likely.
        probabilities = torch.stack([means[list(self.values[value])].min() for value in self.active])
        low = losses < hparams.v_stop_loss
        # As in the reference code, the last evaluation takes no step, unless there is a final step.
        last = self.movement.steps[index] == self.most_steps[index] - 1
        done = last | low
        moving = ~low & (~last | hparams.v_final_step)
        if hparams.v_stop_probability is not None:
            likely = probabilities >= hparams.v_stop_probability
            moving = moving & (~likely | hparams.v_final_step)
            done = done | likely
        if hparams.v_stop_most_probable is not None:
            said = torch.stack([self.first_choice[list(self.values[value])].all() for value in self.active])
            before = self.remaining[index]
            remaining = torch.where(said & (before < 0), hparams.v_stop_most_probable, before)
            moving = moving & (remaining != 0)
            self.remaining[index] = remaining = remaining - (moving & (remaining > 0)).long()
            done = done | (remaining == 0)
        self._refuse_not_finite(torch.isfinite(losses) & (torch.isfinite(gradient).all(dim=1) | ~moving))
        if bool(moving.any()):
            self._move(index[moving], losses[moving], gradient[moving])
        finished: dict[int, OptimisedValue] = {}
        for place in done.nonzero()[:, 0].tolist():
            value = self.active[place]
            self.references.pop(value, None)
            finished |= {
                fact: OptimisedValue(
                    delta=self.deltas[value].clone(),
                    base=self.base[value],
                    output=self.outputs[value],
                    loss=float(losses[place]),
                    steps=int(self.movement.steps[value]),
                    probability=float(means[fact]),
                )
                for fact in self.values[value]
            }
        return finished

    def _movement(self) -> AdamSteps | LogOddsSteps:
        hparams = self.hparams
        if hparams.v_optimizer == "adam":
            return AdamSteps(self.deltas, lr=hparams.v_lr, betas=(hparams.v_beta1, 0.999))
        assert hparams.v_stop_probability is not None
        longest = hparams.v_longest_step * self.base.norm(dim=1) / self.added
        aim = log_odds_aim(hparams.v_stop_probability)
        return LogOddsSteps(self.deltas, aim=aim, longest=longest, inverse=self.known.inverse_metric)

    def _move(self, values: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """A step, and the projection to ‖δ‖ ≤ clamp_norm_factor · ‖h₀‖."""
        limit = self.hparams.clamp_norm_factor * self.base[values].norm(dim=1) / self.added
        self.movement.step(values, losses, gradient)
        norm = self.deltas[values].norm(dim=1)
        self.deltas[values] *= (limit / norm.clamp_min(1e-30)).clamp_max(1.0)[:, None]

    def _evaluate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the active values, ``[active]``, and its gradient at their δ, ``[active, d_out]``.

        Each pass runs backward before the next one runs forward, so that only one pass's activations are held.
        """
        delta = self.deltas[index].detach().requires_grad_()
        # ‖δ‖ over ‖h₀‖ squared, as the reference code has it; the paper's text squares neither.
        losses = self.hparams.v_weight_decay * self.added * _norms(delta) / self.base[index].square().sum(1)
        (gradient,) = torch.autograd.grad(losses.sum(), delta)
        losses = losses.detach()
        references = {
            place: self.references[value] for place, value in enumerate(self.active) if value in self.references
        }
        for part in self.passes:
            found = pass_losses(self.model, part, delta, references, layer=self.layer, hparams=self.hparams)
            gradient += torch.autograd.grad(found.losses.sum(), delta)[0]
            losses += found.losses.detach()
            self.probabilities[found.nll_fact, found.nll_context] = (-found.nll).exp()
            if found.first_choice is not None:
                self.first_choice[found.nll_fact, found.nll_context] = found.first_choice
        self.references |= {self.active[place]: reference for place, reference in references.items()}
        return losses, gradient

    def _refuse_not_finite(self, finite: Tensor) -> None:
        """Refuse NaN and Inf in an evaluation, ``finite [active]``, and say where they come from."""
        if bool(finite.all()):
            return
        value = self.active[int(finite.logical_not().nonzero()[0, 0])]
        text, steps = self.facts[self.values[value][0]].text, int(self.movement.steps[value])
        if steps:
            raise NumericalError(
                f"The value optimisation of '{text}' met NaN or Inf after {steps} steps; nothing was applied. Lower "
                "v_lr."
            )
        asked = self.hparams.compute_dtype
        kind: str = str(self.model.compute_dtype).removeprefix("torch.") if asked == "model" else asked
        raise NumericalError(
            f"{self.model.name} gives NaN or Inf for '{text}' before anything is changed; nothing was applied. It "
            f"computes in {kind}: "
            + ("look for NaN in its weights." if kind in ("float32", "float64") else "compute in float32.")
        )


def rows_by_context(facts: Sequence[FactRows]) -> dict[int, list[TokenRow]]:
    """Rows as the model reads them, by the number of their context. Rows of one context begin with the same tokens."""
    rows: dict[int, list[TokenRow]] = {}
    for fact in facts:
        for context in fact.contexts_and_essence():
            rows.setdefault(context, []).append(fact.model_input(context))
    return rows


def _norms(rows: Tensor) -> Tensor:
    """Row norms whose gradient at zero is zero, where δ starts."""
    squared = rows.square().sum(1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, torch.ones_like(squared)).sqrt(), squared)
