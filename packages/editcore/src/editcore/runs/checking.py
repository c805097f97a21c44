"""Asks an edited model again: its facts, other subjects, the rest of what it knows about the edited ones, and a text.

Answers of the unedited model are kept beside the directory's edits (``unedited.json``), because they stay the same: a
second check asks the unedited model only what the first did not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from editcore._util.records import Record, read_record
from editcore.datasets.load import load_worldfacts
from editcore.evaluation.generation import is_said
from editcore.evaluation.scoring import score_targets
from editcore.evaluation.text import perplexity
from editcore.interfaces.documented import documented
from editcore.interfaces.errors import RunError
from editcore.interfaces.progress import Progress, silent
from editcore.interfaces.values import FactRecord
from editcore.models.options import LoadOptions
from editcore.plugins.registry import Plugins
from editcore.runs.check_record import Answers, CheckRecord, LostFact
from editcore.runs.held_out import TEXT_TOKENS, HeldOutText
from editcore.runs.record import RunRecord, active_facts
from editcore.runs.resume import refuse_unfinished
from editcore.second_moments.corpora import open_corpus

if TYPE_CHECKING:
    from editcore.models import LanguageModel
    from editcore.models.edited import EditedModel

__all__ = ["CheckOptions", "check_model", "check_pack", "check_unwritable"]

UNEDITED_NAME = "unedited.json"
_ANSWER_TOKENS = 8
"""Tokens that are shown of an answer."""
_SAMPLE_TOKENS = 40
"""Tokens of a longer continuation."""
_NEIGHBOURS = ("neighborhood", "locality")
"""Kinds of probes that are about other subjects."""
_SUBJECTS = 20
"""Most subjects that are asked what no edit is about."""
_OPENINGS = ("The most important thing about", "In the morning, she", "Scientists have found that")
"""Beginnings of the longer continuations, which are about nothing that is edited."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What a check asks, beside the facts."""

    neighbours: int = 100
    """Prompts about other subjects: those of the facts' own records first, then facts of the data set ``worldfacts``
    whose subjects are not edited."""
    text: str = "docs"
    """The text for the perplexity, as :func:`editcore.second_moments.open_corpus` knows it."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of it, from its start."""
    seed: int = 0
    """Of the choice of neighbours and subjects."""


class _Unedited(Record):
    """What the unedited model says."""

    answers: Mapping[str, str] = {}
    """By prompt, the likeliest next token."""
    continuations: Mapping[str, str] = {}
    """By prompt, a longer continuation."""
    texts: Mapping[str, HeldOutText] = {}
    """Texts with their perplexity."""


def check_model(
    edited: EditedModel,
    facts: Sequence[FactRecord],
    options: CheckOptions | None = None,
    *,
    changes: int,
    directory: Path | None = None,
    progress: Progress = silent,
) -> CheckRecord:
    """Ask an edited model everything.

    Args:
        facts: the active facts, with their probes.
        changes: as in :attr:`CheckRecord.changes`.
        directory: where answers of the unedited model are kept; ``None`` to keep none.

    Raises:
        StatisticsError: the text cannot be read or is too short.
    """
    options = options or CheckOptions()
    model = edited.model
    neighbours = _neighbours(facts, options)
    subjects = _about_subjects(facts, options)
    asked = [*neighbours, *subjects]
    corpus = open_corpus(options.text)
    name = f"{corpus.identity()}, {options.text_tokens} tokens"

    kept = _Unedited() if directory is None else _kept(directory)
    with edited.unedited():
        answers = {**kept.answers, **_next(model, [prompt for prompt in asked if prompt not in kept.answers])}
        openings = [opening for opening in _OPENINGS if opening not in kept.continuations]
        continuations = {**kept.continuations, **_continued(model, openings, _SAMPLE_TOKENS)}
        text = kept.texts.get(name)
        if text is None:
            text = HeldOutText.measured(model, corpus, tokens=options.text_tokens, progress=progress)
        if directory is not None:
            kept = _Unedited(answers=answers, continuations=continuations, texts={**kept.texts, name: text})
            kept.write_file(directory / UNEDITED_NAME)
    now = _next(model, asked)
    moved = {prompt for prompt in asked if now[prompt] != answers[prompt]}
    before, after = {}, {}
    if moved:
        wanted = [prompt for prompt in asked if prompt in moved]
        with edited.unedited():
            before = _continued(model, wanted, _ANSWER_TOKENS)
        after = _continued(model, wanted, _ANSWER_TOKENS)

    def changed(prompts: Iterable[str]) -> tuple[Answers, ...]:
        return tuple(
            Answers(prompt=prompt, before=before[prompt], after=after[prompt]) for prompt in prompts if prompt in moved
        )

    longer = _continued(model, _OPENINGS, _SAMPLE_TOKENS)
    return CheckRecord(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        changes=changes,
        facts=len(facts),
        lost=_lost(model, facts, progress),
        neighbours=len(neighbours),
        moved=changed(neighbours),
        subjects=len(subjects),
        subjects_moved=changed(subjects),
        text=text.source,
        tokens=text.tokens,
        perplexity_ratio=perplexity(model, text.ids, window=text.window, progress=progress) / text.perplexity,
        samples=tuple(
            Answers(prompt=opening, before=continuations[opening], after=longer[opening]) for opening in _OPENINGS
        ),
    )


