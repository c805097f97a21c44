"""Finds plugins, asks them what they offer, and calls the extensions of a run.

Plugins announce themselves through the entry-point group ``editcore``. Each is imported and asked on its own, so that a
broken one is listed with its reason and costs nobody else anything. Names in ``EDITCORE_DISABLE_PLUGINS`` (separated by
commas) are never imported, nor is a plugin whose distribution requires another editcore. Only this module touches
pluggy's hooks; everyone else uses :class:`Plugins` and :class:`Lifecycle`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar, cast

import pluggy

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import EditcoreError, PluginError, UnknownNameError
from editcore.interfaces.events import (
    AfterBatch,
    AfterEvaluation,
    AfterRun,
    AfterUndo,
    BatchAddition,
    BeforeApply,
    BeforeBatch,
    BeforeRun,
    Registration,
)
from editcore.interfaces.hookspecs import PROJECT, LifecycleHooks, RegistrationHooks
from editcore.interfaces.specs import (
    AttachmentSpec,
    BackendSpec,
    CommandSpec,
    ComponentSpec,
    DatasetSpec,
    EditorSpec,
    EvaluatorSpec,
    ExecutorSpec,
    ExtensionSpec,
    ModelFamilySpec,
    Spec,
)
from editcore.interfaces.values import Verdict

__all__ = [
    "DISABLE_VARIABLE",
    "REGISTRATION_HOOKS",
    "Lifecycle",
    "Offer",
    "PluginInfo",
    "Plugins",
    "boundary",
    "lifecycle",
    "resolve",
]

GROUP = "editcore"
DISABLE_VARIABLE = "EDITCORE_DISABLE_PLUGINS"

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_COMPONENT_KIND = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
_ABOUT_EDITCORE = re.compile(r"editcore(?![\w.-])", re.IGNORECASE)

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Spec)
S_co = TypeVar("S_co", bound=Spec, covariant=True)
T = TypeVar("T")

Status = Literal["active", "blocked", "incompatible", "broken"]


@dataclass(frozen=True, slots=True)
class _Kind(Generic[S_co]):
    """One sort of thing that plugins offer."""

    word: str
    """As messages call it."""
    hook: str
    spec: type[S_co]
    missing: str = ""
    """The hint after an unknown name, where ``edit-NAME`` is how such a package is usually called (``{package}``)."""


def _missing(what: str) -> str:
    return f"(A missing {what} is usually a missing package: pip install {{package}})"


_EDITOR = _Kind("editor", "editcore_editors", EditorSpec, _missing("method"))
_BACKEND = _Kind("backend", "editcore_backends", BackendSpec, _missing("backend"))
_ATTACHMENT = _Kind(
    "attachment",
    "editcore_attachments",
    AttachmentSpec,
    "(An attachment comes with the editor that makes it: install that editor's package, or allow it again.)",
)
_EXTENSION = _Kind("plugin", "editcore_extensions", ExtensionSpec, _missing("plugin"))
_EVALUATOR = _Kind("evaluator", "editcore_evaluators", EvaluatorSpec)
_DATASET = _Kind("data set", "editcore_datasets", DatasetSpec)
_EXECUTOR = _Kind("executor", "editcore_executors", ExecutorSpec, _missing("executor"))
_MODEL_FAMILY = _Kind("model family", "editcore_model_families", ModelFamilySpec)
_COMMAND = _Kind("command", "editcore_commands", CommandSpec)
_COMPONENT = _Kind("component", "editcore_components", ComponentSpec)

_KINDS: tuple[_Kind[Any], ...] = (
    _EDITOR,
    _BACKEND,
    _ATTACHMENT,
    _EXTENSION,
    _EVALUATOR,
    _DATASET,
    _EXECUTOR,
    _MODEL_FAMILY,
    _COMMAND,
    _COMPONENT,
)

REGISTRATION_HOOKS = tuple(kind.hook for kind in _KINDS)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """One line of ``editctl plugins``."""

    name: str
    """Entry-point name."""
    distribution: str
    """The package that it comes with."""
    version: str
    """Of that package."""
    status: Status
    """``blocked``: named in ``EDITCORE_DISABLE_PLUGINS``. ``incompatible``: its package requires another editcore.
    Neither is imported. ``broken``: it cannot be imported, or one of its registration hooks fails."""
    reason: str
    """Why it is not active, and for an incompatible one what would work; empty for an active plugin."""
    offers: Mapping[str, tuple[str, ...]]
    """By hook name: the names it announces. Hooks that it does not implement are absent."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One thing that a plugin announces."""

    kind: str
    """What it is, in a word: ``editor``, ``backend``, ``attachment``, ``plugin``, ``evaluator``, ``data set``,
    ``executor``, ``model family``, ``command``, ``component``."""
    spec: Spec
    """As it is announced."""
    distribution: str
    """The package that it comes with."""
    version: str
    """Of that package."""


