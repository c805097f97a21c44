"""Everything that plugins offer, by kind and name.

Plugins announce themselves through the entry-point group ``editcore``. Each is imported and asked by itself, so that a
broken plugin is listed with a reason and does not affect the others.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any, TypeVar, cast

from editcore._util.words import with_article, with_full_stop
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import PluginError, UnknownNameError
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
from editcore.plugins import kinds
from editcore.plugins.installed import DISABLE_VARIABLE, InstalledPlugin, PluginInfo
from editcore.plugins.kinds import Kind, package_hint

__all__ = ["ENTRY_POINT_GROUP", "Offer", "Plugins"]

ENTRY_POINT_GROUP = "editcore"

S = TypeVar("S", bound=Spec)


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One thing that a plugin announces."""

    kind: str
    """What it is, in a word: ``editor``, ``backend``, ``attachment``, ``plugin``, ``evaluator``, ``data set``,
    ``executor``, ``model family``, ``command``, ``component``."""
    spec: Spec
    """The announcement."""
    distribution: str
    """The package that it comes with."""
    version: str
    """Of that package."""


class Plugins:
    """Everything that is installed, by kind and name.

    Build one with :meth:`load` and pass it along. Importing a plugin costs little; each registration hook is called
    when its kind is first asked for.
    """

    def __init__(self, plugins: Sequence[InstalledPlugin]) -> None:
        self._plugins = tuple(plugins)
        self._registries: dict[str, Mapping[str, Spec]] = {}

    @classmethod
    def load(
        cls, *, entry_points: Iterable[EntryPoint] | None = None, disabled: Iterable[str] | None = None
    ) -> Plugins:
        """Import every plugin that is neither blocked nor made for another editcore.

        Args:
            entry_points: the plugins; left out, the entry points of the group ``editcore``.
            disabled: names of plugins to block; left out, those in ``EDITCORE_DISABLE_PLUGINS``.
        """
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        if disabled is None:
            disabled = os.environ.get(DISABLE_VARIABLE, "").split(",")
        blocked = {name.strip() for name in disabled}
        version = importlib.metadata.version("editcore")
        plugins = [
            InstalledPlugin(entry, editcore_version=version, blocked=entry.name in blocked) for entry in entry_points
        ]
        return cls(sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution)))

    def editors(self) -> Mapping[str, EditorSpec]:
        """Choices of ``--editor``."""
        return self._registry(kinds.EDITOR)

    def editor(self, name: str) -> EditorSpec:
        """The editor of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(kinds.EDITOR, name)

    def backends(self) -> Mapping[str, BackendSpec]:
        """Choices of ``--backend``."""
        return self._registry(kinds.BACKEND)

    def backend(self, name: str) -> BackendSpec:
        """The backend of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(kinds.BACKEND, name)

    def attachments(self) -> Mapping[str, AttachmentSpec]:
        """Kinds of knowledge kept beside the weights."""
        return self._registry(kinds.ATTACHMENT)

    def attachment(self, kind: str) -> AttachmentSpec:
        """The kind of attachment of that name.

        Raises:
            UnknownNameError: there is none.
        """
        return self._find(kinds.ATTACHMENT, kind)

    def extensions(self) -> Mapping[str, ExtensionSpec]:
        """Choices of ``--plugin``."""
        return self._registry(kinds.EXTENSION)

    def extension(self, name: str) -> ExtensionSpec:
        """The extension of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(kinds.EXTENSION, name)

    def evaluators(self) -> Mapping[str, EvaluatorSpec]:
        """Choices of ``--evaluator``."""
        return self._registry(kinds.EVALUATOR)

    def evaluator(self, name: str) -> EvaluatorSpec:
        """The evaluator of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(kinds.EVALUATOR, name)

    def datasets(self) -> Mapping[str, DatasetSpec]:
        """Choices of ``--dataset``."""
        return self._registry(kinds.DATASET)

    def dataset(self, name: str) -> DatasetSpec:
        """The data set of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(kinds.DATASET, name)

    def executors(self) -> Mapping[str, ExecutorSpec]:
        """Choices of ``--executor``."""
        return self._registry(kinds.EXECUTOR)

    def executor(self, name: str) -> ExecutorSpec:
        """The executor of that name; :class:`UnknownNameError` says what is installed."""
        return self._find(kinds.EXECUTOR, name)

    def model_families(self) -> Mapping[str, ModelFamilySpec]:
        """Architectures whose module paths plugins announce."""
        return self._registry(kinds.MODEL_FAMILY)

    def family_paths(self) -> dict[str, dict[str, str]]:
        """Announced module paths, by ``config.model_type`` and by field of :class:`editcore.ModelLayout`."""
        paths: dict[str, dict[str, str]] = {}
        for spec in self.model_families().values():
            for model_type in spec.model_types:
                paths.setdefault(model_type, {}).update(spec.paths)
        return paths

    def commands(self) -> Mapping[str, CommandSpec]:
        """Subcommands that plugins add to ``editctl``."""
        return self._registry(kinds.COMMAND)

    def components(self, kind: str) -> Mapping[str, ComponentSpec]:
        """The parts offered for one extension point, such as ``"replay.strategy"``."""
        offers = [(plugin, spec) for plugin, spec in self._offers(kinds.COMPONENT) if spec.kind == kind]
        return _by_name(kind, offers)

    def component(self, kind: str, name: str) -> ComponentSpec:
        """The part of that name; :class:`UnknownNameError` says what is installed."""
        components = self.components(kind)
        if name not in components:
            raise UnknownNameError(kind, name, components)
        return components[name]

    def distributions_of(self, names: Collection[str]) -> set[str]:
        """The packages that offer the parts of a run with these names (an editor, an evaluator, ...), or components for
        them."""
        named_by_runs: tuple[Kind[Any], ...] = (
            kinds.EDITOR, kinds.BACKEND, kinds.EXTENSION, kinds.EVALUATOR, kinds.DATASET,
        )  # fmt: skip
        offers = [(plugin, spec.name) for kind in named_by_runs for plugin, spec in self._offers(kind)]
        components = [(plugin, spec.kind.partition(".")[0]) for plugin, spec in self._offers(kinds.COMPONENT)]
        return {plugin.distribution for plugin, name in [*offers, *components] if name in names}

    def named(self, name: str) -> list[Offer]:
        """Everything of that name. An editor and its attachment, for example, may share a name.

        Raises:
            UnknownNameError: nothing has that name.
        """
        offers = [(kind, plugin, spec) for kind in kinds.KINDS for plugin, spec in self._offers(kind)]
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

    def hint(self, name: str) -> str:
        """A hint about a name that is not registered as the kind that was asked for; empty if there is none."""
        namesakes = [(plugin, plugin.info()) for plugin in self._plugins if name in (plugin.name, plugin.distribution)]
        for plugin, info in namesakes:
            if info.status != "active":
                why = f"installed but {info.status}: {with_full_stop(info.reason)}"
                return f"The plugin '{info.name}' ({plugin.label}) is {why}"
        for kind in kinds.KINDS:
            if any(spec.name == name for _, spec in self._offers(kind)):
                return f"('{name}' is the name of {with_article(kind.word)}.)"
        for plugin, info in namesakes:
            offers = ", ".join(offer for names in info.offers.values() for offer in names) or "nothing"
            return f"(The plugin '{info.name}' of {plugin.label} offers: {offers}.)"
        return ""

    def _offers(self, kind: Kind[S]) -> list[tuple[InstalledPlugin, S]]:
        return [(plugin, spec) for plugin in self._plugins for spec in plugin.offers(kind)]

    def _registry(self, kind: Kind[S]) -> Mapping[str, S]:
        if kind.hook not in self._registries:
            self._registries[kind.hook] = _by_name(kind.word, self._offers(kind))
        return cast("Mapping[str, S]", self._registries[kind.hook])

    def _find(self, kind: Kind[S], name: str) -> S:
        registry = self._registry(kind)
        if name not in registry:
            raise UnknownNameError(
                kind.word, name, registry, hint=self.hint(name) or package_hint(kind, name, registry)
            )
        return registry[name]


def _by_name(word: str, offers: Iterable[tuple[InstalledPlugin, S]]) -> Mapping[str, S]:
    owners: dict[str, InstalledPlugin] = {}
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
