"""Value optimisation: for each fact, the δ that makes the model say its target.

METHODS: minimise over δ (ROME, arXiv 2202.05262, eq. 4)

    L(δ) = mean over contexts of −(1/T) Σₜ log p(target_t | context, prompt, target_<t ; h += δ)
         + kl_factor · KL( p_δ(· | "{subject} is a") ‖ p(· | "{subject} is a") )
         + v_weight_decay · ‖δ‖ / ‖h₀‖²

by Adam, projected to ‖δ‖ ≤ clamp_norm_factor · ‖h₀‖ after every step. δ is added at the lookup token to the output of
the edited projection, which is what the update of its weight can change; in models without a norm behind the projection
this is the same as adding it to the residual stream, where MEMIT's reference code does.

h₀ is the output of the edited projection at the lookup token of the bare prompt or, with ``clamp_norm = "stream"``,
what leaves its block there. ‖δ‖ is then the length of what δ adds to that, s‖δ‖ in a model that scales by s what its
blocks add.

Facts are optimised side by side, and each has its own steps and its own stop: what finishes makes room for the next in
line. A fact's δ therefore does not depend on its neighbours.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editcore._util.memory import free_memory_bytes, is_out_of_memory, release
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import NumericalError
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import EditRequest
from editcore.locate_then_edit.rows import PreparedRows, RowName, Tails, fits, forward_logits, passes, prepare_plain
from editcore.models.capture import capture
from editcore.models.tokens import TokenRow, continuation_row, fitting, lookup_row

if TYPE_CHECKING:
    from editcore.locate_then_edit.hparams import LocateThenEditHParams
    from editcore.models import LanguageModel

__all__ = ["Targets", "optimise_targets", "tails_fit"]

_log = logging.getLogger(__name__)

ESSENCE_PROMPT = "{} is a"
"""ROME, section 3.1: the prompt on which the subject's essence must not drift."""

_MAX_TOKENS = {"cpu": 512}
"""Size of a pass in tokens, whose activations are held until it has gone backward; more are no faster."""
_MAX_TOKENS_ELSEWHERE = 8192
_PASSES_AT_ONCE = 4
"""Passes that the facts optimised side by side fill. The more facts, the less padding, and the fuller the passes."""
_ACTIVATION_BYTES = 2**29
_BYTES_PER_WORD = 2**10
"""Memory for those activations on a CPU, less for each word of the vocabulary, for which the tokenizer takes about as
much, but at least half; elsewhere half of what is free."""
_MAX_LOGITS = {"cpu": 3 * 2**22}
"""Logits of a pass (48 MB in float32, twice that while their loss is computed or goes backward), and those before δ of
the essence prompts of the facts optimised side by side."""
_MAX_LOGITS_ELSEWHERE = 2**27
_LOGITS_AT_A_TIME = 2**21
"""Logits whose loss is computed at a time."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The optimised values of ``n`` facts."""

    deltas: Tensor
    """δ, ``[n, d_out]`` float32."""
    base: Tensor
    """h₀, at the lookup token of the bare prompt, ``[n, d_out]``: output of the edited projection, or of its block
    (``clamp_norm``)."""
    losses: tuple[float, ...]
    """Of each fact, at the last δ evaluated."""
    steps: tuple[int, ...]
    """Adam steps taken."""
    probabilities: tuple[float, ...]
    """exp(−NLL) averaged over the contexts, at the last δ evaluated; ``v_final_step`` moves on from it."""
    notes: tuple[str, ...]
    """Sentences for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fact:
    """Token rows of one fact: its contexts, then one row for the essence term."""

    text: str
    """The prompt, for messages."""
    rows: tuple[TokenRow, ...]
    """The bare prompt first; the last row is the essence prompt if ``essence_position`` is set."""
    essence_position: int | None
    """Token of the last row where the KL term reads the distribution; ``None`` without that term."""

    @property
    def num_contexts(self) -> int:
        return len(self.rows) - (self.essence_position is not None)

    def scored(self, number: int) -> int:
        """Positions of a row whose logits are needed: its target's, or where the essence term reads."""
        return max(1, len(self.rows[number].targets))

    def inputs(self, number: int) -> TokenRow:
        """A row as the model reads it: the last target token is asked for, never read."""
        row = self.rows[number]
        return replace(row, ids=row.ids[:-1]) if row.targets else row

    def tail(self, number: int) -> int:
        """Tokens of a row from the lookup token on."""
        row = self.inputs(number)
        return len(row.ids) - row.lookup


