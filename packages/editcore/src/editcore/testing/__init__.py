"""Helpers for the tests of this repository and of plugins: tiny models that are made in milliseconds, facts for them,
and contract suites. A contract suite tests what every editor (with its presets), backend, extension, evaluator, data
set, executor or kind of attachment has to keep.

A plugin's conformance test is a subclass with two fixtures::

    class TestRomeContract(EditorContract):
        @pytest.fixture
        def editor_name(self) -> str:
            return "rome"

        @pytest.fixture
        def hparams(self) -> dict[str, object]:
            return {"layer": 1, "kl_weight": 0.0}

A standard test can be switched off only by overriding it with ``@pytest.mark.xfail(reason=..., strict=True)``. This
shows in every report, and fails as soon as the test passes. Any other override is refused when the class is made.

Models are random and tiny, so the suites say nothing about how well a method edits.
"""

import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

if (pytest := sys.modules.get("pytest")) is not None:  # so that failing assertions of the suites show their values
    pytest.register_assert_rewrite(
        *(
            f"{__name__}.{suite}"
            for suite in (
                "contract", "attachments", "backends", "datasets", "editors", "evaluators", "executors", "extensions"
            )
        )
    )  # fmt: skip
