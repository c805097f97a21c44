"""The formats in which facts are published, recognised by their fields.

| format | prompt | what to write |
|---|---|---|
| CounterFact, multi_counterfact, MQuAKE | ``requested_rewrite`` (an object, or in MQuAKE a list of them) | in it |
| plain, EasyEdit's CounterFact, KnowEdit, WikiBigEdit as EasyEdit has it | ``prompt`` | ``target_new`` |
| FastEdit, QAEdit | ``prompt`` | ``target`` |
| zsRE | ``src`` | ``alt``, or else ``answers`` |
| WikiBigEdit as it was published | ``update`` | ``ans`` |
| KnowEdit's WikiBio | ``text`` | ``labels`` |
| RippleEdits | ``edit``, an object | in it |
| HalluEditBench | ``question`` | ``object`` |
| UnKE, EditEverything | ``question`` | ``answer`` |
| a run's ``requests.jsonl`` | ``request``, an object | in it |

A prompt has a ``{}`` where the subject goes, or the subject itself, which then becomes the ``{}``. White space at its
ends is part of it. One exception: in CounterFact, MQuAKE and zsRE, a space at the end of a prompt is the space before
the answer, and is dropped.

Every question of a record becomes a probe, whose kind says what it tests. Fields that no format reads are counted by
name (:class:`Unread`), also fields inside others (``requested_rewrite.fact_new``), so that a caller can report what was
left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from editcore.datasets.fields import Fields, Unread
from editcore.datasets.flat import EASYEDIT, FASTEDIT, KNOWEDIT, PLAIN, QAEDIT, RUN, WIKIBIGEDIT, ZSRE, ZSRE_TRUE
from editcore.datasets.form import Format
from editcore.datasets.question_sets import HALLUEDITBENCH, UNKE
from editcore.datasets.rewrites import COUNTERFACT, MQUAKE
from editcore.datasets.ripple import RIPPLEEDITS
from editcore.interfaces.errors import PluginError, RequestError
from editcore.interfaces.specs import ComponentSpec
from editcore.interfaces.values import FactRecord
from editcore.plugins.calls import resolve

__all__ = ["BUILT_IN", "FORMAT", "Components", "formats_of", "parse_record"]

FORMAT = "dataset.format"
"""The kind of the components that are formats. Their target is a :class:`Format`."""

BUILT_IN: tuple[Format, ...] = (
    RUN, COUNTERFACT, MQUAKE, RIPPLEEDITS, HALLUEDITBENCH, UNKE, ZSRE_TRUE, ZSRE, WIKIBIGEDIT, KNOWEDIT, QAEDIT,
    FASTEDIT, EASYEDIT, PLAIN,
)  # fmt: skip
"""The formats of editcore itself, in the order in which they are asked whether a record is theirs."""


class Components(Protocol):
    """The part of :class:`editcore.Plugins` that has the formats."""

    def components(self, kind: str) -> Mapping[str, ComponentSpec]:
        """The parts offered for one extension point."""
        ...


def formats_of(plugins: Components) -> tuple[Format, ...]:
    """Every installed format. Those of other packages are asked first, because ``plain`` takes almost any record.

    Raises:
        PluginError: a format cannot be imported, or is none.
    """
    found = []
    for spec in plugins.components(FORMAT).values():
        form = resolve(spec.target)
        if not isinstance(form, Format):
            raise PluginError(f"The format '{spec.name}' is of type {type(form).__name__}; expected a Format.")
        found.append(form)
    return (*(form for form in found if form not in BUILT_IN), *BUILT_IN)


def parse_record(
    fields: Mapping[str, Any],
    unread: Unread | None = None,
    *,
    respelt: list[tuple[str, str]] | None = None,
    formats: Sequence[Format] = BUILT_IN,
    seen: Counter[Format] | None = None,
) -> list[FactRecord]:
    """The facts of one published record: one, or several for MQuAKE's chains of edits.

    Args:
        unread: a counter to which the fields that no format reads are added.
        respelt: a list to which each subject is added that differs from its spelling in the prompt only by case,
            Unicode form or spaces, together with that spelling. The request then has the spelling of the prompt. Left
            out, such a subject is not found.
        formats: the formats that are known; the first that claims the record reads it.
        seen: a counter to which the format of the record is added.

    Raises:
        RequestError: the format is not recognised, a field is missing or has the wrong type, the subject is not in the
            prompt, or a target is empty.
    """
    respelt_here: list[tuple[str, str]] | None = None if respelt is None else []
    remembered = Fields(fields, respelt_here)
    form = _recognised(remembered, formats)
    records = form.read(remembered)
    if seen is not None:
        seen[form] += 1
    if unread is not None:
        unread.update(list(remembered.unread()))
    if respelt is not None and respelt_here is not None:
        respelt += respelt_here
    return records


def _recognised(fields: Fields, formats: Sequence[Format]) -> Format:
    found = next((form for form in formats if form.claims(fields)), None)
    if found is not None:
        return found
    if {"prompt", "attribute"} <= fields.raw.keys():
        raise RequestError(
            "This is a true fact for tracing (known_1000), not an edit; 'editctl trace --facts' reads it."
        )
    if {"case_id", "portability"} <= fields.raw.keys():
        raise RequestError("These are further questions about a CounterFact record, not an edit: there is no target.")
    raise RequestError(
        f"This is not an edit in a known format; {fields.described()}. An edit has prompt, target_new and, for most "
        "editors, subject, or is a CounterFact, zsRE, KnowEdit, MQuAKE, WikiBigEdit, QAEdit, RippleEdits, UnKE, "
        "HalluEditBench or FastEdit record."
    )
