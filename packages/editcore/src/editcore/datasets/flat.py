"""Flat records: subject, prompt, target and probes under any of the published field names; and records of a run.

The formats differ in the names of their fields. One function reads them all; each is announced by itself, so that users
are told which it is, and what is peculiar to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from editcore.datasets import probes
from editcore.datasets.fields import Fields, identity_of, join_of, listed, without_last_space
from editcore.datasets.form import Format
from editcore.datasets.subjects import with_placeholder
from editcore.interfaces.errors import RequestError
from editcore.interfaces.values import EditRequest, FactRecord, first_problem

__all__ = ["EASYEDIT", "FASTEDIT", "KNOWEDIT", "PLAIN", "QAEDIT", "RUN", "WIKIBIGEDIT", "ZSRE", "ZSRE_TRUE"]

_TARGETS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("target_new", "target", "labels"),
    "src": ("alt", "answers"),
    "update": ("ans",),
    "text": ("labels", "target_new"),
}
"""For each field that may hold a flat record's prompt, the fields that may hold its target. The first one that is not
empty counts."""
_TRUE = ("target_true", "ground_truth", "answers")
"""Fields that may hold a flat record's true object."""


def _read_run(fields: Fields) -> list[FactRecord]:
    """A line of a run's ``requests.jsonl``, which is a record in editcore's own form."""
    try:
        return [FactRecord.model_validate(fields.read_all())]
    except ValidationError as error:
        raise RequestError(f"This is not a record of a run. {first_problem(error)}.") from error


def _read_flat(fields: Fields) -> list[FactRecord]:
    """A flat record: subject, prompt, target and probes, under any of the published field names.

    The subject may be left out, for editors that need none.

    For zsRE as MEND published it (``src``), the edit writes ``alt``, a wrong answer, as in EasyEdit; ``answers[0]`` is
    the true one. The ROME and MEMIT code writes ``answers[0]`` instead, which the model may know already, so numbers
    from the two cannot be compared. Without ``alt``, the edit writes ``answers[0]``.
    """
    prompt_field = fields.first(*_TARGETS)
    if prompt_field is None:
        raise RequestError(f"There is no prompt; it should be in {listed(_TARGETS)}; {fields.described()}.")
    target_field = fields.first(*_TARGETS[prompt_field])
    if target_field is None:
        raise RequestError(
            f"There is no target; with '{prompt_field}' it should be in {listed(_TARGETS[prompt_field])}; "
            f"{fields.described()}."
        )
    target_new = fields.answer(target_field)
    true_field = fields.first(*(name for name in _TRUE if name != target_field))
    target_true = None if true_field is None else fields.optional_answer(true_field)
    subject_field = fields.first("subject", "concept")
    subject = "" if subject_field is None else fields.optional_text(subject_field) or ""
    prompt = fields.prompt(prompt_field)
    if prompt_field == "src":  # zsRE
        prompt = without_last_space(prompt)
    identity, join = identity_of(fields), join_of(fields)
    subject, template = with_placeholder(fields, subject, prompt)
    record = FactRecord(
        request=EditRequest.create(
            subject=subject, prompt=template, target_new=target_new, target_true=target_true, join=join, id=identity
        ),
        relation=fields.optional_text("relation") or fields.optional_text("relation_id"),
        probes=tuple(probes.of_flat_record(fields, target_new, target_true)),
    )
    return [record]


def _is_plain(fields: Fields) -> bool:
    if "attribute" in fields.raw and fields.first(*_TARGETS["prompt"]) is None:
        return False  # known_1000
    return not fields.raw.keys().isdisjoint((*_TARGETS, "target_new", "labels"))


def _is_zsre(fields: Fields) -> bool:
    return "src" in fields.raw or {"answers", "loc", "target_new"} <= fields.raw.keys()


def _is_knowedit(fields: Fields) -> bool:
    lists = [fields.raw.get(name) for name in ("portability", "locality")]
    return {"text", "labels"} <= fields.raw.keys() or (
        _is_plain(fields) and any(isinstance(part, dict) and "New Question" not in part for part in lists)
    )


RUN = Format(
    title="a run's requests", claims=lambda fields: isinstance(fields.raw.get("request"), Mapping), read=_read_run
)
ZSRE_TRUE = Format(
    title="zsRE without counterfactual answers",
    claims=lambda fields: "src" in fields.raw and not fields.raw.get("alt"),
    read=_read_flat,
    caution="In zsRE records without 'alt', the edit writes answers[0], the true answer, as the first papers did; the "
    "model may know it already. Others, such as EasyEdit, write 'alt'. Their numbers cannot be compared.",
)
ZSRE = Format(
    title="zsRE",
    claims=_is_zsre,
    read=_read_flat,
    caution="In zsRE the edit writes the counterfactual answer ('alt'), and 'answers' is the true one, as in EasyEdit. "
    "The first papers wrote answers[0] instead, which the model may know. Their numbers cannot be compared.",
)
WIKIBIGEDIT = Format(title="WikiBigEdit", claims=lambda fields: "update" in fields.raw, read=_read_flat)
KNOWEDIT = Format(
    title="KnowEdit",
    claims=_is_knowedit,
    read=_read_flat,
    caution="In KnowEdit, locality questions whose answer is the true object ask the edited fact itself in other "
    "words. An edit that generalises changes them.",
)
QAEDIT = Format(title="QAEdit", claims=lambda fields: isinstance(fields.raw.get("locality"), list), read=_read_flat)
FASTEDIT = Format(title="FastEdit", claims=lambda fields: "queries" in fields.raw, read=_read_flat)
EASYEDIT = Format(
    title="EasyEdit",
    claims=lambda fields: (
        _is_plain(fields) and not fields.raw.keys().isdisjoint(("locality_prompt", "rephrase_prompt"))
    ),
    read=_read_flat,
)
PLAIN = Format(title="plain", claims=_is_plain, read=_read_flat)
