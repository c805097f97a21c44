"""Causal tracing: finds where a model keeps facts about a subject (ROME, arXiv 2202.05262, section 2).

There are three runs of a true statement. The *clean* run gives its attribute the probability p. In the *corrupted* run,
noise on the embeddings of the subject's tokens lowers it to p*. A *restored* run is the corrupted run with one state
set back to its clean value at one token: a block's output (``hidden``), or the output of the MLPs or attentions of a
window of layers. The indirect effect of that state is p(restored) − p*. It is averaged over draws of the noise, then
over the tokens of one role in a fact, then over facts.

Departures from the paper: p is the probability of the whole attribute, not of its first token. The window is a share of
the depth (10 of GPT-2 XL's 48 blocks). By default there is one draw of the noise for each fact, because facts differ
more than draws do. A restored run starts at the lowest block that it changes, if a check shows that the model allows
it.

Shapes: ``draws`` of the noise, ``seq`` tokens of a statement with its attribute, ``roles`` as in :data:`ROLES`,
``layers`` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from editcore.datasets import KnownFact
from editcore.evaluation import score_targets
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import HParamsError, RequestError
from editcore.interfaces.progress import Progress, silent
from editcore.locate_then_edit.located import LAST, LAST_SUBJECT, ROLES, Tracing
from editcore.models.forward import logits_at
from editcore.models.layout import attention_output
from editcore.models.module_hooks import first_tensor, hooks, replace_first
from editcore.models.passes import skip_first_blocks
from editcore.models.planning import PassBudget
from editcore.models.tokens import join_continuation

if TYPE_CHECKING:
    from editcore.models import LanguageModel

__all__ = ["TracingOptions", "trace"]

_WINDOW_SHARE = 10 / 48
_CHUNK = 32
"""Facts that are scored at once in the search for those that the model knows."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class TracingOptions:
    """How facts are traced.

    Raises:
        HParamsError: a number is not positive.
    """

    num: int = 20
    """Facts to trace, of those that the model knows."""
    draws: int = 1
    """Draws of the noise per fact. The paper takes 10."""
    noise: float = 3.0
    """Standard deviation of the noise, in those of the subjects' embeddings. The paper takes 3."""
    window: int | None = None
    """Layers restored together for MLPs and attentions; ``None`` for ten forty-eighths of the depth."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.draws < 1 or not self.noise > 0 or (self.window is not None and self.window < 1):
            raise HParamsError("trace: num, draws, noise and window must be positive.")


def trace(
    model: LanguageModel,
    facts: Sequence[KnownFact],
    *,
    options: TracingOptions | None = None,
    progress: Progress = silent,
) -> Tracing:
    """Trace the first facts that the model knows.

    If it knows none, ``used`` is 0 and every effect is NaN.

    Raises:
        RequestError: there are no facts, a subject is not in its prompt, or its tokens cannot be found.
    """
    if not facts:
        raise RequestError("There is nothing to trace: the list of facts is empty.")
    options = options or TracingOptions()
    window = options.window or max(1, round(_WINDOW_SHARE * model.layout.num_layers))
    known, asked = _known_facts(model, facts, options.num, progress)
    rows = [_tokenise(model, fact) for fact in known]
    parts = _parts(model, window)
    done: list[_Traced] = []
    if rows:
        spread = options.noise * _spread(model, rows)
        with progress.task("tracing", len(rows)) as advance:
            for number, row in enumerate(rows):
                generator = torch.Generator().manual_seed(1_000_003 * options.seed + number)
                done.append(_Fact(model, row, spread=spread, draws=options.draws, generator=generator).trace(parts))
                advance(1)
    return Tracing(
        model=model.name,
        fingerprint=model.base_fingerprint,
        effects={kind: _average(model, [traced.effects[kind] for traced in done], rows) for kind in parts},
        counts=tuple(sum(role in row.roles for row in rows) for role in range(len(ROLES))),
        asked=asked,
        used=len(done),
        clean=float(np.mean([traced.clean for traced in done])) if done else float("nan"),
        corrupted=float(np.mean([traced.corrupted for traced in done])) if done else float("nan"),
        noise=options.noise,
        draws=options.draws,
        window=window,
        seed=options.seed,
    )


def _known_facts(
    model: LanguageModel, facts: Sequence[KnownFact], num: int, progress: Progress
) -> tuple[list[KnownFact], int]:
    """The first ``num`` facts whose attribute the model predicts, token by token, and the number of facts that were
    scored."""
    known: list[KnownFact] = []
    asked = 0
    with progress.task("looking for facts that the model knows", len(facts)) as advance:
        for start in range(0, len(facts), _CHUNK):
            chunk = facts[start : start + _CHUNK]
            scores = score_targets(
                model,
                [fact.prompt for fact in chunk],
                [fact.attribute for fact in chunk],
                joins=[fact.join for fact in chunk],
            )
            advance(len(chunk))
            for fact, scored in zip(chunk, scores, strict=True):
                asked += 1
                if scored.correct:
                    known.append(fact)
                if len(known) == num:
                    return known, asked
    return known, asked


@dataclass(frozen=True, slots=True)
class _Row:
    """A statement as tokens."""

    ids: tuple[int, ...]
    """Tokens of the prompt, then of the attribute."""
    end: int
    """Number of tokens of the prompt."""
    subject: tuple[int, ...]
    """Places of the subject's tokens."""
    roles: tuple[int, ...]
    """Number of the role of each token from the subject's first to the prompt's last."""


