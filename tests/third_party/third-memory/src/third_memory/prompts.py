"""The prompts and targets of a batch, as the block sees them.

Shapes: ``n`` requests, ``d_model`` the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from editcore import EditBatch, LanguageModel
from editcore.models import first_tensor, hooks, join_continuation, logits_at, pad_rows, stop_after
from torch import Tensor, nn

from third_memory.attachment import entering, with_hidden

__all__ = ["Prompts"]


class Prompts:
    """The prompts and targets of a batch, and the token of each prompt where the fact is written: its last one."""

    def __init__(self, model: LanguageModel, batch: EditBatch, layer: int) -> None:
        self.model, self.layer, self.block = model, layer, model.block(layer)
        texts = [(request.text, request.target_new) for request in batch.requests]
        joined = [join_continuation(model, text, model.read_prompt(text)[0], target) for text, target in texts]
        self.ids, self.mask = pad_rows([ids[:-1] for ids, _ in joined], model.pad_id, device=model.device)
        self.lasts = torch.tensor([start - 1 for _, start in joined])
        self.lengths = [len(ids) - start for ids, start in joined]
        self.wanted = torch.tensor(
            [(row, at - 1, ids[at]) for row, (ids, start) in enumerate(joined) for at in range(start, len(ids))],
            device=model.device,
        ).T

    @torch.no_grad()
    def look(self) -> tuple[Tensor, Tensor]:
        """What enters the block at the last tokens, and what leaves it, both ``[n, d_model]``."""
        seen: list[Tensor] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            seen.extend(
                part[range(len(part)), self.lasts].float() for part in (entering(args, kwargs), first_tensor(output))
            )

        with hooks() as handles:
            handles.append(self.block.register_forward_hook(hook, with_kwargs=True))
            with stop_after(self.model, self.layer):
                self.model.hf(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
        return seen[0], seen[1]

    def losses(self, added: Tensor) -> Tensor:
        """Mean −log p of each target with ``added [n, d_model]`` at the last tokens, ``[n]``, differentiable."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            hidden = first_tensor(output)
            where = (torch.arange(len(hidden), device=hidden.device), self.lasts.to(hidden.device))
            return with_hidden(output, hidden.index_put(where, added.to(hidden), accumulate=True))

        with hooks() as handles:
            handles.append(self.block.register_forward_hook(hook))
            logits = logits_at(self.model, self.ids, self.mask, self.wanted[0], self.wanted[1]).float()
        each = torch.nn.functional.cross_entropy(logits, self.wanted[2].to(logits.device), reduction="none")
        return torch.stack([part.mean() for part in torch.split(each, self.lengths)])
