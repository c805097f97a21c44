"""Value optimisation: for each fact, the δ that makes the model say its target.

METHODS: minimise over δ (ROME, arXiv 2202.05262, eq. 4)

    L(δ) = mean over contexts of −(1/T) Σₜ log p(target_t | context, prompt, target_<t ; h += δ)
         + kl_factor · KL( p_δ(· | "{subject} is a") ‖ p(· | "{subject} is a") )
         + v_weight_decay · ‖δ‖ / ‖h₀‖²
         + v_context_factor · Σ over pairs of contexts of ‖h_a − h_b‖² / d_model, averaged over blocks above

by Adam, or by steps along the gradient of the target's log-odds (``v_optimizer``), projected to
‖δ‖ ≤ clamp_norm_factor · ‖h₀‖ after every step. δ is added at the lookup token to the output of
the edited projection, which is what the update of its weight can change. In models without a norm behind the projection
this is the same as adding it to the residual stream, where MEMIT's reference code does.

Facts that share a key share a value, because W gives one output for one key. The first term is then the mean over these
facts, too; the value may take as many steps as they together, and stops when each of them is likely enough. Not in the
papers.

h₀ is the output of the edited projection at the lookup token of the bare prompt. With ``clamp_norm = "stream"`` it is
the output of its block there; ‖δ‖ is then the length of what δ adds to the stream, s‖δ‖ in a model that scales by s
what its blocks add.

A value is done when its loss is low, its targets are probable, or they are the most probable continuations
(``v_stop_loss``, ``v_stop_probability``, ``v_stop_most_probable``). With ``v_norm_anchor`` it is then rescaled.

:mod:`editcore.locate_then_edit.plain_values` has all this as a plain loop over one fact, which is the definition. The
same loop runs here for many facts at once, and computes only what δ can change:

::

                        lookup token
                             |
      Then he spoke. Marie Curie was born in      Paris
      |-- prefix ---------|  |-- tail --------|   |-- last target token: predicted, never read
    block
      n  |  keys and values  |  run in every step
     ... |  are kept, once   |
    l+1  |  for all steps    |
      l  |                   |  output kept, δ added at the lookup token
     ... |                   |
      0  |  run once         |  run once

* ``token_rows`` makes the token rows of a value: a row for each context, and one for the essence term.
* ``cached_prefixes`` keeps what δ cannot change; ``prepared_rows`` runs the model's own forward from there.
* ``value_loss`` turns the logits of one pass into losses of the values in it.
* ``side_by_side`` decides which values are active, cuts their rows into passes
  (:func:`editcore.models.planning.plan_passes`), moves δ (``value_steps``), and removes values that are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcore._util.memory import release
from editcore._util.words import counted, cut
from editcore.interfaces.documented import documented
from editcore.interfaces.progress import Progress, silent
from editcore.locate_then_edit.cached_prefixes import prefixes_fit
from editcore.locate_then_edit.side_by_side import KnownOfLayer, ValueOptimiser, rows_by_context
from editcore.locate_then_edit.token_rows import ESSENCE, FactRows
from editcore.locate_then_edit.windows import PlantedRow
from editcore.models.verdicts import kept_verdict

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["Targets", "anchored", "joined_parts", "optimise_targets", "prefixes_can_be_cached"]


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The optimised values of ``n`` facts; those that share a value have equal rows."""

    deltas: Tensor
    """δ, ``[n, d_out]`` float32."""
    base: Tensor
    """h₀, at the lookup token of the bare prompt, ``[n, d_out]``: output of the edited projection, or of its block
    (``clamp_norm``)."""
    losses: tuple[float, ...]
    """Loss of each fact, at the last δ evaluated."""
    steps: tuple[int, ...]
    """Steps taken."""
    probabilities: tuple[float, ...]
    """exp(−NLL) averaged over the contexts, at the last δ evaluated. With ``v_final_step`` or ``v_stop_most_probable``,
    δ moved once more after it; with ``v_norm_anchor`` it was rescaled."""
    norms: tuple[float, ...]
    """‖v₀ + δ‖ as optimised, before ``v_norm_anchor`` rescaled it."""
    notes: tuple[str, ...]
    """Sentences for the user."""

    def moved(self, rows: Sequence[int], further: Targets) -> Targets:
        """These with the δ and the steps of ``further`` added to those of ``rows``; the losses and probabilities of
        these are then those of ``further``."""
        deltas, norms, steps = self.deltas.clone(), list(self.norms), list(self.steps)
        losses, probabilities = list(self.losses), list(self.probabilities)
        for place, row in enumerate(rows):
            deltas[row] += further.deltas[place].to(deltas)
            steps[row] += further.steps[place]
            norms[row], losses[row] = further.norms[place], further.losses[place]
            probabilities[row] = further.probabilities[place]
        return replace(
            self,
            deltas=deltas,
            losses=tuple(losses),
            steps=tuple(steps),
            probabilities=tuple(probabilities),
            norms=tuple(norms),
            notes=tuple(dict.fromkeys((*self.notes, *further.notes))),
        )


_NOTHING_KNOWN = KnownOfLayer()


