"""What ``editctl onboard`` tries for ``ft``."""

from __future__ import annotations

import pytest
from edit_ft.search import search
from editcore.testing import tiny_model


def test_the_layers_come_first_then_the_rate_at_the_best_one() -> None:
    steps = search(tiny_model(), (0, 2))
    assert next(steps) == [{"layer": 0}, {"layer": 2}]
    assert steps.send({"layer": 2}) == [{"layer": 2, "learning_rate": 2e-4}, {"layer": 2, "learning_rate": 2e-3}]
    with pytest.raises(StopIteration):
        steps.send({"layer": 2})