def check_pack(
    path: Path,
    model: str,
    options: CheckOptions,
    *,
    plugins: Plugins,
    device: str | None = None,
    progress: Progress = silent,
) -> CheckRecord:
    """Ask a model with the edits of a pack everything. Its weights have the type that the pack names.

    Args:
        model: the base model, as :meth:`editcore.LanguageModel.load` knows it.

    Raises:
        RunError: the file is no pack, or was made for another model.
    """
    from editcore.models import LanguageModel
    from editcore.runs.pack import read_pack

    pack = read_pack(path)
    load = LoadOptions(device=device or "cpu", dtype=pack.manifest.dtype, chat_template=pack.manifest.chat_template)
    loaded = LanguageModel.load(model, load, families=plugins.family_paths(), progress=progress)
    edited = pack.apply(loaded, plugins)
    latest = {request.fact_key: request for request in pack.requests}
    facts = [FactRecord(request=request) for request in latest.values()]
    return check_model(edited, facts, options, changes=len(pack.manifest.batches), progress=progress)


def check_unwritable(
    directory: Path,
    options: CheckOptions,
    *,
    plugins: Plugins,
    device: str | None = None,
    progress: Progress = silent,
) -> CheckRecord:
    """Ask the model of a run directory everything, and keep nothing: for a directory that cannot be written.

    Raises:
        RunError: there is no run directory, or its run is not finished.
    """
    from editcore.runs.reopening import open_run

    refuse_unfinished(directory, RunRecord.read(directory))
    edited, ledger = open_run(directory, device=device, plugins=plugins, progress=progress)
    return check_model(edited, active_facts(directory, ledger), options, changes=len(ledger.events), progress=progress)


def _kept(directory: Path) -> _Unedited:
    try:
        return read_record(directory / UNEDITED_NAME, _Unedited)
    except RunError:  # there is none, or it is damaged: asked again
        return _Unedited()


def _lost(model: LanguageModel, facts: Sequence[FactRecord], progress: Progress) -> tuple[LostFact, ...]:
    requests = [fact.request for fact in facts]
    found = score_targets(
        model,
        [request.text for request in requests],
        [request.target_new for request in requests],
        joins=[request.join for request in requests],
        progress=progress,
        description="Asking the facts",
    )
    lost = [(request, target) for request, target in zip(requests, found, strict=True) if not target.correct]
    if not lost:
        return ()
    answers = model.generate([request.text for request, _ in lost], max_new_tokens=2 * _ANSWER_TOKENS)
    return tuple(
        LostFact(
            id=request.id,
            prompt=request.text,
            target_new=request.target_new,
            probability=math.exp(-target.nll),
            said=answer,
            in_answer=is_said([request.target_new], answer),
        )
        for (request, target), answer in zip(lost, answers, strict=True)
    )


def _neighbours(facts: Sequence[FactRecord], options: CheckOptions) -> list[str]:
    """Prompts about subjects that no fact is about."""
    edited = {fact.request.subject_key for fact in facts}
    probes = (probe for fact in facts for kind in _NEIGHBOURS for probe in fact.of_kind(kind))
    own = list(dict.fromkeys(probe.prompt for probe in probes))
    others = [record.request for record in load_worldfacts()]
    more = list(dict.fromkeys(request.text for request in others if request.subject_key not in edited))
    chance = random.Random(options.seed)
    chance.shuffle(own)
    chance.shuffle(more)
    half = options.neighbours // 2
    first = own[: max(half, options.neighbours - len(more))]
    return [*first, *(prompt for prompt in more if prompt not in first)][: options.neighbours]


def _about_subjects(facts: Sequence[FactRecord], options: CheckOptions) -> list[str]:
    """The beginnings of sentences about the edited subjects, which leave open what is said of them."""
    names = {fact.request.subject_key: fact.request.subject for fact in facts if fact.request.subject}
    asked = {fact.request.text for fact in facts}
    prompts = [f"{name} is a" for name in names.values() if f"{name} is a" not in asked]
    random.Random(options.seed).shuffle(prompts)
    return prompts[:_SUBJECTS]


def _next(model: LanguageModel, prompts: Sequence[str]) -> dict[str, str]:
    return _continued(model, prompts, 1)


def _continued(model: LanguageModel, prompts: Sequence[str], tokens: int) -> dict[str, str]:
    if not prompts:
        return {}
    return dict(zip(prompts, model.generate(prompts, max_new_tokens=tokens), strict=True))
