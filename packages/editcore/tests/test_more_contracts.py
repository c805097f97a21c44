"""The contract suites of evaluators, data sets and extensions notice what they are for.

Each plugin of ``toys/edit_broken`` breaks one clause on purpose and fails that one, and what cannot hold without it.

The suites run once, in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace as Outcomes

import pytest
from editcore.testing import DatasetContract, EvaluatorContract, ExtensionContract

Broken = Mapping[str, set[str]]

EVALUATORS: Broken = {
    "secret": {
        "test_it_observes_what_it_announces",
        "test_what_it_compares_with_may_come_from_a_file",  # there it has no name
    },
    "silent": {"test_every_announced_metric_is_observed"},
    "unsaid": {"test_what_a_metric_needs_is_said"},
    "modest": {"test_every_announced_metric_is_observed"},
    "boastful": {"test_values_are_finite_and_shares_are_parts_of_1"},
    "endless": {
        "test_values_are_finite_and_shares_are_parts_of_1",
        "test_records_that_lack_something_do_no_harm",  # so it is for those
    },
    "nosy": {
        "test_it_observes_only_what_it_was_asked",
        "test_records_that_lack_something_do_no_harm",  # they are asked one after the other
    },
    "moody": {"test_the_same_question_has_the_same_answer"},
    "training": {"test_the_model_stays_as_it_is"},
    "turning": {"test_the_model_stays_as_it_is"},
    "careless": {"test_a_failed_measurement_leaves_the_model_as_it_is"},
    "crashing": {"test_nothing_is_observed_of_no_records"},
    "demanding": {
        "test_records_that_lack_something_do_no_harm",
        "test_what_a_metric_needs_is_said",  # asked of a request alone
    },
    "dividing": {"test_composites_are_numbers"},
    "subtracting": {"test_composites_are_numbers"},
    "uncomparing": {"test_what_it_compares_with_is_announced"},
    "comparing": {"test_what_it_compares_with_is_announced"},
    "enriched": {"test_what_it_compares_with_may_come_from_a_file"},
    "keeping": {
        "test_what_it_compares_with_is_announced",
        # What another evaluator observed is nothing to it.
        "test_what_it_compares_with_may_come_from_a_file",
        "test_every_announced_metric_is_observed",
        "test_what_a_metric_needs_is_said",
        "test_the_same_question_has_the_same_answer",
    },
    "wordy": {"test_what_tells_of_a_fact_tells_once"},
}
DATASETS: Broken = {
    "subclassed": {
        "test_it_is_a_sequence_of_fact_records",
        "test_records_survive_json",  # they come back as plain ones
        "test_its_argument_is_a_setting",  # a run refuses them
    },
    "passing": {"test_it_is_a_sequence_of_fact_records"},
    "empty": {
        "test_it_is_a_sequence_of_fact_records",
        "test_its_argument_is_a_setting",  # a run refuses it
    },
    "repeated": {"test_ids_are_unique"},
    "tuples": {"test_records_survive_json"},
    "shuffled": {"test_the_content_is_the_same_every_time"},
    "drawn": {
        "test_the_content_is_the_same_every_time",
        "test_its_argument_is_a_setting",  # of the same records twice
    },
    "open-places": {"test_questions_are_whole"},
    "blank": {"test_questions_are_whole"},
    "misnamed": {"test_its_argument_is_a_setting"},
}
EXTENSIONS: Broken = {
    "unmarked": {"test_its_hooks_exist_and_are_marked"},
    "leaky": {"test_every_hook_leaves_the_model_as_it_is"},
    "shouting": {"test_statistics_are_numbers"},
    "inexact": {"test_statistics_are_numbers"},
    "inventing": {"test_what_it_adds_is_active"},
    "random": {
        "test_two_runs_are_alike",
        # Nor are runs with something between.
        "test_an_evaluation_changes_no_answer",
        "test_after_an_undo_it_is_as_if_the_edits_had_never_been_made",
        "test_after_a_redo_it_is_as_if_nothing_had_been_undone",
        "test_a_session_that_is_opened_again_goes_on_alike",
    },
    "measured": {"test_an_evaluation_changes_no_answer"},
    "deaf": {
        "test_after_an_undo_it_is_as_if_the_edits_had_never_been_made",
        "test_what_it_adds_is_active",
    },
    "final": {"test_after_a_redo_it_is_as_if_nothing_had_been_undone"},
    "newborn": {
        "test_a_session_that_is_opened_again_goes_on_alike",
        "test_after_an_undo_it_is_as_if_the_edits_had_never_been_made",  # held against such a session
    },
    "counting": {
        "test_a_session_that_is_opened_again_goes_on_alike",
        "test_after_an_undo_it_is_as_if_the_edits_had_never_been_made",  # what is undone was counted
    },
    "unsettling": {"test_conflicts_that_it_settles_are_settled"},
}
KINDS = {
    "evaluator": (EvaluatorContract, EVALUATORS, ("honest", "alone")),
    "dataset": (DatasetContract, DATASETS, ("honest", "without-settings")),
    "extension": (ExtensionContract, EXTENSIONS, ("honest", "settling")),
}
"""By kind: its suite, who breaks which of its clauses, who keeps them all."""
SHARED = {"test_announcement_imports_no_torch", "test_hparams_survive_json_and_refuse_unknown_names"}
"""What every suite has; ``test_contracts.py`` has those that break it."""

INSEPARABLE = {
    "test_records_that_lack_something_do_no_harm",
    "test_it_observes_what_it_announces",
    "test_it_observes_only_what_it_was_asked",
    "test_after_an_undo_it_is_as_if_the_edits_had_never_been_made",
    "test_a_session_that_is_opened_again_goes_on_alike",
    "test_two_runs_are_alike",
}
"""Clauses that nobody breaks without another one."""

HEAD = """
import copy
import pytest
from editcore.testing import DatasetContract, EvaluatorContract, ExtensionContract, tiny_model

