"""A causal language model with its tokenizer and its layout: what every part of editcore is handed."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from editcore._util.folders import new_folder
from editcore._util.memory import release
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError, StorageError
from editcore.interfaces.progress import Progress, silent
from editcore.models.answers import AnswerStore, continued
from editcore.models.card import model_card
from editcore.models.encoding import continuation_text, decoded, shortened
from editcore.models.fingerprint import fingerprint_of
from editcore.models.generating import StopRule, Writer, continue_rows
from editcore.models.layout import ModelLayout, detect_layout
from editcore.models.layout_check import check_layout
from editcore.models.loading import (
    device_of,
    dtype_of,
    is_slow,
    load_config,
    load_tokenizer,
    load_weights,
    one_line,
    prepare_tokenizer,
    put_on,
    refuse_offloaded,
    refuse_without_float64,
    source_of,
    stored_dtype,
)
from editcore.models.options import LoadOptions, Sampling
from editcore.models.progress_bars import quiet_transformers
from editcore.models.prompt_form import PLAIN, chat_form
from editcore.models.prompt_reading import PromptReader
from editcore.models.saving import write_folder
from editcore.models.sources import HubModel, check_layer, hub_model, refuse_quantised
from editcore.models.verdicts import kept_verdict
from editcore.models.weights import Weights

__all__ = ["LanguageModel"]

_log = logging.getLogger(__name__)


@documented
class LanguageModel(PromptReader):
    """A causal language model in evaluation mode, with its parameters frozen (no ``requires_grad``).

    Made by :meth:`load` or :meth:`wrap`.

    >>> LanguageModel.load("smollm2-135m").generate(["The capital of France is"], max_new_tokens=1)  # doctest: +SKIP
    [' Paris']
    """

    layout: ModelLayout
    """The paths of its blocks and projections, and their widths."""
    weights: Weights
    """Its parameters, by address."""
    hub: HubModel | None
    """The model on the hub that it was loaded or made from; ``None`` where that is not known."""
    answers: AnswerStore | None
    """Where its answers are kept inside a block of :meth:`remembering`; ``None`` outside."""

    def __init__(self, hf: Any, tokenizer: Any, layout: ModelLayout, *, name: str) -> None:
        super().__init__(hf, tokenizer, name=name)
        self.layout = layout
        self._base_fingerprint: str | None = None
        self._base_config: Mapping[str, Any] = {}
        self.hub = None
        self.weights = Weights(hf, model_name=name)
        self.answers = None

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {type(self.hf).__name__}, {self.layout.num_layers} blocks)"

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        options: LoadOptions | None = None,
        *,
        families: Mapping[str, Mapping[str, str]] | None = None,
        progress: Progress = silent,
    ) -> LanguageModel:
        """Load a model by its catalogue name (fetched on first use), folder or hub id.

        Args:
            options: device, type of the weights and more; left out, float32 on the CPU.
            families: as in :meth:`wrap`; ``Plugins.family_paths()`` has those that plugins announce.

        Raises:
            ModelError: it cannot be found or loaded, does not fit, or its structure is not one that can be edited.
        """
        options, name = options or LoadOptions(), str(name_or_path)
        device = None if options.device == "auto" else device_of(options.device)
        dtype = dtype_of(options.dtype)
        slow = False
        if device is not None and device.type == "cpu":
            slow = is_slow(dtype, options.dtype)
        source = source_of(name, progress)
        config = load_config(source, name)
        refuse_quantised(config, name)
        tokenizer = load_tokenizer(source, name, trust_remote_code=options.trust_remote_code)
        form = chat_form(tokenizer, name=name) if options.chat_template else PLAIN
        hf = load_weights(
            source,
            name,
            dtype,
            trust_remote_code=options.trust_remote_code,
            device_map="auto" if device is None else None,
        )
        if device is not None:
            hf = put_on(hf, device, name=name)
        model = cls.wrap(hf, tokenizer, name=name, families=families, check=False)
        if slow:
            model.compute_in_float32()
        model._check_layout_once(own_code=options.trust_remote_code)
        model.prompt_form = form
        model._base_config = config
        model.hub = hub_model(name, getattr(hf.config, "_commit_hash", None))
        release()  # memory that reading tokenizer and weights took
        return model

    @classmethod
    def wrap(
        cls,
        hf: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        families: Mapping[str, Mapping[str, str]] | None = None,
        check: bool = True,
    ) -> LanguageModel:
        """Make a language model of a loaded one. ``hf`` is put into evaluation mode and its parameters are frozen.

        Args:
            families: by ``config.model_type``, module paths that replace what detection finds; see
                :class:`editcore.ModelFamilySpec`.
            check: check the layout by a forward pass. Leave it on, unless it has just been done.

        Raises:
            ModelError: the tokenizer has no character offsets, weights are offloaded, or the structure is not one that
                can be edited.
        """
        refuse_offloaded(hf, name)
        refuse_without_float64({parameter.device for parameter in hf.parameters()})
        hf = hf.eval().requires_grad_(False)
        prepare_tokenizer(tokenizer, hf, name)
        layout = detect_layout(hf, overrides=(families or {}).get(hf.config.model_type, {}))
        if check:
            check_layout(hf, layout)
        return cls(hf, tokenizer, layout, name=name)

    def _check_layout_once(self, *, own_code: bool) -> None:
        """Check the layout, unless a model of the same weights, configuration and code has passed the check before.

        Args:
            own_code: the model's code comes with its files, and has no version.

        Raises:
            ModelError: as :func:`check_layout`.
        """

        def passes() -> bool:
            check_layout(self.hf, self.layout)
            return True

        if own_code:
            passes()
        else:
            kept_verdict(self, f"{self.layout} of {self.hf.config.to_json_string()}", passes)

    @property
    def cache_argument(self) -> str:
        """The name of the key-value cache in the model's forward: ``cache``, in older versions ``past_key_values``."""
        return "cache" if "cache" in inspect.signature(self.hf.forward).parameters else "past_key_values"

    def place(self, layer: int) -> torch.device:
        """The device of the edited projection of ``layer``, of its keys, its second moment and its solve."""
        return self.weight(self.layout.weight_name(layer)).device

    @property
    def dtype(self) -> torch.dtype:
        """The type whose numbers the weights have, as the first projection shows it."""
        return self.weights.type_of(self.layout.weight_name(0))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the model computes in: that of the first projection's tensor. It is not :attr:`dtype` after
        :meth:`compute_in_float32`."""
        return self.weight(self.layout.weight_name(0)).dtype

    def compute_in_float32(self) -> None:
        """Compute in float32 with weights of a smaller type: what is written into them is rounded to that type, and
        :meth:`save` writes it. The tensors take the memory of float32."""
        _ = self.base_fingerprint  # of the weights in their own type
        self.weights.widen()
        for buffer in self.hf.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(torch.promote_types(buffer.dtype, torch.float32))

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        found = getattr(self.hf.generation_config, "eos_token_id", None)
        ids = found if isinstance(found, list) else [found]
        return frozenset(int(i) for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def block(self, layer: int) -> nn.Module:
        """The decoder block of ``layer``."""
        block: nn.Module = self.hf.get_submodule(self.layout.blocks.format(layer))
        return block

    def projection(self, layer: int) -> nn.Module:
        """The MLP output projection of ``layer``."""
        projection: nn.Module = self.hf.get_submodule(self.layout.projection.format(layer))
        return projection

    def check_layer(self, layer: int, *, setting: str = "layers") -> None:
        """Refuse a layer that the model does not have.

        Args:
            setting: what asks for it; the message begins with it.

        Raises:
            HParamsError: ``layer`` is out of range.
        """
        check_layer(layer, self.layout.num_layers, model=self.name, setting=setting)

    def weight(self, address: str) -> Tensor:
        """The parameter at an address, or a slice of it, as it is stored; see :mod:`editcore.models.weights`.

        Raises:
            ModelError: there is none, it is tied to another one, or it holds no floating-point numbers.
        """
        return self.weights.stored(address)

    def as_out_in(self, address: str, tensor: Tensor) -> Tensor:
        """``tensor``, which has the shape of the stored weight, as (out, in), or back: a view.

        Raises:
            ModelError: as :meth:`weight`.
        """
        return self.weights.as_out_in(address, tensor)

    @property
    def base_fingerprint(self) -> str:
        """The :meth:`fingerprint` of the unedited model. Ask for it before the first edit; then it stays the same."""
        if self._base_fingerprint is None:
            self._base_fingerprint = self.fingerprint()
        return self._base_fingerprint

    def fingerprint(self) -> str:
        """SHA-256 over the architecture and every weight as it is now: name, type, shape and bytes."""
        return fingerprint_of(self.hf)

    @contextlib.contextmanager
    def remembering(self, answers: AnswerStore | None) -> Iterator[None]:
        """Inside the block, greedy text and scores are taken from a store, and those that it lacks are kept there.

        Args:
            answers: of this model in the state that it has throughout the block; ``None`` keeps nothing.
        """
        before, self.answers = self.answers, answers
        try:
            yield
        finally:
            self.answers = before

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 20,
        sampling: Sampling | None = None,
        raw: bool = False,
        enough: Callable[[int, str], bool] | None = None,
    ) -> list[str]:
        """The continuation of each prompt, without the prompt.

        A continuation ends at an end token, after ``max_new_tokens``, or at the last of the model's :attr:`positions`,
        with a warning.

        Args:
            max_new_tokens: for all, or one number per prompt.
            sampling: how to draw tokens; left out, the likeliest is taken.
            raw: continue the texts as they are, whatever the form of prompts.
            enough: whether the continuation of a prompt (its index, its text so far) needs no further token. Asked
                after every token where none is drawn. The continuation keeps what is written already.

        Raises:
            RequestError: a prompt is longer than the model's positions, or the model has no embedding of a token.
        """
        if not prompts:
            return []
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if raw:
            rows = [list(self.read_text(prompt, opening=True)) for prompt in prompts]
        else:
            rows = [list(self.read_prompt(self.asked(prompt))[0]) for prompt in prompts]

        def enough_ids(index: int, new: Sequence[int]) -> bool:
            return enough is not None and enough(index, continuation_text(self.tokenizer, rows[index], new))

        new = self.generate_ids(
            rows, max_new_tokens=limits, sampling=sampling, enough=None if enough is None else enough_ids
        )
        return [continuation_text(self.tokenizer, row, ids) for row, ids in zip(rows, new, strict=True)]

    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | None = None,
        stop_at_end: bool = True,
        enough: Callable[[int, Sequence[int]], bool] | None = None,
        advance: Callable[[int], None] = lambda _tokens: None,
    ) -> list[list[int]]:
        """:meth:`generate` on token ids. An empty row starts from the beginning-of-text token.

        Args:
            stop_at_end: end a row at an end token, which is left out of it; otherwise write on past it.
            enough: as in :meth:`generate`, with the ids written so far.
            advance: called after every step with the number of tokens just written.

        Raises:
            RequestError: a row is longer than the model's positions.
        """
        limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if min(limits, default=1) < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {min(limits)}")
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        filled = [list(row) or [int(start)] for row in rows]
        stop = StopRule(limits=self._within_positions(filled, limits), at_end_token=stop_at_end, enough=enough)
        writer = Writer(
            hf=self.hf, device=self.device, dtype=self.compute_dtype, vocab_size=self.layout.vocab_size,
            pad_id=self.pad_id, end_ids=self.end_ids, cache_argument=self.cache_argument, positions=self.positions,
        )  # fmt: skip
        if self.answers is not None and sampling is None and stop_at_end:
            return continued(self.answers, filled, stop, lambda rows, stop: continue_rows(
                writer, rows, stop=stop, sampling=None, advance=advance
            ))  # fmt: skip
        return continue_rows(writer, filled, stop=stop, sampling=sampling, advance=advance)

    def _within_positions(self, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> list[int]:
        """The most new tokens of each row, cut so that every token that is read has a position."""
        if self.positions is None:
            return list(limits)
        for row in rows:
            if len(row) > self.positions:
                raise RequestError(
                    f"{shortened(decoded(self.tokenizer, row))} has {len(row)} tokens; {self.name} reads at most "
                    f"{self.positions}. Shorten it."
                )
        within = [min(limit, self.positions - len(row) + 1) for row, limit in zip(rows, limits, strict=True)]
        if cut := [most for most, limit in zip(within, limits, strict=True) if most < limit]:
            _log.warning(
                "%s reads at most %d tokens: %d of %d continuations end there, the first after %d new tokens",
                self.name, self.positions, len(cut), len(within), min(cut),
            )  # fmt: skip
        return within

    @property
    def saved_dtype(self) -> torch.dtype:
        """The type that :meth:`save` should write: as in the folder that the model was loaded from.

        It is the model's own type where that cannot hold every number of the folder's type, or where the folder's type
        is not known.
        """
        stored = stored_dtype(self._base_config) or self.dtype
        return stored if torch.promote_types(stored, self.dtype) == self.dtype else self.dtype

    @contextlib.contextmanager
    def held_as(self, dtype: torch.dtype) -> Iterator[None]:
        """The weights in another type, inside the block only; afterwards they have their old bits.

        Numbers that are written inside the block are rounded to that type. If it is :attr:`saved_dtype`, weights that
        would lose digits keep their own type: the folder has them in another type, too.
        """
        if dtype == self.dtype == self.compute_dtype:
            yield
            return
        with self.weights.held_as(dtype, only_lossless=dtype == self.saved_dtype):
            yield

    def save(self, directory: Path | str) -> None:
        """Write model, tokenizer and a card into a folder for ``from_pretrained``: all of it or nothing.

        transformers 5 reads the folder, and transformers 4 from 4.51 on.

        Raises:
            StorageError: the folder is there already, or cannot be written.
        """
        directory = Path(directory)
        with new_folder(directory) as folder:
            try:
                with quiet_transformers():
                    write_folder(self.hf, self.tokenizer, folder, base_config=self._base_config)
            except SafetensorError as error:  # how a full disk shows
                raise StorageError(f"{self.name} cannot be saved to {directory}: {one_line(error)}") from error
            card = model_card(
                directory.name, base=self.name, hub=self.hub, fingerprint=self._base_fingerprint, dtype=self.dtype
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