class Plugins:
    """Everything that is installed, by kind and name.

    Build one with :meth:`load` and pass it along. Importing a plugin costs little; each registration hook is called
    when its kind is first asked for.
    """

    def __init__(self, plugins: Sequence[_Plugin]) -> None:
        self._plugins = tuple(plugins)
        self._registries: dict[str, Mapping[str, Spec]] = {}

    @classmethod
    def load(
        cls, *, entry_points: Iterable[EntryPoint] | None = None, disabled: Iterable[str] | None = None
    ) -> Plugins:
        """Import every plugin that is neither blocked nor made for another editcore.

        Args:
            entry_points: those of the group ``editcore`` unless given.
            disabled: entry names to block; those of ``EDITCORE_DISABLE_PLUGINS`` unless given.
        """
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=GROUP)
        if disabled is None:
            disabled = os.environ.get(DISABLE_VARIABLE, "").split(",")
        blocked = {name.strip() for name in disabled}
        event = Registration(editcore_version=importlib.metadata.version("editcore"))
        plugins = [_Plugin(entry, event=event, blocked=entry.name in blocked) for entry in entry_points]
        return cls(sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution)))

    def editors(self) -> Mapping[str, EditorSpec]:
        """Choices of ``--editor``."""
        return self._registry(_EDITOR)

    def editor(self, name: str) -> EditorSpec:
        """The editor of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(_EDITOR, name)

    def backends(self) -> Mapping[str, BackendSpec]:
        """Choices of ``--backend``."""
        return self._registry(_BACKEND)

    def backend(self, name: str) -> BackendSpec:
        """The backend of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(_BACKEND, name)

    def attachments(self) -> Mapping[str, AttachmentSpec]:
        """Kinds of knowledge kept beside the weights."""
        return self._registry(_ATTACHMENT)

    def attachment(self, kind: str) -> AttachmentSpec:
        """The kind of attachment of that name.

        Raises:
            UnknownNameError: there is none.
        """
        return self._find(_ATTACHMENT, kind)

    def extensions(self) -> Mapping[str, ExtensionSpec]:
        """Choices of ``--plugin``."""
        return self._registry(_EXTENSION)

    def extension(self, name: str) -> ExtensionSpec:
        """The extension of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(_EXTENSION, name)

    def evaluators(self) -> Mapping[str, EvaluatorSpec]:
        """Choices of ``--evaluator``."""
        return self._registry(_EVALUATOR)

    def evaluator(self, name: str) -> EvaluatorSpec:
        """The evaluator of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(_EVALUATOR, name)

    def datasets(self) -> Mapping[str, DatasetSpec]:
        """Choices of ``--dataset``."""
        return self._registry(_DATASET)

    def dataset(self, name: str) -> DatasetSpec:
        """The data set of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(_DATASET, name)

    def executors(self) -> Mapping[str, ExecutorSpec]:
        """Choices of ``--executor``."""
        return self._registry(_EXECUTOR)

    def executor(self, name: str) -> ExecutorSpec:
        """The executor of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(_EXECUTOR, name)

    def model_families(self) -> Mapping[str, ModelFamilySpec]:
        """Architectures whose module paths are given."""
        return self._registry(_MODEL_FAMILY)

    def family_paths(self) -> dict[str, dict[str, str]]:
        """What they say, by ``config.model_type``: module paths by the field of :class:`editcore.ModelLayout`."""
        paths: dict[str, dict[str, str]] = {}
        for spec in self.model_families().values():
            for model_type in spec.model_types:
                paths.setdefault(model_type, {}).update(spec.paths)
        return paths

    def commands(self) -> Mapping[str, CommandSpec]:
        """Subcommands that plugins add to ``editctl``."""
        return self._registry(_COMMAND)

    def components(self, kind: str) -> Mapping[str, ComponentSpec]:
        """The parts offered for one extension point, such as ``"replay.strategy"``."""
        offers = [(p, spec) for p, spec in self._offers(_COMPONENT) if spec.kind == kind]
        return _by_name(kind, offers)

    def component(self, kind: str, name: str) -> ComponentSpec:
        """The part of that name; :class:`UnknownNameError` says what is installed."""
        components = self.components(kind)
        if name not in components:
            raise UnknownNameError(kind, name, components)
        return components[name]

    def distributions_of(self, names: Collection[str]) -> set[str]:
        """The packages that offer what a run may name (an editor, an evaluator) by these names, or parts for it."""
        kinds: tuple[_Kind[Any], ...] = (_EDITOR, _BACKEND, _EXTENSION, _EVALUATOR, _DATASET)
        offering = [(plugin, spec.name) for kind in kinds for plugin, spec in self._offers(kind)]
        parts = [(plugin, spec.kind.partition(".")[0]) for plugin, spec in self._offers(_COMPONENT)]
        return {plugin.distribution for plugin, name in [*offering, *parts] if name in names}

    def named(self, name: str) -> list[Offer]:
        """Everything of that name, whatever it is: a name may be that of an editor and of its attachment.

        Raises:
            UnknownNameError: nothing is called so.
        """
        offers = [(kind, plugin, spec) for kind in _KINDS for plugin, spec in self._offers(kind)]
        found = [
            Offer(kind=kind.word, spec=spec, distribution=plugin.distribution, version=plugin.version)
            for kind, plugin, spec in offers
            if spec.name == name
        ]
        if not found:
            raise UnknownNameError("name", name, {spec.name for _, _, spec in offers}, hint=self.hint(name))
        return found

    def listing(self) -> list[PluginInfo]:
        """Every plugin found, with its state and what it offers."""
        return [plugin.info() for plugin in self._plugins]

    def _offers(self, kind: _Kind[S]) -> list[tuple[_Plugin, S]]:
        return [(plugin, spec) for plugin in self._plugins for spec in plugin.offers(kind)]

    def _registry(self, kind: _Kind[S]) -> Mapping[str, S]:
        if kind.hook not in self._registries:
            self._registries[kind.hook] = _by_name(kind.word, self._offers(kind))
        return cast("Mapping[str, S]", self._registries[kind.hook])

    def _find(self, kind: _Kind[S], name: str) -> S:
        registry = self._registry(kind)
        if name not in registry:
            raise UnknownNameError(
                kind.word, name, registry, hint=self.hint(name) or _package_hint(kind, name, registry)
            )
        return registry[name]

    def hint(self, name: str) -> str:
        """What is known about a name that is not registered where it was asked for; empty if nothing is."""
        called_so = [(plugin, plugin.info()) for plugin in self._plugins if name in (plugin.name, plugin.distribution)]
        for plugin, info in called_so:
            if info.status != "active":
                why = f"installed but {info.status}: {_ended(info.reason)}"
                return f"The plugin '{info.name}' ({plugin.label}) is {why}"
        for kind in _KINDS:
            if any(spec.name == name for _, spec in self._offers(kind)):
                return f"('{name}' is the name of {_article(kind.word)} {kind.word}.)"
        for plugin, info in called_so:
            offers = ", ".join(offer for names in info.offers.values() for offer in names) or "nothing"
            return f"(The plugin '{info.name}' of {plugin.label} offers: {offers}.)"
        return ""


