"""A causal language model with its tokenizer and its layout: what every part of editcore is handed.

Shapes: ``rows`` texts, ``seq`` their padded length, ``vocab`` the width of the logits.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from editcore._util.folders import new_folder
from editcore._util.memory import release
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RequestError, StorageError
from editcore.interfaces.progress import Progress, silent
from editcore.models.card import model_card
from editcore.models.catalogue import quiet_transformers
from editcore.models.fingerprint import fingerprint_of
from editcore.models.generating import Sampling, Writer, continued, padded
from editcore.models.layout import ModelLayout, detect_layout
from editcore.models.layout_check import check_layout
from editcore.models.loading import (
    DTYPES,
    device_of,
    dtype_of,
    load_config,
    load_tokenizer,
    load_weights,
    one_line,
    prepare_tokenizer,
    put_on,
    refuse_offloaded,
    refuse_without_float64,
    source_of,
    warn_of_slow,
)
from editcore.models.positions import position_limit
from editcore.models.prompt_form import PLAIN, PromptForm, chat_form
from editcore.models.saving import write_folder
from editcore.models.sources import HubModel, check_layer, hub_model, refuse_quantised
from editcore.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["Encoded", "LanguageModel"]

_log = logging.getLogger(__name__)


@documented
@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as tokens, padded on the right."""

    input_ids: Tensor
    """``[rows, seq]`` int64, on the model's device."""
    attention_mask: Tensor
    """``[rows, seq]`` int64, 1 at tokens and 0 at padding."""
    offsets: tuple[tuple[tuple[int, int], ...], ...]
    """Per row and token (padding left out): first character and the one after the last; special tokens have (0, 0)."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@documented
class LanguageModel:
    """A causal language model in evaluation mode, none of whose parameters asks for a gradient.

    Made by :meth:`load` or :meth:`wrap`.
    """

    hf: PreTrainedModel
    """The model itself, as transformers has it."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    layout: ModelLayout
    """Where its blocks and projections are."""
    name: str
    """A catalogue name, a folder or a hub id."""
    weights: Weights
    """Every parameter by address; what a change of it may look like."""
    hub: HubModel | None
    """The model on the hub by which everybody can find it; ``None`` where it is not known."""
    prompt_form: PromptForm
    """What stands around every prompt: nothing, until :meth:`use_chat_template`."""
    positions: int | None
    """The most tokens that it reads at once; ``None`` for any number."""

    def __init__(self, hf: Any, tokenizer: Any, layout: ModelLayout, *, name: str) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.layout = layout
        self.name = name
        self.prompt_form = PLAIN
        self._base_fingerprint: str | None = None
        self._base_config: Mapping[str, Any] = {}
        self.hub = None
        self.weights = Weights(hf, model_name=name)
        self.positions = position_limit(hf)
        self._rewriters: list[Callable[[str], str]] = []

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {type(self.hf).__name__}, {self.layout.num_layers} blocks)"

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        trust_remote_code: bool = False,
        chat_template: bool = False,
        families: Mapping[str, Mapping[str, str]] | None = None,
        progress: Progress = silent,
    ) -> LanguageModel:
        """A model by catalogue name (fetched on first use), folder, or hub id.

        Args:
            dtype: of the weights. One that this processor computes slowly in is told.
            device: a device of torch, or ``auto``: all accelerators, block by block, as the ``device_map`` of
                transformers spreads them.
            chat_template: see :meth:`use_chat_template`.
            families: as in :meth:`wrap`; ``Plugins.family_paths()`` has those that plugins announce.

        Raises:
            ModelError: it cannot be found or loaded, does not fit, or its structure is not one that can be edited.
        """
        torch_device, torch_dtype = None if device == "auto" else device_of(device), dtype_of(dtype)
        if torch_device is not None and torch_device.type == "cpu":
            warn_of_slow(torch_dtype, dtype)
        source = source_of(str(name_or_path), progress)
        config = load_config(source, str(name_or_path))
        refuse_quantised(config, str(name_or_path))
        tokenizer = load_tokenizer(source, str(name_or_path), trust_remote_code)
        form = chat_form(tokenizer, name=str(name_or_path)) if chat_template else PLAIN
        device_map = "auto" if torch_device is None else None
        hf = load_weights(
            source, str(name_or_path), torch_dtype, trust_remote_code=trust_remote_code, device_map=device_map
        )
        if torch_device is not None:
            hf = put_on(hf, torch_device, name=str(name_or_path))
        model = cls.wrap(hf, tokenizer, name=str(name_or_path), families=families)
        model.prompt_form = form
        model._base_config = config
        model.hub = hub_model(str(name_or_path), getattr(hf.config, "_commit_hash", None))
        release()  # what reading tokenizer and weights took
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
        """A model from objects in hand. ``hf`` is put into evaluation mode and its parameters are frozen.

        Args:
            families: by ``config.model_type``, module paths that win over what detection finds; see
                :class:`editcore.ModelFamilySpec`.
            check: hold the layout found against a forward pass; leave it on unless it has just been done.

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

    @property
    def device(self) -> torch.device:
        """Where the input embedding is, and so where token ids go; later blocks may be elsewhere (:meth:`place`)."""
        device: torch.device = self.hf.get_input_embeddings().weight.device
        return device

    @property
    def cache_argument(self) -> str:
        """The name of the key-value cache in the model's forward: ``cache``, in older versions ``past_key_values``."""
        return "cache" if "cache" in inspect.signature(self.hf.forward).parameters else "past_key_values"

    def place(self, layer: int) -> torch.device:
        """Where the edited projection of ``layer`` is, and so where its keys, its second moment and its solve are."""
        return self.weight(self.layout.weight_name(layer)).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first projection's weight."""
        return self.weight(self.layout.weight_name(0)).dtype

    @property
    def pad_id(self) -> int:
        """The id that fills rows; masked wherever it does."""
        return int(self.tokenizer.pad_token_id)

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
        """Refuse a block that is not there.

        Raises:
            HParamsError: ``layer`` is out of range; the message names ``setting``.
        """
        check_layer(layer, self.layout.num_layers, model=self.name, setting=setting)

    def weight(self, address: str) -> Tensor:
        """The parameter of that address, or the slice of it, as stored; see :mod:`editcore.models.weights`.

        Raises:
            ModelError: there is none, it is tied to another one, or it holds no floating-point numbers.
        """
        return self.weights.stored(address)

    def as_out_in(self, address: str, tensor: Tensor) -> Tensor:
        """``tensor``, shaped like the stored weight, as (out, in): a view, and its own inverse.

        Raises:
            ModelError: as :meth:`weight`.
        """
        return self.weights.as_out_in(address, tensor)

    @property
    def base_fingerprint(self) -> str:
        """:meth:`fingerprint` at the first look. Look once before editing; it does not change after that."""
        if self._base_fingerprint is None:
            self._base_fingerprint = self.fingerprint()
        return self._base_fingerprint

    def fingerprint(self) -> str:
        """SHA-256 over the architecture and every weight as it is now: name, type, shape and bytes."""
        return fingerprint_of(self.hf)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> Encoded:
        """``texts`` as tokens, padded on the right whatever side the tokenizer prefers.

        Args:
            add_special_tokens: those that the tokenizer puts in front (BOS). Those that it appends are left out.

        Raises:
            RequestError: the model has no embedding of a token.
        """
        if not texts:
            raise ValueError("encode needs at least one text")
        rows = [self._tokens(text, special_tokens=add_special_tokens) for text in texts]
        ids, mask = padded([row for row, _ in rows], self.pad_id, left=False)
        return Encoded(ids.to(self.device), mask.to(self.device), tuple(offsets for _, offsets in rows))

    def use_chat_template(self) -> None:
        """From now on a prompt is the user's turn of a chat, and what follows it the start of the assistant's answer.

        Raises:
            ModelError: the tokenizer has no chat template, or one that does not keep the user's text.
        """
        self.prompt_form = chat_form(self.tokenizer, name=self.name)

    def read_prompt(self, prompt: str, *, then: str = "") -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Ids of a prompt in its form, continued by ``then``, and each token's characters in that whole text
        (``prompt_form.wrap(prompt) + then``); special tokens have (0, 0). Those that the tokenizer puts in front (BOS)
        are there, those that it appends are not: text that is continued has not ended.

        Raises:
            RequestError: there are more tokens than :attr:`positions`, or the model has no embedding of one.
        """
        form = self.prompt_form
        ids, offsets = self._tokens(form.wrap(prompt) + then, special_tokens=form.special_tokens)
        if self.positions is not None and len(ids) > self.positions + bool(then):  # the last token of then is not read
            raise RequestError(
                f"{_shown(prompt)}{' with its target' if then else ''} has {len(ids)} tokens; {self.name} reads at "
                f"most {self.positions}. Shorten it or leave its record out."
            )
        return ids, offsets

    def read_text(self, text: str, *, opening: bool = False) -> tuple[int, ...]:
        """Ids of a text as it stands, whatever the form of prompts.

        Args:
            opening: with the special tokens that the tokenizer puts in front of a text.

        Raises:
            RequestError: the model has no embedding of a token.
        """
        return self._tokens(text, special_tokens=opening)[0]

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts in front of every text (BOS); often none."""
        return self._tokens("", special_tokens=True)[0]

    def room(self, prompt: str, *, then: str = "") -> float:
        """How many more tokens the model can read behind a prompt in its form, continued by ``then``: less than 0 if
        these are too long already, infinite where :attr:`positions` is ``None``."""
        if self.positions is None:
            return math.inf
        form = self.prompt_form
        return self.positions - len(self._tokens(form.wrap(prompt) + then, special_tokens=form.special_tokens)[0])

    def _tokens(self, text: str, *, special_tokens: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Ids and their characters: the one place where texts become tokens."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        if all(special):  # there is no text to tell those in front from those behind
            end = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"].index(0) if ids else 0
        else:
            end = max(place for place, is_special in enumerate(special) if not is_special) + 1
        offsets = tuple((int(first), int(last)) for first, last in encoded["offset_mapping"][:end])
        self._refuse_unembedded(text, ids[:end], offsets)
        return tuple(ids[:end]), offsets

    def _refuse_unembedded(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> None:
        rows = self.hf.get_input_embeddings().weight.shape[0]
        for token, (first, last) in zip(ids, offsets, strict=True):
            if token >= rows:
                around = text[max(0, first - _AROUND) : last + _AROUND]
                raise RequestError(
                    f"The token {self.tokenizer.convert_ids_to_tokens(token)!r} ({token}) in {_shown(around)} has no "
                    f"embedding in {self.name}, which embeds {rows} tokens. Write the text without it, or use a model "
                    "whose embeddings were extended for it."
                )

    @contextlib.contextmanager
    def rewriting(self, rewrite: Callable[[str], str]) -> Iterator[None]:
        """Inside the block, :meth:`asked` puts prompts through ``rewrite``, behind those that do already."""
        self._rewriters.append(rewrite)
        try:
            yield
        finally:
            self._rewriters.remove(rewrite)

    def asked(self, prompt: str) -> str:
        """What the model is asked instead of ``prompt`` where attachments rewrite prompts: in generation and in
        evaluation. Keys and targets are computed of prompts as they are."""
        for rewrite in self._rewriters:
            prompt = rewrite(prompt)
        return prompt

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 20,
        seed: int | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        raw: bool = False,
        enough: Callable[[int, str], bool] | None = None,
    ) -> list[str]:
        """The continuation of each prompt, without the prompt: greedy, or sampled if a seed is given.

        Where the model has so many :attr:`positions` and no more, a continuation ends at the last one, and a warning
        says so.

        Args:
            max_new_tokens: for all, or one number per prompt.
            raw: continue the texts as they are, whatever the form of prompts.
            seed: of a private generator; the same seed, prompts and weights give the same text on the CPU. Nothing
                global is seeded.
            top_k: sample among this many likeliest tokens; left out, among all.
            enough: whether the continuation of a prompt (its number, its text so far) needs no further token. Asked
                after every token of greedy text. What has been said stays as it is.

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

        def complete(index: int, new: Sequence[int]) -> bool:
            return enough is not None and enough(index, self._continuation(rows[index], new))

        new = self.generate_ids(
            rows,
            max_new_tokens=limits,
            seed=seed,
            top_k=top_k,
            temperature=temperature,
            enough=None if enough is None else complete,
        )
        return [self._continuation(row, ids) for row, ids in zip(rows, new, strict=True)]

    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        seed: int | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        stop_at_end: bool = True,
        enough: Callable[[int, Sequence[int]], bool] | None = None,
        advance: Callable[[int], None] = lambda _tokens: None,
    ) -> list[list[int]]:
        """:meth:`generate` on token ids. An empty row starts from the beginning-of-text token.

        Args:
            stop_at_end: end a row at an end token (left out of the answer); otherwise write on past it.
            enough: as in :meth:`generate`, on the ids written so far.
            advance: called after every step with the number of tokens just written.

        Raises:
            RequestError: a row is longer than the model's positions.
        """
        limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if min(limits, default=1) < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {min(limits)}")
        if top_k is not None and (seed is None or top_k < 1):
            raise ValueError(f"sampling needs a seed and top_k of at least 1, found seed={seed}, top_k={top_k}")
        sampling = None if seed is None else Sampling(torch.Generator().manual_seed(seed), top_k, temperature)
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        filled = [list(row) or [int(start)] for row in rows]
        limits = self._within_positions(filled, limits)
        writer = Writer(
            hf=self.hf, device=self.device, dtype=self.dtype, vocab_size=self.layout.vocab_size, pad_id=self.pad_id,
            end_ids=self.end_ids, cache_argument=self.cache_argument, positions=self.positions,
        )  # fmt: skip
        return continued(writer, filled, limits, sampling, stop_at_end=stop_at_end, enough=enough, advance=advance)

    def _within_positions(self, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> list[int]:
        """How many tokens to write behind each row, so that none of those that are read has no position."""
        if self.positions is None:
            return list(limits)
        for row in rows:
            if len(row) > self.positions:
                raise RequestError(
                    f"{_shown(self._decode(row))} has {len(row)} tokens; {self.name} reads at most {self.positions}. "
                    "Shorten it."
                )
        within = [min(limit, self.positions - len(row) + 1) for row, limit in zip(rows, limits, strict=True)]
        if cut := [most for most, limit in zip(within, limits, strict=True) if most < limit]:
            _log.warning(
                "%s reads at most %d tokens: %d of %d continuations end there, the first after %d new tokens",
                self.name, self.positions, len(cut), len(within), min(cut),
            )  # fmt: skip
        return within

    def _continuation(self, row: Sequence[int], new: Sequence[int]) -> str:
        """Decoded with its prompt, because some tokenizers drop the first space of what they decode alone."""
        before = self._decode(row)
        whole = self._decode([*row, *new])
        return whole[len(before) :] if whole.startswith(before) else self._decode(new)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @property
    def saved_dtype(self) -> torch.dtype:
        """The type that :meth:`save` should write: that of the weights in the folder it was loaded from, or its own if
        it cannot hold all of their values."""
        config = self._base_config
        nested = [value for value in config.values() if isinstance(value, Mapping)]
        names = [part.get("dtype") or part.get("torch_dtype") for part in (config, *nested)]
        stored = next((DTYPES[name] for name in names if isinstance(name, str) and name in DTYPES), self.dtype)
        return stored if torch.promote_types(stored, self.dtype) == self.dtype else self.dtype

    @contextlib.contextmanager
    def held_as(self, dtype: torch.dtype) -> Iterator[None]:
        """The weights in another type, inside the block only; the bits come back. What is written into a weight inside
        the block is rounded to that type at once.

        Where the folder that the model was loaded from has that type, weights that it does not hold without loss keep
        theirs: the folder had them in another type, too.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        weights = list(self.weights.parameters()) if dtype != self.dtype else []
        all_of_them = dtype != self.saved_dtype
        try:
            for weight in weights:
                rounded = weight.data.to(dtype)
                if all_of_them or torch.equal(rounded.to(weight.dtype), weight.data):
                    kept.append((weight, weight.data))
                    weight.data = rounded
            yield
        finally:
            for weight, bits in kept:
                weight.data = bits

    def save(self, directory: Path | str) -> None:
        """Write model and tokenizer as ``from_pretrained`` reads them, with a card: all of it or nothing.

        The folder is read by transformers 5, and by transformers 4 from 4.51 on.

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


_AROUND = 30
"""Characters shown before and after what a message is about."""
_SHOWN = 80
"""Characters of a text that a message shows."""


def _shown(text: str) -> str:
    """A text in a message: one line, and not all of a long one."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
