"""Plugins are found, asked one by one, and a bad one harms nobody else."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore.evaluation import COUNTERFACT, GENERATION
from editcore.interfaces.changes import DenseDelta
from editcore.interfaces.errors import HParamsError, PluginError, UnknownNameError
from editcore.interfaces.events import AfterEvaluation, AfterSolve, BatchAddition, BeforeApply, Rework
from editcore.interfaces.hookspecs import RegistrationHooks, hookimpl
from editcore.interfaces.values import Verdict
from editcore.plugins.calls import resolve
from editcore.plugins.extensions import lifecycle
from editcore.plugins.installed import PluginInfo
from editcore.plugins.kinds import REGISTRATION_HOOKS
from editcore.plugins.registry import Offer, Plugins

Install = Callable[..., None]
Load = Callable[..., Plugins]

IMPORTS = """
from editcore import BackendSpec, CommandSpec, ComponentSpec, EditorSpec, EvaluatorSpec, MetricSpec, hookimpl

def editor(name):
    return EditorSpec(name, target=f"{__name__}:Editor", hparams=f"{__name__}:HParams", summary="A method.")

"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, into which distributions are installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one entry point and a module of the given source."""

    def _install(entry: str, body: str, *, distribution: str | None = None, requires: Sequence[str] = ()) -> None:
        distribution = distribution or f"edit-{entry}"
        module = distribution.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)  # a real package of that name may be loaded
        (site / f"{module}.py").write_text(IMPORTS + textwrap.dedent(body), encoding="utf-8")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        needed = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{needed}", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[editcore]\n{entry} = {module}\n", encoding="utf-8")

    return _install


@pytest.fixture
def load(site: Path) -> Load:
    """Loads the plugins of ``site`` alone, through real distribution metadata."""

    def _load(**options: Any) -> Plugins:
        found = importlib.metadata.distributions(path=[str(site)])
        entries = [entry for distribution in found for entry in distribution.entry_points]
        return Plugins.load(entry_points=entries, **options)

    return _load


def announces(name: str) -> str:
    return f"@hookimpl\ndef editcore_editors(event): return [editor({name!r})]\n"


def info(plugins: Plugins, name: str) -> PluginInfo:
    return next(row for row in plugins.listing() if row.name == name)


def test_builtin_plugin_is_installed_and_active() -> None:
    plugins = Plugins.load()
    assert info(plugins, "builtin").status == "active"
    assert plugins.backend("raw").target == "editcore.runs.backends:RawBackend"
    assert plugins.evaluator("counterfact") == COUNTERFACT
    assert plugins.evaluator("generation") == GENERATION
    assert "worldfacts" in plugins.datasets()


def test_the_facade_knows_every_registration_hook() -> None:
    specified = {name for name in vars(RegistrationHooks) if name.startswith("editcore_")}
    assert set(REGISTRATION_HOOKS) == specified


def test_announced_specs_are_found_by_name(install: Install, load: Load) -> None:
    install("rome", announces("rome"))
    plugins = load()
    assert list(plugins.editors()) == ["rome"]
    assert plugins.editor("rome").target == "edit_rome:Editor"
    assert info(plugins, "rome") == PluginInfo(
        name="rome",
        distribution="edit-rome",
        version="1.0",
        status="active",
        reason="",
        offers={"editcore_editors": ("rome",)},
    )


def test_an_implementation_may_leave_the_event_out(install: Install, load: Load) -> None:
    install("rome", announces("rome").replace("(event)", "()"))
    assert list(load().editors()) == ["rome"]


