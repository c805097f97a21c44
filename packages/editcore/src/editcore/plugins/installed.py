"""One installed plugin: whether it may be imported, whether it works, and what it offers.

A plugin is an entry point of the group ``editcore``. It is not imported if it is named in ``EDITCORE_DISABLE_PLUGINS``
(names separated by commas), or if its distribution requires another editcore.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageMetadata
from typing import Literal, TypeVar, cast

import pluggy

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import EditcoreError
from editcore.interfaces.events import Registration
from editcore.interfaces.hookspecs import RegistrationHooks
from editcore.interfaces.specs import Spec
from editcore.plugins.calls import boundary, hooks_of
from editcore.plugins.kinds import KINDS, Kind, checked_specs

__all__ = ["DISABLE_VARIABLE", "InstalledPlugin", "PluginInfo"]

DISABLE_VARIABLE = "EDITCORE_DISABLE_PLUGINS"

_REQUIRES_EDITCORE = re.compile(r"editcore(?![\w.-])", re.IGNORECASE)

S = TypeVar("S", bound=Spec)

Status = Literal["active", "blocked", "incompatible", "broken"]


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


class InstalledPlugin:
    """One entry point. It is imported at once; each of its hooks is called when first asked for.

    Args:
        editcore_version: the version that the plugin's requirements are compared with.
        blocked: whether the plugin must not be imported.
    """

    def __init__(self, entry_point: EntryPoint, *, editcore_version: str, blocked: bool) -> None:
        self.name = entry_point.name
        # Read once: a distribution reads and parses its file at each of name, version and requires.
        metadata = entry_point.dist.metadata if entry_point.dist else None
        self.distribution = metadata["Name"] if metadata is not None else "unknown"
        self.version = metadata["Version"] if metadata is not None else ""
        self._problems: list[str] = []
        self._offers: dict[str, tuple[Spec, ...]] = {}
        self._not_imported: tuple[Status, str] | None = None
        if blocked:
            self._not_imported = ("blocked", f"named in {DISABLE_VARIABLE}")
        elif reason := _incompatibility(metadata, editcore_version):
            self._not_imported = ("incompatible", reason)
        self._hooks = None if self._not_imported else self._import(entry_point)

    @property
    def label(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}".rstrip()

    def offers(self, kind: Kind[S]) -> tuple[S, ...]:
        """What it announces of one kind; nothing if it was not imported or its hook is broken."""
        if kind.hook not in self._offers:
            self._offers[kind.hook] = self._call_hook(kind)
        return cast("tuple[S, ...]", self._offers[kind.hook])

    def info(self) -> PluginInfo:
        """Its line in the listing. This calls all of its registration hooks."""
        offers = {kind.hook: tuple(spec.name for spec in self.offers(kind)) for kind in KINDS}
        status, reason = self._not_imported or ("broken" if self._problems else "active", "; ".join(self._problems))
        return PluginInfo(
            name=self.name,
            distribution=self.distribution,
            version=self.version,
            status=status,
            reason=reason,
            offers={hook: names for hook, names in offers.items() if names},
        )

    def _import(self, entry_point: EntryPoint) -> pluggy.HookRelay | None:
        with self._problems_recorded(""):
            return hooks_of(entry_point.load(), self.name, specifications=RegistrationHooks)
        return None

    def _call_hook(self, kind: Kind[S]) -> tuple[S, ...]:
        if self._hooks is None:
            return ()
        with self._problems_recorded(f"{kind.hook}: "):
            answers = getattr(self._hooks, kind.hook)(event=Registration())
            return tuple(spec for answer in answers for spec in checked_specs(kind, answer))
        return ()

    @contextmanager
    def _problems_recorded(self, prefix: str) -> Iterator[None]:
        try:
            with boundary(""):
                yield
        except EditcoreError as error:
            self._problems.append(prefix + str(error))


def _incompatibility(metadata: PackageMetadata | None, version: str) -> str:
    """Why a distribution does not fit this editcore, and what would work; empty if it may be used.

    The requirement is the one that installers read (``Requires-Dist``). pip leaves a plugin in place when editcore is
    replaced beneath it. A distribution that requires no editcore may be used with any.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    lines = (metadata.get_all("Requires-Dist") or []) if metadata is not None else []
    for line in filter(_REQUIRES_EDITCORE.match, lines):
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            return f"its package requires '{line}', which cannot be read; install another version of the package"
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        # In older releases of packaging a development version fits no specifier without the flag.
        if applies and not requirement.specifier.contains(version, prereleases=True):
            wanted = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # ">=1,<2": the lower bound first
            found = f"it is made for editcore{wanted}, and editcore {version} is installed"
            return f'{found}; install another version of the plugin, or: pip install "editcore{wanted}"'
    return ""
