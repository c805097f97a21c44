"""Hyperparameters shared by all locate-then-edit methods, named as in published code. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from editcore.settings.hparams import HParams, Layer

__all__ = ["LocateThenEditHParams"]


_Length = Annotated[int, Field(ge=1, le=100)]


class LocateThenEditHParams(HParams):
    """Where a fact is written and how its value is found. Methods add their own fields."""

    left_to_code: ClassVar[Mapping[str, tuple[object, str]]] = {
        "kl_position": ("lookup", "the code that such files are for reads the essence term there")
    }

    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    """Blocks whose MLP output projection is rewritten, in ascending order; the value is optimised at the last one."""
    first_token_layers: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = (0,)
    """Blocks for the bare prompt of a fact whose lookup token is the first token of the text: a one-token subject at
    the beginning of the prompt, in a model without a beginning-of-text token. In later blocks the first token is an
    attention sink (arXiv 2309.17453), and edits there have no effect. Such a fact is written twice: its bare prompt in
    these blocks, its other contexts in ``layers``. With ``none``, or if ``layers`` do not begin above these blocks,
    such facts are written like all others. Not in the papers."""
    layer_selection: Literal["all", "random", "traced"] = "all"
    """``all`` edits every layer in ``layers``; ``random`` draws one of them per batch with the run's seed; ``traced``
    takes the one whose MLP has the greatest effect at the subject's last token in causal tracing (run ``editctl trace
    MODEL`` first)."""
    layer_rule: Literal["spread", "blue"] = "spread"
    """How ``layers`` share a fact. ``spread``: a value is optimised at the last one, and each layer takes an equal part
    of what is left of it (MEMIT, section 4.3). ``blue``: the first and the last layer alone; a value is optimised at
    each, with the layers below already changed, and is asked for in full (BLUE, arXiv 2502.03748)."""
    fact_token: Literal["subject_last", "subject_first", "subject_first_after_last", "last"] = "subject_last"
    """Token whose representation is rewritten. ROME, section 2: the subject's last. With ``last``, the last one of the
    prompt, and with ``target_window``, requests need no subject."""
    target_window: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a window. A longer target is cut into windows, each written at the token before it, the first at the
    last token of the prompt (ARE, AnyEdit; its code: 40 for Llama-3, 50 for Qwen2.5). Left out, every target is written
    whole. Departures: a target that fits a window is written at ``fact_token``; the keys of other tokens of the text
    are not protected."""
    shared_key_cosine: Annotated[float, Field(gt=0, le=1)] | None = 0.99
    """Cosine in C⁻¹ from which on the keys of two facts about one subject count as one. Such facts share a value, which
    is optimised for all of them. With ``none``, each is a constraint of its own, and those with one key contradict each
    other. Not in the papers."""
    context_templates: tuple[str, ...] | None = None
    """Contexts with ``{}`` for the prompt; the first must be ``"{}"``. Left out, they are sampled from the model."""
    context_count: Annotated[int, Field(ge=0, le=100)] = 5
    """Contexts to sample in addition to the bare prompt. MEMIT's reference code: 5."""
    context_length: _Length | Annotated[tuple[_Length, ...], Field(min_length=1)] = 10
    """Length of a sampled context, in tokens. If several lengths are given, contexts use them in turn. MEMIT's
    reference code: 10. ROME's: half of the contexts 5, half 10."""
    key_weighting: Literal["grouped", "mean", "prompt"] = "grouped"
    """Weights in the average of a fact's keys. ``grouped``: the bare prompt ½, all other contexts together ½ (MEMIT's
    code). ``mean``: all equal (ROME, eq. 3). ``prompt``: the bare prompt alone."""
    v_optimizer: Literal["adam", "log_odds"] = "adam"
    """How δ moves. ``adam``: as in the papers. ``log_odds``: along the gradient of m = log(p/(1 − p)), p = exp(−loss),
    as far as m needs to get half-way from ``v_stop_probability`` to 1 if it were linear, but at most
    ``v_longest_step``. Adam gives all components of a step about one size; a step along the gradient needs a shorter δ
    for the same probability, and so a smaller change of the weights. Not in the papers; DeepFool (arXiv 1511.04599)
    takes such steps in a classifier's input."""
    v_longest_step: Annotated[float, Field(gt=0)] = 0.3
    """Longest step of ``v_optimizer = "log_odds"``, in units of ‖h₀‖."""
    v_text_damping: Annotated[float, Field(gt=0)] | None = None
    """Damping d of steps that avoid what the text depends on: ``v_optimizer = "log_odds"`` then steps along
    (F + d·I)⁻¹∇m instead of ∇m, with F the second moment of the directions of the text's gradients at the projection's
    output, whose mean eigenvalue is 1 (:mod:`editcore.second_moments.output_gradients`). Without it, values share a few
    directions on which all text depends, such as one by which later tokens attend to a token, and hundreds of facts add
    up along them. Left out, steps go along ∇m; so do those of ``first_token_layers``. Not in the papers."""
    v_num_grad_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Evaluations of the value loss for a fact, and as many for each of several facts that share a value; one fewer
    steps are taken, unless ``v_final_step``. ROME, appendix E.5."""
    v_lr: Annotated[float, Field(gt=0)] = 0.5
    """Adam's learning rate for δ. ROME, appendix E.5."""
    v_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's β₁. Published methods use Adam's default, 0.9. A fact takes about ten steps; a smaller β₁ may need
    fewer."""
    v_contexts_per_step: Annotated[int, Field(ge=1)] | None = None
    """Contexts that a step of the value optimisation evaluates in addition to the bare prompt; steps take them in turn,
    with the weight of all. Left out, every step evaluates all. Fewer contexts make a step cheaper, and δ is nearly the
    same. Not in the papers."""
    v_weight_decay: Annotated[float, Field(ge=0)] = 0.5
    """Weight of ‖δ‖ / ‖h₀‖² (``clamp_norm``: which h₀). ROME, appendix E.5."""
    v_stop_loss: Annotated[float, Field(ge=0)] = 0.05
    """A fact is done when its total loss falls below this; 0 runs all steps. ROME's reference code: 0.05."""
    v_stop_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """A fact is done when its target's mean probability reaches this; left out, never. Not in the papers."""
    v_final_step: bool = False
    """Whether a fact that reaches ``v_stop_probability``, or has used all evaluations, takes one more step with the
    gradient of its last one, which is already computed. This allows a lower ``v_stop_probability`` and fewer
    evaluations. Not in the papers."""
    v_stop_most_probable: Annotated[int, Field(ge=0)] | None = None
    """A fact is done this many steps after its target was first the most probable continuation, token by token, behind
    every context; left out, never. MPES (arXiv 2502.01636), whose code takes 4 further steps for gpt2-xl, 3 for
    Llama-2, 2 for Llama-3. Departure: the bare prompt is one of the contexts here; that code asks the others alone."""
    v_context_factor: Annotated[float, Field(ge=0)] = 0.0
    """Weight λ of λ · Σ ‖h_a − h_b‖² / d_model in the loss, over pairs a < b of contexts and averaged over blocks above
    the edited one, with h the output of a block at the lookup token: the fact should not depend on its context (CoRE,
    arXiv 2505.23026). 0 leaves the term out."""
    v_context_layers: Annotated[int, Field(ge=1)] | None = None
    """How many blocks above the edited one ``v_context_factor`` compares; left out, all."""
    v_norm_anchor: bool = False
    """Whether a value v* = v₀ + δ is rescaled to the length μ that values have on the unedited model (``v_norms``); a
    fact with ‖v*‖ > 2μ gets no change. v₀ is the output of the edited projection at the lookup token of the bare
    prompt. Otherwise values and edited weights make each other longer in a long sequence of edits (NAS, the norm
    anchor)."""
    v_norms: tuple[tuple[Layer, Annotated[float, Field(gt=0)]], ...] = ()
    """Blocks, each with its μ for ``v_norm_anchor``, such as ``[[9, 12.5]]``: the mean of ‖v₀ + δ‖ over facts that are
    not edited, without the longest 5 %, on the unedited model. ``editctl onboard`` measures it. A value at another
    block, such as one of ``first_token_layers``, keeps its length."""
    clamp_norm_factor: Annotated[float, Field(gt=0)] = 4.0
    """Largest ‖δ‖ in units of ‖h₀‖. ROME's reference code: 4."""
    clamp_norm: Literal["output", "stream"] = "output"
    """What h₀ is in ``clamp_norm_factor`` and ``v_weight_decay``: the ``output`` of the edited projection at the lookup
    token of the bare prompt (ROME's reference code), or the residual ``stream`` that leaves its block there (MEMIT's
    and EMMET's), which is several times longer. With ``stream``, ‖δ‖ means the length of what δ adds to the stream."""
    kl_factor: Annotated[float, Field(ge=0)] = 0.0625
    """Weight of the KL term of the essence prompt, "{subject} is a". ROME, appendix E.5."""
    kl_position: Literal["last", "lookup"] = "last"
    """Position of the next-token distribution in the KL term: at the end of "{subject} is a" (ROME, eq. 4), or at the
    lookup token (the reference code)."""
    chat_answer: Literal["whole", "beginning"] = "whole"
    """With a chat template: whether the target is the whole answer. ``whole``: the token that ends the turn is
    optimised too, and the KL term uses the position where an answer begins, whatever ``kl_position`` says.
    ``beginning``: the target is the first words of the answer, as in plain text; the model continues after it, and
    repeats itself more often. Not in the papers."""
    compute_dtype: Literal["model", "bfloat16"] = "model"
    """Type of the value optimisation's matrix products; δ, the loss and Adam stay in float32. bfloat16 is
    faster only on processors with instructions for it; it changes δ by about 1 %."""
    mom2_adjustment: bool = True
    """Measure the change on ordinary text by the second moment C of the model's keys. False uses C = I, which needs no
    text; several published settings of ROME do this."""
    mom2_update_weight: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Weight w of the second moment in C' = w·C + update_norm_lambda·I. Without a ridge term λ its scale cancels.
    ``auto`` chooses w so that the batch's median key reaches ``mom2_auto_fraction`` of its residual."""
    mom2_auto_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """Fraction of its residual that the median fact, edited alone, reaches with ``mom2_update_weight = "auto"``:
    q/(q + λw)."""
    update_norm_lambda: Annotated[float, Field(ge=0)] = 0.0
    """Weight of ‖ΔW‖² in the objective. EMMET's reference code: 0. ENCORE (arXiv 2502.01636): 10 for gpt2-xl and
    Llama-2, 20 for Llama-3, with ``memory = "keys"``."""
    memory: Literal["none", "keys"] = "none"
    """What a batch knows of earlier ones. ``keys``: the key k of every fact that is written and not undone adds
    ‖Δk‖² to the objective, with the weight that a fact of the batch has (with λ = 0: weight 1 beside w·C). With a ridge
    term the batches of a run then give the change that one batch of all their facts would, for the same keys and values
    (MEMIT_seq, arXiv 2605.26670). ``mom2_update_weight = "auto"`` keeps the number of the first batch."""
    tikhonov: Annotated[float, Field(ge=0)] = 0.0
    """Tikhonov term τ of the edit system in units of each fact's own entry, q = kᵀC'⁻¹k: a fact alone gets 1/(1 + τ/w)
    of its residual, and the condition number stays below 1 + n/τ for n facts. For batches whose keys are nearly
    dependent; 1e-6 has almost no other effect. Not in the papers."""
    solve_rounds: Annotated[int, Field(ge=1, le=100)] = 1
    """How often a batch is solved at most. A fact whose target is not the most probable continuation of its bare
    prompt after a solve, token by token, is optimised again on the changed model. The batch is then solved anew, with
    the sum of both δ as what the fact asks for. Facts in windows are not asked. Not in the papers."""
    warn_condition: Annotated[float, Field(gt=1)] = 1e8
    """Condition number of the edit system above which a batch is reported. The relative error of a solve in float64
    is about 1e-16 times this number; at 1e8 it approaches the rounding of float32 weights."""

    calculate_objective_value: bool = False
    """Put the objective's three distances (preservation, new edits, old edits) into the diagnostics of each batch."""

    @model_validator(mode="after")
    def _check(self) -> LocateThenEditHParams:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend without repeats, found {list(self.layers)}")
        if self.layer_rule == "blue" and (len(self.layers) < 2 or self.layer_selection != "all"):
            raise ValueError(
                'layer_rule = "blue" writes the first and the last of at least two layers, with layer_selection = '
                f'"all"; found layers {list(self.layers)} and "{self.layer_selection}"'
            )
        first = self.first_token_layers
        if first is not None and list(first) != sorted(set(first)):
            raise ValueError(f"first_token_layers must ascend without repeats, found {list(first)}")
        without = [str(layer) for layer in self.value_layers if layer not in dict(self.v_norms)]
        if self.v_norm_anchor and without:
            raise ValueError(
                "v_norm_anchor rescales values to their length in v_norms, which has none for block "
                f"{', '.join(without)}. editctl onboard MODEL measures it for the layers of its preset"
            )
        if self.v_optimizer == "log_odds" and self.v_stop_probability is None:
            raise ValueError('v_optimizer = "log_odds" needs a v_stop_probability to aim at, such as 0.85')
        if self.v_text_damping is not None and self.v_optimizer != "log_odds":
            raise ValueError(
                f'v_text_damping changes the steps of v_optimizer = "log_odds", but v_optimizer is "{self.v_optimizer}"'
            )
        templates = self.context_templates
        if self.v_context_factor and (self.context_count == 0 if templates is None else len(templates) == 1):
            raise ValueError("v_context_factor compares contexts, but there is only the bare prompt (context_count)")
        if templates is not None:
            if not templates or templates[0] != "{}":
                raise ValueError('the first of context_templates must be the bare prompt, "{}"')
            bad = [template for template in templates if template.count("{}") != 1]
            if bad:
                raise ValueError(f"a context template needs {{}} exactly once, found {bad[0]!r}")
        return self

    @property
    def needs_subject(self) -> bool | None:
        """False if requests are looked up at the last token of their prompt, or may be cut into windows. A request
        without a subject is then looked up there."""
        return False if self.fact_token == "last" or self.target_window is not None else None

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The ones of ``layers`` at which a value may be optimised."""
        if self.layer_rule == "blue":
            return self.layers[0], self.layers[-1]
        return self.layers[-1:] if self.layer_selection == "all" else self.layers