def test_each_hook_is_called_once_and_only_when_its_kind_is_asked_for(install: Install, load: Load) -> None:
    install(
        "rome",
        """
        calls = []

        @hookimpl
        def editcore_editors():
            calls.append("editors")
            return [editor("rome")]

        @hookimpl
        def editcore_backends():
            calls.append("backends")
            return []
        """,
    )
    plugins = load()
    calls = sys.modules["edit_rome"].calls
    assert calls == []
    plugins.editor("rome")
    plugins.editors()
    plugins.editor("rome")
    assert calls == ["editors"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise ImportError", "ImportError"),
        ("@hookimpl\ndef editcore_editors(): 1 / 0", "editcore_editors: ZeroDivisionError: division by zero"),
        (
            "@hookimpl\ndef editcore_editors(): return 'rome'",
            "editcore_editors: returned a str, not a list of EditorSpec",
        ),
        ("@hookimpl\ndef editcore_editors(): return 7", "editcore_editors: returned an int, not a list of EditorSpec"),
        (
            "@hookimpl\ndef editcore_editors(): return [{'name': 'x'}]",
            "editcore_editors: returned a list with a dict, not of EditorSpec",
        ),
        (
            "@hookimpl\ndef editcore_editors(): return [editor('R-ROME')]",
            "editcore_editors: the name 'R-ROME' is not made of lower-case letters, digits and hyphens",
        ),
        (
            "@hookimpl\ndef editcore_components():\n"
            "    return [ComponentSpec('a', target='m:a', kind='A b', summary='.')]",
            "editcore_components: the kind 'A b' is not made of lower-case letters, digits, hyphens and dots",
        ),
        ("@hookimpl\ndef editcore_editorz(): return []", "unknown hook 'editcore_editorz'"),
        (
            "@hookimpl\ndef editcore_evaluators():\n"
            "    twice = (MetricSpec(name='a', label='A'), MetricSpec(name='a', label='B'))\n"
            "    return [EvaluatorSpec('x', 'm:X', summary='.', metrics=twice)]",
            "editcore_evaluators: ValueError: the metric a is announced twice",
        ),
        (
            "@hookimpl\ndef editcore_evaluators(): return [EvaluatorSpec('x', 'm:X', summary='.')]",
            "editcore_evaluators: TypeError: EvaluatorSpec.__init__() missing 1 required keyword-only argument: "
            "'metrics'",
        ),
    ],
)
def test_a_broken_plugin_is_listed_with_its_reason_and_harms_no_other(
    install: Install, load: Load, body: str, reason: str
) -> None:
    install("bad", body)
    install("good", announces("good"))
    plugins = load()
    row = info(plugins, "bad")
    assert (row.status, row.reason) == ("broken", reason)
    assert row.offers == {}
    assert list(plugins.editors()) == ["good"]


def test_a_hook_with_an_unknown_argument_is_broken(install: Install, load: Load) -> None:
    install("bad", "@hookimpl\ndef editcore_editors(event, model): return []")
    row = info(load(), "bad")
    assert row.status == "broken"
    assert "{'model'} are declared in the hookimpl but can not be found in the hookspec" in row.reason
    assert "\n" not in row.reason


def test_one_broken_hook_leaves_the_plugins_other_offers(install: Install, load: Load) -> None:
    install("half", announces("half") + "@hookimpl\ndef editcore_backends(): raise KeyError('x')\n")
    plugins = load()
    assert list(plugins.editors()) == ["half"]
    assert list(plugins.backends()) == []
    row = info(plugins, "half")
    assert (row.status, row.offers) == ("broken", {"editcore_editors": ("half",)})