class Lifecycle:
    """The extensions of one run. Each method tells all of them, the last one given first.

    An exception of an extension becomes a :class:`PluginError` with its name, unless it is an :class:`EditcoreError`
    already. Built by :func:`lifecycle`.
    """

    def __init__(self, hooks: Mapping[str, pluggy.HookRelay]) -> None:
        self._hooks = hooks

    def before_run(self, event: BeforeRun) -> None:
        """``editcore_before_run``"""
        self._call("editcore_before_run", event)

    def before_batch(self, event: BeforeBatch) -> list[tuple[str, BatchAddition]]:
        """``editcore_before_batch``: what each extension adds, by its name, in call order."""
        return self._answers("editcore_before_batch", event, BatchAddition)

    def before_apply(self, event: BeforeApply) -> list[tuple[str, Verdict]]:
        """``editcore_before_apply``: how each extension judges, by its name, in call order."""
        return self._answers("editcore_before_apply", event, Verdict)

    def after_batch(self, event: AfterBatch) -> None:
        """``editcore_after_batch``"""
        self._call("editcore_after_batch", event)

    def after_undo(self, event: AfterUndo) -> None:
        """``editcore_after_undo``"""
        self._call("editcore_after_undo", event)

    def after_evaluation(self, event: AfterEvaluation) -> None:
        """``editcore_after_evaluation``"""
        self._call("editcore_after_evaluation", event)

    def after_run(self, event: AfterRun) -> None:
        """``editcore_after_run``"""
        self._call("editcore_after_run", event)

    def _call(self, hook: str, event: object) -> list[tuple[str, object]]:
        answers: list[tuple[str, object]] = []
        for name in reversed(list(self._hooks)):
            with boundary(f"The plugin '{name}' failed in {hook}: "):
                answers += [(name, answer) for answer in getattr(self._hooks[name], hook)(event=event)]
        return answers

    def _answers(self, hook: str, event: object, expected: type[T]) -> list[tuple[str, T]]:
        answers: list[tuple[str, T]] = []
        for name, answer in self._call(hook, event):
            if not isinstance(answer, expected):
                raise PluginError(
                    f"The plugin '{name}' returned {_article(type(answer).__name__)} {type(answer).__name__} "
                    f"from {hook}, which takes {expected.__name__} or None."
                )
            answers.append((name, answer))
        return answers