def _tokenise(model: LanguageModel, fact: KnownFact) -> _Row:
    prompt_ids, offsets = model.read_prompt(fact.prompt)
    if fact.subject not in fact.prompt:
        raise RequestError(f"The subject '{fact.subject}' is not in the prompt '{fact.prompt}'.")
    start = len(model.prompt_form.before) + fact.prompt.index(fact.subject)
    stop = start + len(fact.subject)
    subject = tuple(place for place, (a, b) in enumerate(offsets) if a < stop and b > start)
    ids, end = join_continuation(model, fact.prompt, prompt_ids, fact.attribute, join=fact.join)
    if not subject or subject[-1] >= end:
        raise RequestError(f"No tokens of the prompt '{fact.prompt}' are those of its subject '{fact.subject}' alone.")
    return _Row(ids, end, subject, tuple(_role(place, subject, end - 1) for place in range(subject[0], end)))


def _role(place: int, subject: Sequence[int], last: int) -> int:
    if place == subject[-1]:
        return LAST_SUBJECT
    if place < subject[-1]:
        return ROLES.index("first subject token" if place == subject[0] else "middle subject tokens")
    if place == last:
        return LAST
    return ROLES.index("first subsequent token" if place == subject[-1] + 1 else "further tokens")


def _average(model: LanguageModel, effects: Sequence[np.ndarray], rows: Sequence[_Row]) -> np.ndarray:
    """Effects averaged over the tokens of a role, then over facts: ``[roles, layers]``."""
    average = np.full((len(ROLES), model.layout.num_layers), np.nan)
    for role in range(len(ROLES)):
        means = [
            effect[np.array(row.roles) == role].mean(axis=0)
            for effect, row in zip(effects, rows, strict=True)
            if role in row.roles
        ]
        if means:
            average[role] = np.mean(means, axis=0)
    return average


@dataclass(frozen=True, slots=True)
class _Part:
    """Modules that are restored together."""

    first: int
    """The lowest block that they belong to."""
    modules: tuple[str, ...]


