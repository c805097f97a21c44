"""For tests, of this repository and of plugins: tiny models made in milliseconds, facts for them, and the contract
suites that every editor, its presets, every backend and every executor have to pass."""

import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

if (pytest := sys.modules.get("pytest")) is not None:  # failing assertions of the suites then show their values
    pytest.register_assert_rewrite("editcore.testing.contracts")