def optimise_targets(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    *,
    layer: int,
    templates: Sequence[str],
    hparams: LocateThenEditHParams,
    shortcut: bool | None = None,
    progress: Progress = silent,
) -> Targets:
    """The δ of every request at ``layer``.

    Args:
        templates: contexts with ``{}`` for the prompt; the first must be the bare ``"{}"``.
        shortcut: compute only what δ can change, which :func:`tails_fit` says whether the model's family allows (it is
            asked if this is ``None``). Otherwise whole rows are run, and ``notes`` says so.

    Raises:
        SubjectNotFoundError: a subject is not found in its tokens.
        NumericalError: the loss becomes NaN or Inf.
    """
    facts = [_tokenise(model, request, templates, hparams) for request in requests]
    notes: list[str] = []
    if shortened := [one.text for one in requests if any(fitting(model, one, each) != each for each in templates)]:
        count = "1 fact" if len(shortened) == 1 else f"{len(shortened)} facts"
        notes.append(
            f"{model.name} reads at most {model.positions} tokens, so contexts of {count} were "
            f"shortened, the first being '{shortened[0][:60]}'."
        )
    tails = _facts_fit(model, facts[0], layer) if shortcut is None else shortcut
    if tails and model.positions is not None:
        # Some families (GPT-Neo) count padding among their positions, and a tail stands behind the longest prefix.
        tails = all(2 * len(row.ids) <= model.positions for fact in facts for row in fact.rows)
    elif not tails:
        notes.append(
            f"{type(model.hf).__name__}: the value optimisation ran whole rows, because a prefix cache "
            "does not reproduce this model's logits."
        )
    with progress.task("optimising targets", len(facts)) as advance:
        done = _Solver(model, facts, layer, hparams, tails=tails).run(advance)
    release()  # the passes' activations
    return Targets(
        deltas=torch.stack([result.delta for result in done]),
        base=torch.stack([result.base for result in done]),
        losses=tuple(result.loss for result in done),
        steps=tuple(result.steps for result in done),
        probabilities=tuple(result.probability for result in done),
        notes=tuple(notes),
    )


def tails_fit(
    model: LanguageModel,
    request: EditRequest,
    *,
    layer: int,
    templates: Sequence[str],
    hparams: LocateThenEditHParams,
) -> bool:
    """Whether the shortcut of :func:`optimise_targets` reproduces this model's logits, tried on one request."""
    return _facts_fit(model, _tokenise(model, request, templates, hparams), layer)


def _facts_fit(model: LanguageModel, fact: _Fact, layer: int) -> bool:
    numbers = sorted({0, min(1, fact.num_contexts - 1), len(fact.rows) - 1})  # one row of every kind
    return fits(model, [[fact.inputs(number)] for number in numbers], layer)


def _tokenise(
    model: LanguageModel, request: EditRequest, templates: Sequence[str], hparams: LocateThenEditHParams
) -> _Fact:
    rows = [
        continuation_row(model, request, template=template, fact_token=hparams.fact_token) for template in templates
    ]
    if hparams.kl_factor == 0:
        return _Fact(text=request.text, rows=tuple(rows), essence_position=None)
    essence = request.model_copy(update={"prompt": ESSENCE_PROMPT})
    row = lookup_row(model, essence, fact_token="subject_last" if hparams.fact_token == "last" else hparams.fact_token)
    position = row.lookup if hparams.kl_position == "lookup" else len(row.ids) - 1
    row = replace(row, ids=row.ids[: position + 1])  # what follows is not read
    return _Fact(text=request.text, rows=(*rows, row), essence_position=position)


def _by_context(facts: Sequence[_Fact]) -> list[list[TokenRow]]:
    """The rows of each context, which begin alike, and the essence rows."""
    return [[fact.inputs(number) for fact in facts] for number in range(len(facts[0].rows))]