def test_asking_for_a_broken_plugin_says_why(install: Install, load: Load) -> None:
    install("lora", "import peft_that_is_not_here")
    with pytest.raises(UnknownNameError) as caught:
        load().backend("lora")
    assert str(caught.value) == (
        "Unknown backend 'lora'. Available: none. The plugin 'lora' (edit-lora 1.0) is installed but broken: "
        "ModuleNotFoundError: No module named 'peft_that_is_not_here'."
    )


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_blocked_plugin_is_not_imported(
    install: Install, load: Load, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    install("quiet", announces("quiet"))
    install("rome", announces("rome"))
    if how == "argument":
        plugins = load(disabled=["quiet", "lora"])
    else:
        monkeypatch.setenv("EDITCORE_DISABLE_PLUGINS", "lora, quiet")
        plugins = load()
    assert list(plugins.editors()) == ["rome"]
    assert "edit_quiet" not in sys.modules
    assert "edit_rome" in sys.modules
    row = info(plugins, "quiet")
    assert (row.status, row.reason) == ("blocked", "named in EDITCORE_DISABLE_PLUGINS")
    with pytest.raises(UnknownNameError, match="installed but blocked: named in EDITCORE_DISABLE_PLUGINS"):
        plugins.editor("quiet")


def test_two_plugins_with_one_name_are_refused_naming_both_when_asked_for(install: Install, load: Load) -> None:
    install("rome", announces("rome"))
    install("rome-fork", announces("rome"), distribution="my-rome")
    plugins = load()
    with pytest.raises(PluginError) as caught:
        plugins.editor("rome")
    assert "Two plugins offer the editor 'rome': 'rome' of edit-rome 1.0 and 'rome-fork' of my-rome 1.0." in str(
        caught.value
    )
    assert list(plugins.backends()) == []
    assert [row.status for row in plugins.listing()] == ["active", "active"]


def test_unknown_editor_names_what_is_installed_and_the_way_out(install: Install, load: Load) -> None:
    install("memit", announces("memit"))
    install("rome", announces("rome"))
    with pytest.raises(UnknownNameError) as caught:
        load().editor("memitt")
    assert str(caught.value) == (
        "Unknown editor 'memitt'. Available: memit, rome. Did you mean 'memit'? "
        "(A missing method is usually a missing package: pip install edit-memit)"
    )
    with pytest.raises(UnknownNameError, match=r"pip install edit-alphaedit\)"):
        load().editor("alphaedit")


def test_a_name_of_another_kind_is_recognised(install: Install, load: Load) -> None:
    install("rome", announces("rome"))
    with pytest.raises(UnknownNameError, match=r"\('rome' is the name of an editor\.\)"):
        load().backend("rome")


def test_components_are_unique_within_their_kind(install: Install, load: Load) -> None:
    install(
        "parts",
        """
        @hookimpl
        def editcore_components():
            return [
                ComponentSpec("random", target="m:a", kind="replay.strategy", summary="."),
                ComponentSpec("recent", target="m:b", kind="replay.strategy", summary="."),
                ComponentSpec("random", target="m:c", kind="other.thing", summary="."),
            ]
        """,
    )
    plugins = load()
    assert list(plugins.components("replay.strategy")) == ["random", "recent"]
    assert plugins.component("other.thing", "random").target == "m:c"
    assert dict(plugins.components("no.such")) == {}
    with pytest.raises(UnknownNameError, match=r"Unknown replay\.strategy 'randon'\. .*Did you mean 'random'\?"):
        plugins.component("replay.strategy", "randon")


def test_families_are_handed_over_as_paths_by_model_type(install: Install, load: Load) -> None:
    install(
        "odd",
        """
        @hookimpl
        def editcore_model_families():
            from editcore import ModelFamilySpec

            two = ("odd", "odder")
            return [ModelFamilySpec("odd", "", summary="Odd.", model_types=two, paths={"blocks": "model.rows"})]
        """,
    )
    assert load().family_paths() == {"odd": {"blocks": "model.rows"}, "odder": {"blocks": "model.rows"}}


def test_a_registry_cannot_be_changed(install: Install, load: Load) -> None:
    install("rome", announces("rome"))
    with pytest.raises(TypeError):
        load().editors()["x"] = None  # type: ignore[index]


def test_resolve_imports_on_demand() -> None:
    assert resolve("editcore.plugins.registry:Plugins") is Plugins
    assert resolve("editcore.plugins.registry:Plugins.load") == Plugins.load


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("nowhere", "The target 'nowhere' of a plugin is not of the form 'module:attribute'."),
        ("nowhere:X", "Cannot load 'nowhere:X': ModuleNotFoundError: No module named 'nowhere'."),
        ("json:X", "Cannot load 'json:X': AttributeError: module 'json' has no attribute 'X'."),
    ],
)
def test_a_target_that_cannot_be_loaded_is_one_sentence(target: str, sentence: str) -> None:
    with pytest.raises(PluginError) as caught:
        resolve(target)
    assert str(caught.value) == sentence