def lifecycle(instances: Mapping[str, object]) -> Lifecycle:
    """Gather the extensions of a run, in the order in which they were given.

    Raises:
        PluginError: an extension has a hook that does not exist, or one with arguments that its specification lacks.
    """
    hooks: dict[str, pluggy.HookRelay] = {}
    for name, instance in instances.items():
        with boundary(f"The plugin '{name}' does not fit the hooks: "):
            hooks[name] = _hooks(LifecycleHooks, name, instance)
    return Lifecycle(hooks)


def resolve(target: str) -> Any:
    """Import what a spec's ``"module:attribute"`` names.

    Raises:
        PluginError: the module cannot be imported, or has no such attribute.
    """
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise PluginError(f"The target '{target}' of a plugin is not of the form 'module:attribute'.")
    with boundary(f"Cannot load '{target}': "):
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    return value


class _Plugin:
    """One entry point: whether it works, and what it has announced so far."""

    def __init__(self, entry_point: EntryPoint, *, event: Registration, blocked: bool) -> None:
        self.name = entry_point.name
        self.distribution = entry_point.dist.name if entry_point.dist else "unknown"
        self.version = entry_point.dist.version if entry_point.dist else ""
        self._event = event
        self._problems: list[str] = []
        self._offers: dict[str, tuple[Spec, ...]] = {}
        self._kept_out: tuple[Status, str] | None = None
        if blocked:
            self._kept_out = ("blocked", f"named in {DISABLE_VARIABLE}")
        elif unmet := _unmet(entry_point.dist, event.editcore_version):
            self._kept_out = ("incompatible", unmet)
        self._hooks = None if self._kept_out else self._open(entry_point)

    @property
    def label(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}".rstrip()

    def offers(self, kind: _Kind[S]) -> tuple[S, ...]:
        """What it announces of one kind; nothing if it was not imported or its hook is broken."""
        if kind.hook not in self._offers:
            self._offers[kind.hook] = self._ask(kind)
        return cast("tuple[S, ...]", self._offers[kind.hook])

    def info(self) -> PluginInfo:
        """Its line in the listing; asks all of its hooks."""
        offers = {kind.hook: tuple(spec.name for spec in self.offers(kind)) for kind in _KINDS}
        status, reason = self._kept_out or ("broken" if self._problems else "active", "; ".join(self._problems))
        return PluginInfo(
            name=self.name,
            distribution=self.distribution,
            version=self.version,
            status=status,
            reason=reason,
            offers={hook: names for hook, names in offers.items() if names},
        )

    def _open(self, entry_point: EntryPoint) -> pluggy.HookRelay | None:
        with self._recorded(""):
            return _hooks(RegistrationHooks, self.name, entry_point.load())
        return None

    def _ask(self, kind: _Kind[S]) -> tuple[S, ...]:
        if self._hooks is None:
            return ()
        with self._recorded(f"{kind.hook}: "):
            answers = getattr(self._hooks, kind.hook)(event=self._event)
            return tuple(spec for answer in answers for spec in _checked(kind, answer))
        return ()

    @contextmanager
    def _recorded(self, prefix: str) -> Iterator[None]:
        try:
            with boundary(""):
                yield
        except EditcoreError as error:
            self._problems.append(prefix + str(error))