def _parts(model: LanguageModel, window: int) -> dict[str, list[_Part]]:
    """By kind, one part per layer."""
    layout, count = model.layout, model.layout.num_layers
    parts = {"hidden": [_Part(layer, (layout.blocks.format(layer),)) for layer in range(count)]}
    # Not the modules around the projections, because some of those (Bloom's) add the residual stream themselves.
    paths = {"mlp": layout.projection, "attention": attention_output(model.hf, layout)}
    for kind, path in paths.items():
        if path is not None:
            spans = (range(max(0, at - window // 2), min(count, at + (window + 1) // 2)) for at in range(count))
            parts[kind] = [_Part(span[0], tuple(path.format(layer) for layer in span)) for span in spans]
    return parts


@torch.inference_mode()
def _spread(model: LanguageModel, rows: Sequence[_Row]) -> float:
    """Standard deviation of all numbers in the embeddings of the subjects' tokens, as the model reads them."""
    embedding = model.hf.get_input_embeddings()
    ids = torch.tensor([row.ids[place] for row in rows for place in row.subject], device=model.device)
    return float(embedding(ids[None]).float().std())


@dataclass(frozen=True, slots=True)
class _Traced:
    effects: Mapping[str, np.ndarray]
    """By kind, ``[tokens, layers]``, for the tokens that have roles."""
    clean: float
    corrupted: float


class _Fact:
    """The runs of one statement."""

    def __init__(
        self, model: LanguageModel, row: _Row, *, spread: float, draws: int, generator: torch.Generator
    ) -> None:
        self.model, self.row, self.draws = model, row, draws
        self.ids = torch.tensor([row.ids[:-1]], device=model.device)  # [1, seq]
        width = model.hf.get_input_embeddings()(self.ids[:, :1]).shape[-1]
        noise = torch.randn(draws, len(row.subject), width, generator=generator)
        self.noise = (spread * noise).to(model.device)  # [draws, subject, d_model]
        self.clean_states: dict[str, Tensor] = {}
        self.entering: list[Tensor] = []
        self.returns_tuple = False

    @torch.inference_mode()
    def trace(self, parts: Mapping[str, Sequence[_Part]]) -> _Traced:
        """The effects of every part at every token that has a role."""
        names = sorted({module for of_kind in parts.values() for part in of_kind for module in part.modules})
        with self._keeping(names):
            clean = float(self._probabilities(1)[0])
        with self._keeping_entering(), self._corrupted(1):
            corrupted = self._probabilities(self.draws).mean()
        skip_lower = self._can_start_at_a_block()
        effects = {
            kind: torch.stack([self._restored(part, skip_lower=skip_lower) for part in of_kind], dim=1) - corrupted
            for kind, of_kind in parts.items()
        }
        return _Traced({kind: effect.numpy() for kind, effect in effects.items()}, clean, float(corrupted))

    def _probabilities(self, count: int) -> Tensor:
        """Probability of the attribute in each of ``count`` equal rows, ``[count]`` float64 on the CPU."""
        row = self.row
        targets = torch.tensor(row.ids[row.end :])
        places = torch.arange(row.end - 1, len(row.ids) - 1)
        logits = logits_at(
            self.model,
            self.ids.expand(count, -1),
            None,
            torch.arange(count).repeat_interleave(len(places)),
            places.repeat(count),
        )
        chosen = logits.double().log_softmax(-1).gather(1, targets.repeat(count)[:, None].to(logits.device))
        return chosen.reshape(count, len(places)).sum(1).exp().cpu()

    def _restored(self, part: _Part, *, skip_lower: bool) -> Tensor:
        """Mean probability over the draws with ``part`` restored at each token that has a role, ``[tokens]``."""
        tokens = list(range(self.row.subject[0], self.row.end))
        budget = PassBudget.forward(self.model)
        rows = budget.rows(self.ids.shape[1], scored=len(self.row.ids) - self.row.end)
        size = max(1, rows // self.draws)
        found = []
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            places = torch.tensor(chunk).repeat_interleave(self.draws)  # [rows]
            with self._from(part.first if skip_lower else 0, len(chunk)), self._restoring(part.modules, places):
                found.append(self._probabilities(len(places)).reshape(len(chunk), self.draws).mean(1))
        return torch.cat(found)

    def _can_start_at_a_block(self) -> bool:
        """Whether a corrupted run that starts at an upper block, from its stored input, ends like the whole run."""
        start = self.model.layout.num_layers // 2
        with self._corrupted(1):
            whole = self._probabilities(self.draws)
        try:
            with self._from(start, 1):
                part = self._probabilities(self.draws)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        return bool(torch.allclose(part, whole, rtol=1e-2, atol=1e-6))

    @contextmanager
    def _from(self, start: int, times: int) -> Iterator[None]:
        """A corrupted run, ``times`` rows per draw, that begins at block ``start``."""
        if start == 0:
            with self._corrupted(times):
                yield
            return
        hidden = self.entering[start].repeat(times, 1, 1)
        with skip_first_blocks(self.model, start, hidden, returns_tuple=self.returns_tuple):
            yield

    @contextmanager
    def _corrupted(self, times: int) -> Iterator[None]:
        def add(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            noisy = output.clone()
            noisy[:, list(self.row.subject)] += self.noise.repeat(times, 1, 1).to(noisy)
            return noisy

        with hooks() as handles:
            handles.append(self.model.hf.get_input_embeddings().register_forward_hook(add))
            yield

    @contextmanager
    def _keeping(self, names: Sequence[str]) -> Iterator[None]:
        """Inside the block, keep the outputs of the modules, ``[seq, width]`` by name."""
        length = self.ids.shape[1]

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                self.clean_states[name] = first_tensor(output).reshape(length, -1).clone()

            return hook

        with hooks() as handles:
            for name in names:
                handles.append(self.model.hf.get_submodule(name).register_forward_hook(keep(name)))
            yield

    @contextmanager
    def _keeping_entering(self) -> Iterator[None]:
        """Inside the block, keep the input of each transformer block, ``[draws, seq, d_model]``."""

        def on_entry(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.entering.append((args[0] if args else kwargs["hidden_states"]).clone())

        def on_exit(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self.returns_tuple = isinstance(output, tuple)

        with hooks() as handles:
            for layer in range(self.model.layout.num_layers):
                block = self.model.block(layer)
                handles.append(block.register_forward_pre_hook(on_entry, with_kwargs=True))
                handles.append(block.register_forward_hook(on_exit))
            yield

    @contextmanager
    def _restoring(self, names: Sequence[str], places: Tensor) -> Iterator[None]:
        """Inside the block, modules give their clean values at token ``places[i]`` of row i."""
        rows, length = torch.arange(len(places)), self.ids.shape[1]

        def restore(name: str) -> Any:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
                hidden = first_tensor(output)
                grid = hidden.reshape(len(rows), length, -1).clone()
                grid[rows, places] = self.clean_states[name][places].to(grid)
                return replace_first(output, grid.reshape(hidden.shape))

            return hook

        with hooks() as handles:
            for name in names:
                handles.append(self.model.hf.get_submodule(name).register_forward_hook(restore(name)))
            yield
