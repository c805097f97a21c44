"""Announcements: light descriptions of what plugins offer.

A registration hook returns these instead of classes, so that listing plugins imports nothing heavy. ``target`` and
``hparams`` are ``"module:Class"`` strings, imported when the thing is used for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from editcore.interfaces.documented import documented
from editcore.interfaces.metrics import MetricSpec, check_metrics

__all__ = [
    "AttachmentSpec",
    "BackendSpec",
    "Capabilities",
    "CommandSpec",
    "ComponentSpec",
    "DatasetSpec",
    "EditorSpec",
    "EvaluatorSpec",
    "ExecutorSpec",
    "ExtensionSpec",
    "ModelFamilySpec",
    "Spec",
]


@documented
@dataclass(frozen=True, slots=True)
class Spec:
    """The fields of every announcement."""

    name: str
    """The word users type. Lower case, digits and hyphens; unique within its kind."""
    target: str
    """``"module:attribute"``, imported on first use."""
    summary: str = field(kw_only=True)
    """One sentence for listings."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an editor can do and what it needs, so that core never has to know an editor by name."""

    max_batch: int | None = None
    """Most requests solved together; ``None`` for no limit. A longer batch is split by the session."""
    gives: frozenset[str] = frozenset({"factored"})
    """What its proposals may hold: ``factored``, ``dense`` and ``vector`` changes, ``attachment``. A run whose backend
    does not take all of them is refused before the model is loaded."""
    needs_subject: bool = True
    """True if every request must name a subject."""
    needs_plugins: tuple[str, ...] = ()
    """Extensions that it needs; a run gets them even if the user does not name them."""
    needs_backend: str | None = None
    """The backend that it needs; a run gets it even if the user does not name it."""
    uses_held: bool = False
    """True if the solve leaves the keys in ``EditBatch.held`` alone."""
    rewrites_subject: bool = False
    """True if a new fact about a subject replaces what earlier edits made the model say of it, unless the batch has
    their facts, too. The session then adds them to the batch (:attr:`EditBatch.requests`, behind the new ones)."""
    multi_layer: bool = False
    """True if one edit may touch several layers."""


@documented
@dataclass(frozen=True, slots=True)
class EditorSpec(Spec):
    """A method that turns requests into proposals. ``target`` is an :class:`editcore.Editor`."""

    hparams: str = field(kw_only=True)
    """``"module:Class"`` of its :class:`editcore.HParams`; that module imports no torch."""
    capabilities: Capabilities = field(default_factory=Capabilities, kw_only=True)
    """Its abilities and needs."""
    presets: str | None = field(default=None, kw_only=True)
    """Package whose ``*.toml`` resources are presets, one file per model (``"edit_rome.presets"``)."""
    preferred: bool = field(default=False, kw_only=True)
    """Whether it comes before others where nobody names an editor. Set it for an editor that is good for any use."""
    baseline: bool = field(default=False, kw_only=True)
    """Whether it is what other editors are held against. A comparison shows it right behind the unedited model."""


@documented
@dataclass(frozen=True, slots=True)
class BackendSpec(Spec):
    """A way to put changes of weights into a model. ``target`` is an :class:`editcore.Backend`."""

    hparams: str | None = field(default=None, kw_only=True)
    """``"module:Class"`` of its :class:`editcore.HParams`; ``None`` if it has none."""
    takes: frozenset[str] = field(default=frozenset({"factored"}), kw_only=True)
    """The changes that it accepts: ``factored``, ``dense``, ``vector``; and ``attachment``, if knowledge may be kept
    beside its model."""
    writes_weights: bool = field(default=True, kw_only=True)
    """True if the edits are in the model's weights, or get there in ``written()``
    (:class:`editcore.OverlaysWeights`). Otherwise the edited model cannot be saved, merged or packed."""


@documented
@dataclass(frozen=True, slots=True)
class AttachmentSpec(Spec):
    """A kind of knowledge kept beside the weights. ``name`` is the kind; ``target`` is an
    :class:`editcore.AttachmentKind`, called without arguments."""