def _unmet(distribution: Distribution | None, version: str) -> str:
    """Why a distribution is not for this editcore, and what would work; empty if it may be used.

    It says so where installers read it (``Requires-Dist``). pip leaves a plugin in place when editcore is replaced
    beneath it. A distribution that requires no editcore may be used with any.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    lines = (distribution.requires or []) if distribution else []
    for line in filter(_ABOUT_EDITCORE.match, lines):
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            return f"its package requires '{line}', which cannot be read; install another version of the package"
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        # In older releases of packaging a development version fits no specifier without the flag.
        if applies and not requirement.specifier.contains(version, prereleases=True):
            wanted = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # ">=1,<2": the lower bound first
            found = f"it is made for editcore{wanted}, and editcore {version} is installed"
            return f'{found}; install a version of the plugin for that, or: pip install "editcore{wanted}"'
    return ""


@contextmanager
def boundary(prefix: str) -> Iterator[None]:
    """Run a plugin's code: whatever it raises becomes a :class:`PluginError`.

    With a ``prefix`` its message is a sentence that starts so; without, it is the bare reason, for a listing.
    """
    try:
        yield
    except EditcoreError:
        raise
    except Exception as error:  # the one place where foreign code meets ours
        logger.debug("%s", prefix, exc_info=True)
        raise PluginError(_ended(prefix + _reason(error)) if prefix else _reason(error)) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, pluggy.PluginValidationError):
        return re.sub(r" in plugin <.*>$", "", text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _hooks(specifications: type, name: str, plugin: object) -> pluggy.HookRelay:
    """The hooks of one plugin alone, so that an answer or an exception is known to be its own."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specifications)
    manager.register(plugin, name)
    manager.check_pending()
    return manager.hook


def _checked(kind: _Kind[S], answer: object) -> Sequence[S]:
    expected = kind.spec.__name__
    if isinstance(answer, str) or not isinstance(answer, Sequence):
        raise PluginError(
            f"returned {_article(type(answer).__name__)} {type(answer).__name__}, not a list of {expected}"
        )
    for spec in answer:
        if not isinstance(spec, kind.spec):
            raise PluginError(
                f"returned a list with {_article(type(spec).__name__)} {type(spec).__name__}, not of {expected}"
            )
        if not _NAME.fullmatch(spec.name):
            raise PluginError(f"the name {spec.name!r} is not made of lower-case letters, digits and hyphens")
        if isinstance(spec, ComponentSpec) and not _COMPONENT_KIND.fullmatch(spec.kind):
            raise PluginError(f"the kind {spec.kind!r} is not made of lower-case letters, digits, hyphens and dots")
    return answer


def _by_name(word: str, offers: Iterable[tuple[_Plugin, S]]) -> Mapping[str, S]:
    owners: dict[str, _Plugin] = {}
    registry: dict[str, S] = {}
    for plugin, spec in offers:
        if spec.name in registry:
            raise PluginError(
                f"Two plugins offer the {word} '{spec.name}': '{owners[spec.name].name}' of {owners[spec.name].label} "
                f"and '{plugin.name}' of {plugin.label}. Uninstall one of the two, or name one of the plugins in "
                f"{DISABLE_VARIABLE}."
            )
        owners[spec.name] = plugin
        registry[spec.name] = spec
    return MappingProxyType(registry)


def _package_hint(kind: _Kind[Any], asked: str, installed: Iterable[str]) -> str:
    if not kind.missing or not _NAME.fullmatch(asked):
        return ""
    # The name that was meant, where there is one: nobody should be told to install a misspelt package.
    near = difflib.get_close_matches(asked, list(installed), n=1)
    return kind.missing.format(package=f"edit-{near[0] if near else asked}")


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