def optimise_targets(
    model: LanguageModel,
    values: Sequence[Sequence[FactRows]],
    *,
    layer: int,
    hparams: LocateThenEditHParams,
    known: KnownOfLayer = _NOTHING_KNOWN,
    progress: Progress = silent,
) -> Targets:
    """The δ of every value, at the projection of block ``layer``.

    Args:
        values: of each value, the token rows of its facts (:func:`fact_rows`): of one fact, or of several that share a
            key. The results are in the order of the facts, one value after the other.
        known: of the layer. If prefixes cannot be cached, whole rows are run, and ``notes`` says so. If that is not
            known, :func:`prefixes_can_be_cached` decides.

    Raises:
        NumericalError: the loss becomes NaN or Inf.
    """
    # Facts that share a value have one subject, so one essence row stands for all of them.
    facts = [
        fact if place == 0 else replace(fact, essence=None) for value in values for place, fact in enumerate(value)
    ]
    numbers = iter(range(len(facts)))
    members = [[next(numbers) for _ in value] for value in values]
    notes = list(_notes_on_shortened(model, facts))
    cached = known.cache_prefixes
    if cached is None:
        cached = prefixes_can_be_cached(model, facts[0], layer=layer)
    if any(isinstance(row, PlantedRow) for fact in facts for row in fact.contexts):
        cached = False  # the cached tokens would have to be run anew for every value before them
    elif cached and model.positions is not None:
        # Some families (GPT-Neo) give padding a position, and every tail is padded to the longest prefix.
        rows = (fact.row(context) for fact in facts for context in fact.contexts_and_essence())
        cached = all(2 * len(row.ids) <= model.positions for row in rows)
    elif not cached:
        notes.append(
            f"{type(model.hf).__name__}: the value optimisation ran whole rows, because a prefix cache "
            "does not reproduce this model's logits."
        )
    optimiser = ValueOptimiser(
        model, facts, members, layer=layer, hparams=hparams, known=replace(known, cache_prefixes=cached)
    )
    with progress.task("optimising targets", len(facts)) as advance:
        done = optimiser.run(advance)
    del optimiser
    release()  # the activations of its passes
    deltas, outputs = torch.stack([value.delta for value in done]), torch.stack([value.output for value in done])
    norms = (outputs + deltas).norm(dim=1)
    if hparams.v_norm_anchor and layer in dict(hparams.v_norms):
        norm = dict(hparams.v_norms)[layer]
        deltas = anchored(deltas, outputs, norm)
        notes.extend(_notes_on_long(facts, norms, norm))
    return Targets(
        deltas=deltas,
        base=torch.stack([value.base for value in done]),
        losses=tuple(value.loss for value in done),
        steps=tuple(value.steps for value in done),
        probabilities=tuple(value.probability for value in done),
        norms=tuple(norms.tolist()),
        notes=tuple(notes),
    )


def joined_parts(parts: Sequence[Targets]) -> Targets:
    """The targets of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Targets(
        deltas=torch.cat([part.deltas for part in parts]),
        base=torch.cat([part.base for part in parts]),
        losses=tuple(loss for part in parts for loss in part.losses),
        steps=tuple(steps for part in parts for steps in part.steps),
        probabilities=tuple(probability for part in parts for probability in part.probabilities),
        norms=tuple(norm for part in parts for norm in part.norms),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def anchored(deltas: Tensor, outputs: Tensor, norm: float) -> Tensor:
    """δ for which v* = v₀ + δ has the length μ; zero where ‖v₀ + δ‖ > 2μ. NAS, the norm anchor.

    Args:
        deltas: δ, ``[n, d_out]``.
        outputs: v₀, ``[n, d_out]``.
        norm: μ.
    """
    values = outputs + deltas
    lengths = values.norm(dim=1, keepdim=True)
    return torch.where(lengths > 2 * norm, 0.0, norm * values / lengths - outputs)


def prefixes_can_be_cached(model: LanguageModel, fact: FactRows, *, layer: int) -> bool:
    """Whether cached prefixes reproduce this model's logits, tested on one fact.

    One row of every kind is tested: the bare prompt, a context, the essence prompt. The outcome is kept for the model.
    """
    kinds = {0, min(1, len(fact.contexts) - 1), ESSENCE}
    rows = {context: rows for context, rows in rows_by_context([fact]).items() if context in kinds}
    return kept_verdict(model, f"cached prefixes, block {layer}", lambda: prefixes_fit(model, rows, layer=layer))


def _notes_on_shortened(model: LanguageModel, facts: Sequence[FactRows]) -> Iterator[str]:
    """A sentence on contexts that were shortened, because the model reads no more tokens."""
    shortened = [fact.text for fact in facts if fact.shortened]
    if shortened:
        count = "1 fact" if len(shortened) == 1 else f"{len(shortened)} facts"
        yield (
            f"{model.name} reads at most {model.positions} tokens, so contexts of {count} were "
            f"shortened, the first being '{shortened[0][:60]}'."
        )


def _notes_on_long(facts: Sequence[FactRows], norms: Tensor, norm: float) -> Iterator[str]:
    """A sentence on facts that are not written, because their values are too long for ``v_norm_anchor``."""
    long = [fact.text for fact, length in zip(facts, norms.tolist(), strict=True) if length > 2 * norm]
    if long:
        yield (
            f"{counted(len(long), 'fact')} of {len(facts)} got no change, because the value found is longer than twice "
            f"{norm:g}, its length in v_norms, the first being '{cut(long[0])}'. Lower clamp_norm_factor, or measure "
            "v_norms with these settings: editctl onboard."
        )