BASE = tiny_model(num_layers=2, config={"intermediate_size": 32})  # finding its layout takes longer than most tests

class Quick:
    make_model = pytest.fixture(lambda self: lambda: copy.deepcopy(BASE))
    editor_hparams = pytest.fixture(lambda self: {"v_num_grad_steps": 2})
"""
PLAIN = "    hparams = pytest.fixture(lambda self: {})"
BODIES = {
    "modest": "    not_observed = frozenset({'cost'})",  # which is observed
    "alone": "    not_observed = frozenset({'never'})",
    "uncomparing": "    not_observed = frozenset({'never'})",
    "without-settings": PLAIN,
    "misnamed": "    hparams = pytest.fixture(lambda self: {'count': 12})",
}


def class_of(kind: str, name: str) -> str:
    return f"Test{kind.capitalize()}{name.title().replace('-', '')}"


def suite(kind: str, name: str) -> str:
    """The test class of a plugin's author."""
    offered = "honest" if name == "modest" else name
    body = BODIES.get(name, "    hparams = pytest.fixture(lambda self: {'count': 12})" if kind == "dataset" else PLAIN)
    return (
        f"class {class_of(kind, name)}(Quick, {kind.capitalize()}Contract):\n"
        f"    {kind}_name = pytest.fixture(lambda self: {offered!r})\n{body}\n"
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, run_suites: Callable[[Path, str], Outcomes]) -> Outcomes:
    """Everything in one run."""
    folder = tmp_path_factory.mktemp("theirs")
    info = folder / "edit_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-broken\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[editcore]\nbroken = edit_broken.plugin\n", encoding="utf-8")
    suites = [suite(kind, name) for kind, (_, broken, kept) in KINDS.items() for name in (*broken, *kept, "nobody")]
    (folder / "test_theirs.py").write_text("\n".join([HEAD, *suites]), encoding="utf-8")
    # A new process takes longer than all other tests of a class, and of these one would differ nowhere.
    return run_suites(folder, "not announcement_imports_no_torch or Honest")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (*_, kept) in KINDS.items() for name in kept])
def test_what_keeps_the_contract_passes(ran: Outcomes, kind: str, name: str) -> None:
    owner = class_of(kind, name)
    assert owner not in ran.failed
    assert owner not in ran.skipped
    clauses = {name for name in vars(KINDS[kind][0]) if name.startswith("test_")}
    assert ran.passed[owner] == clauses - (set() if name == "honest" else {"test_announcement_imports_no_torch"})


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (_, broken, _) in KINDS.items() for name in broken])
def test_what_breaks_a_clause_fails_it_and_no_other(ran: Outcomes, kind: str, name: str) -> None:
    assert ran.failed[class_of(kind, name)] == KINDS[kind][1][name]


@pytest.mark.parametrize("kind", KINDS)
def test_every_clause_is_broken_by_somebody(kind: str) -> None:
    contract, broken, _ = KINDS[kind]
    clauses = {name for name in vars(contract) if name.startswith("test_")}
    expected = clauses - SHARED - {"test_is_announced"}
    assert {clause for broke in broken.values() for clause in broke} == expected
    assert {clause for broke in broken.values() if len(broke) == 1 for clause in broke} == expected - INSEPARABLE


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_nobody_announces_fails(ran: Outcomes, kind: str) -> None:
    assert "test_is_announced" in ran.failed[class_of(kind, "nobody")]
    assert class_of(kind, "nobody") not in ran.passed