@documented
@dataclass(frozen=True, slots=True)
class ExtensionSpec(Spec):
    """A companion of a run that listens to the lifecycle hooks. ``target`` is called with ``(hparams, context)``."""

    hparams: str | None = field(default=None, kw_only=True)
    """``"module:Class"`` of its :class:`editcore.HParams`; ``None`` if it has none."""
    settles_conflicts: bool = field(default=False, kw_only=True)
    """True if it decides, before each batch, about requests that repeat or contradict others. A run then gives it all
    records, instead of the last one per fact."""


@documented
@dataclass(frozen=True, slots=True)
class EvaluatorSpec(Spec):
    """A measurement of an edited model. ``target`` is an :class:`editcore.Evaluator`.

    Raises:
        ValueError: the metrics do not go together.
    """

    metrics: tuple[MetricSpec, ...] = field(kw_only=True)
    """What it observes, in the order in which tables and pictures show it."""
    hparams: str | None = field(default=None, kw_only=True)
    """``"module:Class"`` of its :class:`editcore.HParams`; ``None`` if it has none."""
    metrics_of: str | None = field(default=None, kw_only=True)
    """``"module:function"`` that is called with its hyperparameters and returns further metrics, which it observes only
    with these settings; ``None`` for none. They follow ``metrics`` wherever the settings are known."""
    compares: bool = field(default=False, kw_only=True)
    """True if it reads its observations of the unedited model (:attr:`editcore.EvaluationContext.unedited`). The
    unedited model is then measured wherever they are not known."""

    @property
    def about_model(self) -> bool:
        """Whether all its metrics are about the model as a whole."""
        return all(metric.about == "model" for metric in self.metrics)

    def __post_init__(self) -> None:
        check_metrics(self.metrics)


@documented
@dataclass(frozen=True, slots=True)
class DatasetSpec(Spec):
    """A source of fact records. ``target`` returns a sequence of ``FactRecord``. It is called with its hyperparameters,
    or without arguments if it has none."""

    hparams: str | None = field(default=None, kw_only=True)
    """``"module:Class"`` of its :class:`editcore.HParams`; ``None`` if it has none."""
    argument: str = field(default="", kw_only=True)
    """The hyperparameter that ``--dataset NAME:ARGUMENT`` sets; empty if the data set takes no argument."""

    def __post_init__(self) -> None:
        if self.argument and self.hparams is None:
            raise ValueError(f"the data set '{self.name}' has the argument '{self.argument}' and no hyperparameters")


@documented
@dataclass(frozen=True, slots=True)
class ExecutorSpec(Spec):
    """A place where independent trials run. ``target`` is called with its hyperparameters."""

    hparams: str | None = field(default=None, kw_only=True)
    """``"module:Class"`` of its :class:`editcore.HParams`; ``None`` if it has none."""


@documented
@dataclass(frozen=True, slots=True)
class ModelFamilySpec(Spec):
    """Module paths of an architecture whose structure cannot be detected.

    ``target`` is unused by most families and may be empty. ``paths`` overrides what detection would find, by the field
    names of :class:`editcore.ModelLayout` (``blocks``, ``projection``, ``final_norm``, ``head``).
    """

    model_types: tuple[str, ...] = field(kw_only=True)
    """The ``config.model_type`` values that it is for."""
    paths: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Module paths by field of :class:`editcore.ModelLayout`, with ``{}`` for the number of a block."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", MappingProxyType(dict(self.paths)))


@documented
@dataclass(frozen=True, slots=True)
class CommandSpec(Spec):
    """A subcommand of ``editctl``. ``target`` is a ``typer.Typer`` application."""


@documented
@dataclass(frozen=True, slots=True)
class ComponentSpec(Spec):
    """A named part of an extension point that a plugin defines itself.

    ``kind`` names the extension point, with the plugin's name in front: ``"replay.strategy"``. The plugin that owns the
    kind looks its components up with ``Plugins.components(kind)``.
    """

    kind: str = field(kw_only=True)
    """The extension point: words of lower-case letters and digits, joined by dots or hyphens."""
