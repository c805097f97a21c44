"""What ``editctl onboard`` tries for ``ultra``."""

from __future__ import annotations

import pytest
from edit_ultra.addresses import addresses_of
from edit_ultra.search import mlp_inputs, search, spans
from editcore.testing import tiny_model


def test_ranges_are_a_third_of_the_depth_in_its_upper_part() -> None:
    assert spans(30) == [tuple(range(9, 18)), tuple(range(13, 22)), tuple(range(18, 27))]
    assert spans(3) == [(1,), (2,)]
    assert spans(1) == [(0,)]


@pytest.mark.parametrize(
    ("family", "inputs"),
    [("llama", ["mlp.gate_proj", "mlp.up_proj"]), ("gpt2", ["mlp.c_fc"]), ("opt", [])],
)
def test_each_round_goes_on_with_the_best_settings(family: str, inputs: list[str]) -> None:
    """The step first, then the blocks, then the modules that read the stream."""
    model = tiny_model(family)
    output = model.layout.projection.partition("{}.")[2]
    steps = search(model, (0,))
    rates = next(steps)
    assert {settings["learning_rate"] for settings in rates} == {1e-6, 1e-5, 1e-4, 1e-3}
    assert all(settings["weights"] == ((output, (2,)),) for settings in rates)
    found = rates[2]
    blocks = steps.send(found)
    assert [settings["weights"] for settings in blocks] == [((output, (1,)),), ((output, (2,)),)]
    assert all({**settings, "weights": None} == {**found, "weights": None} for settings in blocks)
    assert mlp_inputs(model, 1) == inputs
    if not inputs:
        with pytest.raises(StopIteration):
            steps.send(blocks[0])
        return
    [modules] = steps.send(blocks[0])
    assert modules == {**found, "weights": tuple((name, (1,)) for name in inputs)}
    assert len(addresses_of(model, modules["weights"])) == len(inputs)
    with pytest.raises(StopIteration):
        steps.send(modules)