def _token_budget(model: LanguageModel, layer: int) -> int:
    """Tokens whose activations, kept for the backward pass by the blocks above ``layer``, fit the memory."""
    kind = model.device.type
    per_token = (model.layout.num_layers - layer) * _token_width(model) * model.dtype.itemsize
    if kind == "cpu":
        memory = max(_ACTIVATION_BYTES // 2, _ACTIVATION_BYTES - _BYTES_PER_WORD * model.layout.vocab_size)
    else:
        memory = free_memory_bytes(model.device) // 2
    return max(1, min(_MAX_TOKENS.get(kind, _MAX_TOKENS_ELSEWHERE), memory // per_token))


def _token_width(model: LanguageModel) -> int:
    """Numbers that a block keeps of a token: about a dozen as wide as the residual stream, four as wide as the MLP."""
    return 12 * model.layout.d_model + 4 * model.layout.d_ff


@dataclass(frozen=True, slots=True)
class _Result:
    delta: Tensor
    base: Tensor
    loss: float
    steps: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Rows of about one length, and what of them enters which fact's loss. ``rows`` rows, ``tokens`` scored target
    tokens, ``essences`` essence rows."""

    prepared: PreparedRows
    row_fact: Tensor
    """``[rows]`` place of the row's fact among those optimised now."""
    row_number: Tensor
    """``[rows]`` number of the row in its fact."""
    row_share: Tensor
    """``[rows]`` weight of a context in the mean over them, 0 for an essence row."""
    token_row: Tensor
    """``[tokens]``"""
    token_position: Tensor
    """``[tokens]`` where the token is predicted from, as a column of the prepared ids."""
    token_label: Tensor
    """``[tokens]``"""
    token_share: Tensor
    """``[tokens]`` 1 / T of its row."""
    essence_row: Tensor
    """``[essences]``"""
    essence_position: Tensor
    """``[essences]``"""


class _Solver:
    """The facts of one call: ``n`` in all, ``active`` of them optimised side by side."""

    def __init__(
        self, model: LanguageModel, facts: Sequence[_Fact], layer: int, hparams: LocateThenEditHParams, *, tails: bool
    ) -> None:
        self.model, self.facts, self.layer, self.hparams = model, facts, layer, hparams
        self.tails = Tails(model, _by_context(facts), layer) if tails else None
        # h₀ comes from the bare prompt alone, each fact's first row.
        seen = capture(model, [fact.inputs(0) for fact in facts], [layer])[layer]
        stream = hparams.clamp_norm == "stream"
        self.base = (seen.block_outputs if stream else seen.outputs).float().to(model.device)
        self.added = abs(model.layout.residual_scale) if stream else 1.0
        """Length of what a δ of length 1 adds to what ``base`` is."""
        self.deltas = torch.zeros_like(self.base)
        self.adam = _Adam(self.deltas, lr=hparams.v_lr, betas=(hparams.v_beta1, 0.999))
        self.probabilities = self.base.new_zeros(len(facts), facts[0].num_contexts)
        """Of the target after each context when it was last evaluated, ``[n, contexts]``."""
        others = facts[0].num_contexts - 1
        self.turn = min(others, hparams.v_contexts_per_step or others)
        """Contexts beside the bare prompt that a step evaluates."""
        self.essence: dict[int, Tensor] = {}
        """log p at δ = 0 where the essence term reads it, ``[vocab]``, of the facts that have begun."""
        self.pass_tokens = _token_budget(model, layer)
        self.logits = _MAX_LOGITS.get(model.device.type, _MAX_LOGITS_ELSEWHERE)
        # Of a token before the tail, a block keeps key and value, once for every query head.
        self.past_share = 2 * model.layout.d_model / _token_width(model) if tails else 0.0
        # Neighbours in the queue are of similar length, so that little is padded.
        self.queue = deque(sorted(range(len(facts)), key=lambda fact: (max(self._lengths(fact)), fact)))
        self.active: list[int] = []
        self.passes: list[_Pass] = []

    def _length(self, row: RowName) -> int:
        fact, number = self.facts[row[0]], row[1]
        return fact.tail(number) if self.tails else len(fact.inputs(number).ids)

    def _lengths(self, fact: int) -> list[int]:
        return [self._length(row) for row in self._rows([fact])]

    def _rows(self, facts: Sequence[int]) -> list[RowName]:
        return [(fact, number) for fact in facts for number in range(len(self.facts[fact].rows))]

    def _now(self, fact: int) -> list[int]:
        """The rows of a fact that its next step evaluates: the bare prompt, the contexts whose turn it is, essence."""
        others = self.facts[fact].num_contexts - 1
        first = int(self.adam.steps[fact]) * self.turn
        turn = sorted(1 + (first + place) % others for place in range(self.turn))
        return [0, *turn, *range(others + 1, len(self.facts[fact].rows))]

    def run(self, advance: Callable[[int], None]) -> list[_Result]:
        """Optimise every fact; the results are in the order of the facts."""
        results: dict[int, _Result] = {}
        changed = True
        while self.queue or self.active:
            try:
                if changed:
                    self._admit()
                    self._plan()
                finished = self._step()
            except (RuntimeError, MemoryError) as error:
                if self.pass_tokens == 1 or not is_out_of_memory(error):
                    raise
                finished = {}
                self._halve()
            results |= finished
            self.active = [fact for fact in self.active if fact not in finished]
            changed = bool(finished) or not self.passes or self.turn < self.facts[0].num_contexts - 1
            advance(len(finished))
        return [results[fact] for fact in range(len(self.facts))]

    def _admit(self) -> None:
        """Once half of the places are free, fill them."""
        most, most_facts = _PASSES_AT_ONCE * self.pass_tokens, max(1, self.logits // self.model.layout.vocab_size)
        tokens = sum(sum(self._lengths(fact)) for fact in self.active)
        if self.active and (tokens > most // 2 or len(self.active) > most_facts // 2):
            return
        new: list[int] = []
        for fact in self.queue:
            tokens += sum(self._lengths(fact))
            if (self.active or new) and (tokens > most or len(self.active) + len(new) >= most_facts):
                break
            new.append(fact)
        if new and self.tails is not None:
            self.passes = []  # they hold what is about to be replaced
            rows = {(fact, number): self.facts[fact].inputs(number) for fact, number in self._rows(new)}
            self.tails.replace(self._rows(self.active), rows, most=most)
            release()  # what finished facts and earlier passes took, before passes of other sizes begin
        for _ in new:
            self.queue.popleft()
        self.active += new

    def _halve(self) -> None:
        """Go on with smaller passes and fewer facts at once; those put back into the queue keep the steps they took."""
        tokens = sum(sum(self._lengths(fact)) for fact in self.active) or self.pass_tokens
        self.pass_tokens = max(1, min(self.pass_tokens, tokens) // 2)
        _log.warning("out of memory; going on with passes of %d tokens", self.pass_tokens)
        self.queue.extendleft(reversed(self.active))
        self.active, self.passes = [], []
        if self.tails is not None:
            self.tails.replace([], {}, most=1)
        release()

    def _plan(self) -> None:
        """Cut the rows that the active facts evaluate next into passes."""
        self.passes = []  # frees what they hold
        wanted = [(fact, number) for fact in self.active for number in self._now(fact)]
        rows = sorted(wanted, key=lambda row: (self._length(row), row))
        lengths = [self._length(row) for row in rows]
        past = self.past_share * max(self.facts[fact].rows[number].lookup for fact, number in rows)
        logits = [0, *accumulate(self.facts[fact].scored(number) for fact, number in rows)]  # of the rows before each

        def holds(start: int, end: int) -> bool:
            fits_tokens = (end - start) * (lengths[end - 1] + past) <= self.pass_tokens
            return fits_tokens and (logits[end] - logits[start]) * self.model.layout.vocab_size <= self.logits

        cuts = passes(lengths, self.model.device, holds=holds)
        self.passes = [self._pass(rows[cut]) for cut in cuts]

    def _pass(self, rows: Sequence[RowName]) -> _Pass:
        inputs = [self.facts[fact].inputs(number) for fact, number in rows]
        lists: dict[str, list[float]] = {name: [] for name in _Pass.__slots__ if name != "prepared"}
        for index, ((fact, number), row) in enumerate(zip(rows, inputs, strict=True)):
            start = row.lookup if self.tails else 0  # the token that column 0 of the prepared ids holds
            whole = self.facts[fact].rows[number]
            lists["row_fact"].append(self.active.index(fact))
            lists["row_number"].append(number)
            lists["row_share"].append(self._share(number) if whole.targets else 0.0)
            for offset, label in enumerate(whole.targets):
                lists["token_row"].append(index)
                lists["token_position"].append(whole.target_start - 1 + offset - start)
                lists["token_label"].append(label)
                lists["token_share"].append(1 / len(whole.targets))
            if not whole.targets:
                position = self.facts[fact].essence_position
                assert position is not None
                lists["essence_row"].append(index)
                lists["essence_position"].append(position - start)
        tensors = {
            name: torch.tensor(
                values, device=self.model.device, dtype=torch.float32 if name.endswith("share") else torch.long
            )
            for name, values in lists.items()
        }
        prepared = self.tails.take(rows) if self.tails else prepare_plain(self.model, inputs)
        return _Pass(prepared=prepared, **tensors)

    def _share(self, number: int) -> float:
        """Weight of a context in the mean. Those whose turn it is stand for all of them."""
        others = self.facts[0].num_contexts - 1
        return (1 if number == 0 else others / self.turn) / (others + 1)

    def _step(self) -> dict[int, _Result]:
        """Evaluate the active facts and move those that are not done; the results of those that are."""
        hparams, index = self.hparams, torch.tensor(self.active, device=self.base.device)
        delta = self.deltas[index]  # [active, d_out]
        losses, gradient = self._evaluate(delta, self.base[index])
        probabilities = self.probabilities[index].mean(dim=1)
        # As in the reference code, the last evaluation takes no step.
        last = self.adam.steps[index] == hparams.v_num_grad_steps - 1
        done = last | (losses < hparams.v_stop_loss)
        moving = ~done
        if hparams.v_stop_probability is not None:
            likely = probabilities >= hparams.v_stop_probability
            moving = moving & (~likely | hparams.v_final_step)
            done = done | likely
        self._refuse_no_numbers(torch.isfinite(losses) & (torch.isfinite(gradient).all(dim=1) | ~moving))
        if bool(moving.any()):
            moved = index[moving]
            limit = hparams.clamp_norm_factor * self.base[moved].norm(dim=1) / self.added
            self.adam.step(moved, gradient[moving])
            norm = self.deltas[moved].norm(dim=1)
            self.deltas[moved] *= (limit / norm.clamp_min(1e-30)).clamp_max(1.0)[:, None]
        finished = {}
        for place in done.nonzero()[:, 0].tolist():
            fact = self.active[place]
            self.essence.pop(fact, None)
            finished[fact] = _Result(
                delta=self.deltas[fact].clone(),
                base=self.base[fact],
                loss=float(losses[place]),
                steps=int(self.adam.steps[fact]),
                probability=float(probabilities[place]),
            )
        return finished

    def _refuse_no_numbers(self, finite: Tensor) -> None:
        """Refuse NaN and Inf in an evaluation, ``finite [active]``, and say where they come from."""
        if bool(finite.all()):
            return
        fact = self.active[int(finite.logical_not().nonzero()[0, 0])]
        text, steps = self.facts[fact].text, int(self.adam.steps[fact])
        if steps:
            raise NumericalError(
                f"The value optimisation of '{text}' met NaN or Inf after {steps} steps; nothing was applied. Lower "
                "v_lr."
            )
        asked = self.hparams.compute_dtype
        kind: str = str(self.model.dtype).removeprefix("torch.") if asked == "model" else asked
        raise NumericalError(
            f"{self.model.name} gives NaN or Inf for '{text}' before anything is changed; nothing was applied. It "
            f"computes in {kind}: "
            + ("look for NaN in its weights." if kind in ("float32", "float64") else "compute in float32.")
        )

    def _evaluate(self, delta: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the active facts, ``[active]``, and its gradient at ``delta``.

        Every pass goes backward before the next goes forward, so that only its own activations are held.
        """
        delta = delta.detach().requires_grad_()
        # ‖δ‖ over ‖h₀‖ squared, as the reference code has it; the paper's text squares neither.
        losses = self.hparams.v_weight_decay * self.added * _norm(delta) / base.square().sum(1)
        (gradient,) = torch.autograd.grad(losses.sum(), delta)
        losses = losses.detach()
        for one in self.passes:
            part = self._pass_loss(one, delta)
            gradient += torch.autograd.grad(part.sum(), delta)[0]
            losses += part.detach()
        return losses, gradient

    def _pass_loss(self, one: _Pass, delta: Tensor) -> Tensor:
        """What the rows of a pass add to the loss of the active facts, ``[active]``; notes their probabilities."""
        scored = len(one.token_row)
        with _computing_in(self.hparams.compute_dtype, self.model.device.type):
            logits = forward_logits(
                self.model,
                one.prepared,
                self.layer,
                delta[one.row_fact],
                torch.cat([one.token_row, one.essence_row]),
                torch.cat([one.token_position, one.essence_position]),
            )
        places = one.row_fact[one.essence_row]
        references = self._references([self.active[place] for place in places.tolist()], logits[scored:])
        nll, drift = _Losses.apply(logits.float(), one.token_label.to(logits.device), references)  # type: ignore[no-untyped-call]
        row_nll = torch.zeros_like(one.row_share).index_add(0, one.token_row, nll.to(delta) * one.token_share)
        losses = delta.new_zeros(len(self.active)).index_add(0, one.row_fact, row_nll * one.row_share)
        contexts = (one.row_share > 0).nonzero()[:, 0]
        facts = torch.tensor(self.active, device=one.row_fact.device)[one.row_fact[contexts]]
        self.probabilities[facts, one.row_number[contexts]] = (-row_nll.detach()[contexts]).exp()
        return losses.index_add(0, places, self.hparams.kl_factor * drift.to(delta))

    def _references(self, facts: Sequence[int], logits: Tensor) -> list[Tensor]:
        """log p, ``[vocab]``, that each fact's essence row is held against: that of its first evaluation, at δ = 0."""
        for fact, row in zip(facts, logits.detach(), strict=True):
            if fact not in self.essence:
                self.essence[fact] = row.float().log_softmax(-1)
        return [self.essence[fact] for fact in facts]


class _Losses(torch.autograd.Function):
    """−log p of the tokens ``labels [tokens]`` under the first rows of ``logits [tokens + essences, vocab]``, and under
    each further row KL(p ‖ q) with its own log q, ``[vocab]``: ``[tokens]`` and ``[essences]``.

    Rows are as wide as the vocabulary, so it is written out to hold nothing of their size but its gradient:
    ∂(−log p_y)/∂zⱼ = pⱼ − [j = y] and ∂KL/∂zⱼ = pⱼ (log pⱼ − log qⱼ − KL).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, log_q: list[Tensor]) -> tuple[Tensor, Tensor]:
        scored, size = len(labels), max(1, _LOGITS_AT_A_TIME // logits.shape[1])
        gradient, losses = torch.empty_like(logits), logits.new_empty(len(logits))
        for start in range(0, scored, size):
            rows, wanted = slice(start, min(start + size, scored)), labels[start : start + size, None]
            log_p = logits[rows].log_softmax(-1)
            losses[rows] = -log_p.gather(1, wanted)[:, 0]
            gradient[rows] = log_p.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=log_p.dtype))
        for start in range(scored, len(logits), size):
            rows = slice(start, start + size)
            log_p = logits[rows].log_softmax(-1)
            ratio = log_p - torch.stack(log_q[start - scored : start - scored + size])
            p = log_p.exp_()
            losses[rows] = torch.linalg.vecdot(p, ratio)
            gradient[rows] = ratio.sub_(losses[rows, None]).mul_(p)
        ctx.save_for_backward(gradient)
        return losses[:scored], losses[scored:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return torch.cat(gradients)[:, None] * gradient, None, None


class _Adam:
    """Adam (arXiv 1412.6980, algorithm 1) on rows that take their steps at different times."""

    def __init__(self, values: Tensor, *, lr: float, betas: tuple[float, float]) -> None:
        self.values, self.lr, self.betas, self.epsilon = values, lr, betas, 1e-8
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)
        self.steps = torch.zeros(len(values), dtype=torch.long, device=values.device)

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """Move ``rows`` of the values by their ``gradient [rows, d_out]``."""
        beta1, beta2 = self.betas
        self.steps[rows] += 1
        steps = self.steps[rows, None].to(gradient)
        first = self.first[rows] = beta1 * self.first[rows] + (1 - beta1) * gradient
        second = self.second[rows] = beta2 * self.second[rows] + (1 - beta2) * gradient.square()
        corrected = (second / (1 - beta2**steps)).sqrt() + self.epsilon
        self.values[rows] -= self.lr * first / (1 - beta1**steps) / corrected


def _computing_in(dtype: str, device: str) -> AbstractContextManager[object]:
    """Matrix products in ``dtype``; δ, the loss and Adam stay in float32."""
    return nullcontext() if dtype == "model" else torch.autocast(device, dtype=getattr(torch, dtype))


def _norm(rows: Tensor) -> Tensor:
    """Row norms whose gradient at zero is zero, where δ starts."""
    squared = rows.square().sum(1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, torch.ones_like(squared)).sqrt(), squared)
