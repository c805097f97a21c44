"""The weights that are edited, by their address in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from editcore import HParamsError, LanguageModel, ModelError

__all__ = ["addresses_of"]


def addresses_of(model: LanguageModel, weights: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """The addresses of the weights that are named as in :attr:`UltraHParams.weights`.

    Raises:
        HParamsError: a block or a module does not exist, or is not linear.
    """
    return list(dict.fromkeys(_addresses(model, weights)))


def _addresses(model: LanguageModel, weights: Sequence[tuple[str, Sequence[int]]]) -> Iterator[str]:
    for module, blocks in weights:
        for block in blocks:
            model.check_layer(block, setting="ultra: weights")
            address = f"{model.layout.blocks.format(block)}.{module}.weight"
            try:
                dimensions = model.weight(address).ndim
            except ModelError as error:
                raise HParamsError(f"ultra: weights has '{module}'. {error}") from error
            if dimensions != 2:
                raise HParamsError(
                    f"ultra: weights has '{module}', which is not linear in {model.name}. Name a linear module, such "
                    f"as '{model.layout.projection.partition('{}.')[2]}'."
                )
            yield address