class Extension:
    """Writes down what it is told, and answers what it is given."""

    def __init__(self, log: list[str], name: str, answer: Any = None) -> None:
        self.log, self.name, self.answer = log, name, answer

    @hookimpl
    def editcore_before_batch(self, event: Any) -> Any:
        self.log.append(self.name)
        return self.answer

    @hookimpl
    def editcore_before_apply(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @hookimpl
    def editcore_after_evaluation(self, event: AfterEvaluation) -> None:
        self.log.append(f"{self.name} {event.phase}")


class Bystander:
    """Implements nothing."""


def test_extensions_are_told_last_given_first() -> None:
    log: list[str] = []
    run = lifecycle({"a": Extension(log, "a"), "none": Bystander(), "b": Extension(log, "b")})
    model: Any = None
    run.after_evaluation(
        AfterEvaluation(model=model, phase="after", num_edits=1, records=(), observations={}, scores={})
    )
    assert log == ["b after", "a after"]
    run.before_run(object())  # type: ignore[arg-type]  # nobody listens


def test_answers_come_with_the_extensions_name_and_none_is_left_out() -> None:
    addition = BatchAddition(requests=(), weights=())
    run = lifecycle({"a": Extension([], "a", addition), "b": Extension([], "b"), "c": Extension([], "c", addition)})
    assert run.before_batch(object()) == [("c", addition), ("a", addition)]  # type: ignore[arg-type]
    verdict = Verdict(action="accept", reason="fine")
    judged = lifecycle({"trust": Extension([], "trust", verdict)})
    assert judged.before_apply(object()) == [("trust", verdict)]  # type: ignore[arg-type]


class Halver:
    """Halves every change, or returns changes of other weights."""

    def __init__(self, name: str, *, addresses: tuple[str, ...] = ("a.weight",)) -> None:
        self.name, self.addresses = name, addresses

    @hookimpl
    def editcore_after_solve(self, event: AfterSolve) -> Rework:
        changes = {address: event.changes["a.weight"].scaled(0.5) for address in self.addresses}
        return Rework(changes=changes, diagnostics={self.name: changes["a.weight"].norm()}, notes=(self.name,))


def test_changes_are_reworked_one_after_the_other() -> None:
    model: Any = None
    event = AfterSolve(model=model, changes={"a.weight": DenseDelta(torch.full((2, 2), 4.0))})
    run = lifecycle({"a": Halver("a"), "none": Bystander(), "b": Halver("b")})
    assert run.reworks
    found = run.after_solve(event)
    assert found.changes["a.weight"].dense().equal(torch.ones(2, 2))
    assert (found.diagnostics, found.notes) == ({"b": 4.0, "a": 2.0}, ("b", "a"))
    quiet = lifecycle({"none": Bystander()})
    assert not quiet.reworks
    assert quiet.after_solve(event).changes is event.changes
    with pytest.raises(PluginError) as caught:
        lifecycle({"c": Halver("c", addresses=("a.weight", "b.weight"))}).after_solve(event)
    assert str(caught.value) == (
        "The plugin 'c' returned changes of a.weight, b.weight from editcore_after_solve; the editor proposes "
        "changes of a.weight."
    )


def test_an_answer_of_the_wrong_type_names_the_extension() -> None:
    run = lifecycle({"replay": Extension([], "replay", ["facts"])})
    with pytest.raises(PluginError) as caught:
        run.before_batch(object())  # type: ignore[arg-type]
    assert str(caught.value) == (
        "The plugin 'replay' returned a list from editcore_before_batch, which must return BatchAddition or None."
    )


def test_an_extensions_exception_names_it_and_keeps_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    cause = RuntimeError("out of coffee")
    run = lifecycle({"trust": Extension([], "trust", cause)})
    event: BeforeApply = object()  # type: ignore[assignment]
    with caplog.at_level(logging.DEBUG, logger="editcore"), pytest.raises(PluginError) as caught:
        run.before_apply(event)
    assert str(caught.value) == "The plugin 'trust' failed in editcore_before_apply: RuntimeError: out of coffee."
    assert caught.value.__cause__ is cause
    assert "Traceback" in caplog.text


def test_an_extensions_own_sentence_passes_unchanged() -> None:
    sentence = HParamsError("replay: ratio = 7 is out of range.")
    run = lifecycle({"replay": Extension([], "replay", sentence)})
    with pytest.raises(HParamsError) as caught:
        run.before_apply(object())  # type: ignore[arg-type]
    assert caught.value is sentence


def test_an_extension_with_an_unknown_hook_is_refused_by_name() -> None:
    class Misspelt:
        @hookimpl
        def editcore_after_bach(self, event: object) -> None: ...

    with pytest.raises(PluginError) as caught:
        lifecycle({"late": Misspelt()})
    assert str(caught.value) == "The plugin 'late' does not fit the hooks: unknown hook 'editcore_after_bach'."


# What a plugin was made for


FUTURE = "editcore<2,>=1"
"""As a wheel has it: the bounds in alphabetical order."""


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets another version of editcore be the one that is installed."""
    version = importlib.metadata.version

    def _release(number: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: number if name == "editcore" else version(name))

    return _release


def test_a_plugin_for_another_version_is_not_imported_and_says_what_to_do(
    install: Install, load: Load, release: Callable[[str], None]
) -> None:
    release("0.1.0")
    install("foo", announces("foo"), requires=["torch>=2", FUTURE])
    install("good", announces("good"), requires=["editcore>=0.1,<0.2"])
    plugins = load()
    assert "edit_foo" not in sys.modules
    row = info(plugins, "foo")
    assert (row.status, row.offers) == ("incompatible", {})
    assert row.reason == (
        "it is made for editcore>=1,<2, and editcore 0.1.0 is installed; install another version of the plugin, or: "
        'pip install "editcore>=1,<2"'
    )
    assert list(plugins.editors()) == ["good"]
    assert info(plugins, "good").status == "active"
    with pytest.raises(UnknownNameError) as caught:
        plugins.editor("foo")
    assert f"The plugin 'foo' (edit-foo 1.0) is installed but incompatible: {row.reason}." in str(caught.value)


@pytest.mark.parametrize(
    ("requirement", "version", "status"),
    [
        ("editcore", "7.0", "active"),
        ("editcore>=0.1,<0.2", "0.1.9", "active"),
        ("editcore>=0.1,<0.2", "0.2.0", "incompatible"),
        ("editcore>=0.1,<0.2", "0.2.0.dev1", "incompatible"),
        ("editcore>=0.1,<0.2", "0.1.3.dev1", "active"),
        ("editcore>=0.2", "0.1.0", "incompatible"),
        ("editcore[testing]~=1.4", "1.9", "active"),
        ("editcore~=1.4", "2.0", "incompatible"),
        ("EditCore<1", "1.0", "incompatible"),
        ("editcore<1; extra == 'testing'", "1.0", "active"),
        ("editcore<1; python_version >= '3'", "1.0", "incompatible"),
        ("editcore-more<1", "1.0", "active"),
        ("editcore.more<1", "1.0", "active"),
        ("a line that is no requirement", "1.0", "active"),
        ("editcore at least one", "1.0", "incompatible"),
    ],
)
def test_the_requirement_of_its_package_decides(
    install: Install, load: Load, release: Callable[[str], None], requirement: str, version: str, status: str
) -> None:
    release(version)
    install("foo", announces("foo"), requires=[requirement])
    assert info(load(), "foo").status == status


def test_a_blocked_plugin_is_blocked_whatever_it_was_made_for(install: Install, load: Load) -> None:
    install("foo", announces("foo"), requires=["editcore<0"])
    assert info(load(disabled=["foo"]), "foo").status == "blocked"


# Everything of a name


def test_a_name_is_found_whatever_it_is_the_name_of(install: Install, load: Load) -> None:
    install(
        "both",
        announces("memory")
        + """
@hookimpl
def editcore_components():
    return [ComponentSpec("memory", target="m:a", kind=kind, summary=".") for kind in ("a.part", "b.part")]
""",
    )
    install("other", announces("other") + "@hookimpl\ndef editcore_backends(): 1 / 0\n")
    found = load().named("memory")
    assert [(offer.kind, offer.distribution, offer.version) for offer in found] == [
        ("editor", "edit-both", "1.0"),
        ("component", "edit-both", "1.0"),
        ("component", "edit-both", "1.0"),
    ]
    assert [getattr(offer.spec, "kind", "") for offer in found] == ["", "a.part", "b.part"]


def test_two_packages_with_one_name_are_both_told(install: Install, load: Load) -> None:
    """Whoever asks what a name means should see why it cannot be used."""
    install("rome", announces("rome"))
    install("rome-fork", announces("rome"), distribution="my-rome")
    assert [offer.distribution for offer in load().named("rome")] == ["edit-rome", "my-rome"]


def test_an_unknown_name_gets_a_near_miss_or_what_is_known_of_it(install: Install, load: Load) -> None:
    install(
        "pair",
        announces("rome") + "@hookimpl\ndef editcore_backends(): return [BackendSpec('flat', 'm:B', summary='.')]\n",
    )
    with pytest.raises(UnknownNameError) as caught:
        load().named("rom")
    assert str(caught.value) == "Unknown name 'rom'. Available: flat, rome. Did you mean 'rome'?"
    for asked in ("pair", "edit-pair"):
        with pytest.raises(UnknownNameError, match=r"\(The plugin 'pair' of edit-pair 1\.0 offers: rome, flat\.\)"):
            load().named(asked)
    assert isinstance(load().named("flat")[0], Offer)
