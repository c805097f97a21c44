"""Does what is served answer as the run does? First without the edits, then with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from editcore import FactoredDelta, LanguageModel, LoadOptions, ModelError, Plugins, Progress
from editcore.interfaces import silent
from editcore.ledger import Ledger
from editcore.models import JsonServer
from editcore.runs import RunRecord, open_run

from edit_lora.answers import Answer, ModelFolder, PeftFolder, Served
from edit_lora.comparison import EXACT, Grade, Prompt, Stage, compare
from edit_lora.config_file import CONFIG_NAME
from edit_lora.diagnosis import diagnose
from edit_lora.endpoints import open_endpoint
from edit_lora.export import build_adapter, recorded_facts
from edit_lora.gguf_kind import kind_of
from edit_lora.llama_server import llama_server
from edit_lora.place import Place, Sample, check_place

__all__ = ["Report", "verify"]

_TEXTS = (
    "The weather in the mountains was",
    "In the morning she went to the market and bought",
    "A good way to learn a language is",
    "The first chapter of the book begins with",
    "Water is made of",
    "He opened the door and saw",
    "To make a cup of tea, you need",
    "The committee decided that",
)
"""Ordinary text, which edits of facts should not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found."""

    base: Stage | None
    """Without the edits; ``None`` where the base is not served."""
    edited: Stage | None
    """With them; ``None`` if the base is another one."""
    fault: str | None = None
    """The fault of the adapter that explains the differences, in a sentence."""

    @property
    def grade(self) -> Grade:
        """``equal``, ``close`` (up to rounding) or ``different``."""
        return "different" if self.edited is None or self.fault is not None else self.edited.grade


def verify(
    run: Path,
    place: Place,
    *,
    sample: Sample | None = None,
    plugins: Plugins | None = None,
    progress: Progress = silent,
) -> Report:
    """Compare what is served with a run's own answers.

    Raises:
        RunError: there is no run.
        ModelError: the run's edits are kept beside the weights; or the place cannot be reached, read or run.
    """
    sample = sample or Sample()
    check_place(place)
    edited, _ = open_run(run, plugins=plugins, progress=progress)
    edited.check_all_in_weights("compared with what is served")
    prompts = _prompts(run, edited.model, sample)
    with _served(run, place, edited.model, plugins, progress) as served:
        base = None
        if served.has_base:
            with edited.unedited():
                base = compare(edited.model, served, prompts=prompts, tokens=sample.tokens, edited=False)
            if base.grade == "different":
                return Report(base=base, edited=None)
        stage = compare(edited.model, served, prompts=prompts, tokens=sample.tokens, edited=True, base=base)
    fault = None
    if stage.grade == "different" or _deviates_more(stage, base):
        fault = diagnose(edited, _changes(run, plugins, progress), stage, base)
    return Report(base=base, edited=stage, fault=fault)


def _deviates_more(stage: Stage, base: Stage | None) -> bool:
    """Whether the answers with the edits deviate more than rounding and those without explain."""
    noise = 0.0 if base is None or base.usual is None else base.usual
    return stage.usual is not None and stage.usual > max(EXACT, 1.5 * noise)


@contextlib.contextmanager
def _served(
    run: Path, place: Place, model: LanguageModel, plugins: Plugins | None, progress: Progress
) -> Iterator[Served]:
    if place.is_url:
        yield open_endpoint(place.server, model, name=place.name, base=place.base, merged=place.merged)
        return
    path = Path(place.target)
    if path.is_dir():
        record = RunRecord.read(run)
        options = LoadOptions(device=record.config.device, dtype=record.config.dtype)
        families = (plugins or Plugins.load()).family_paths()
        is_adapter = (path / CONFIG_NAME).is_file()
        source = record.source if is_adapter else str(path)
        loaded = LanguageModel.load(source, options, families=families, progress=progress)
        yield PeftFolder(path, loaded) if is_adapter else ModelFolder(loaded)
        return
    if kind_of(path) == "adapter":
        assert place.base_gguf is not None
        with llama_server(place.base_gguf, path) as url:
            yield open_endpoint(JsonServer(url=url, timeout=place.timeout), model)
        return
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(llama_server(file)) for file in (path, place.base_gguf) if file is not None]
        servers = [open_endpoint(JsonServer(url=url, timeout=place.timeout), model, merged=True) for url in urls]
        yield _TwoModels(servers)


class _TwoModels:
    """A whole edited model, and its base if that is there."""

    def __init__(self, servers: Sequence[Served]) -> None:
        self._edited, self._base = servers[0], servers[1:]

    @property
    def has_base(self) -> bool:
        """See :class:`edit_lora.answers.Served`."""
        return bool(self._base)

    def answers(self, rows: Sequence[Sequence[int]], *, tokens: int, edited: bool) -> list[Answer]:
        """See :class:`edit_lora.answers.Served`."""
        server = self._edited if edited else self._base[0]
        return server.answers(rows, tokens=tokens, edited=edited)


def _prompts(run: Path, model: LanguageModel, sample: Sample) -> list[Prompt]:
    records = recorded_facts(run)
    # Those in the model now: without undone ones, with those that sessions added.
    facts = [request.text for request in Ledger.read(run).facts()]
    # One neighbour of each fact, then the second of each, and so on.
    columns = [[probe.prompt for probe in record.of_kind("neighborhood")] for record in records]
    most = max((len(column) for column in columns), default=0)
    neighbours = [column[turn] for turn in range(most) for column in columns if turn < len(column)]
    chosen = (
        ("fact", facts[: sample.facts]),
        ("neighbour", list(dict.fromkeys(neighbours))[: sample.neighbours]),
        ("text", list(_TEXTS)),
    )
    return [
        Prompt(kind=kind, text=text, row=model.read_prompt(text)[0])  # type: ignore[arg-type]
        for kind, texts in chosen
        for text in texts
    ]


def _changes(run: Path, plugins: Plugins | None, progress: Progress) -> dict[str, FactoredDelta]:
    """What the run's adapter changes, by weight; nothing if the edits cannot be in an adapter."""
    try:
        built = build_adapter(run, plugins=plugins, progress=progress)
    except ModelError:
        return {}
    scale = built.hparams.lora_scale
    return {name: reduction.delta.scaled(scale) for name, reduction in built.modules.items()}
