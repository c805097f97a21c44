"""The public names are pinned, all of them load, and importing the package loads nothing heavy."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import pydoc
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import editcore
import pytest
from editcore.interfaces import hookspecs as _hookspecs
from editcore.interfaces.documented import documented
from pydantic import BaseModel

PUBLIC = [
    "AfterBatch",
    "AfterEvaluation",
    "AfterRun",
    "AfterSolve",
    "AfterUndo",
    "Attachment",
    "AttachmentKind",
    "AttachmentSpec",
    "Backend",
    "BackendContext",
    "BackendSpec",
    "BatchAddition",
    "BeforeApply",
    "BeforeBatch",
    "BeforeRun",
    "Capabilities",
    "Changes",
    "CommandSpec",
    "ComponentSpec",
    "DatasetError",
    "DatasetSpec",
    "DenseDelta",
    "EditBatch",
    "EditContext",
    "EditEvidence",
    "EditRequest",
    "EditSession",
    "EditcoreError",
    "Editor",
    "EditorSpec",
    "EvaluationContext",
    "Evaluator",
    "EvaluatorSpec",
    "Executor",
    "ExecutorSpec",
    "ExtensionContext",
    "ExtensionSpec",
    "FactRecord",
    "FactoredDelta",
    "HParams",
    "HParamsError",
    "HeldKey",
    "KnownTarget",
    "LanguageModel",
    "LedgerEntry",
    "LoadOptions",
    "MetricSpec",
    "ModelError",
    "ModelFamilySpec",
    "ModelLayout",
    "NumericalError",
    "Observation",
    "Outcome",
    "OverlaysWeights",
    "PluginError",
    "Plugins",
    "Probe",
    "Progress",
    "Proposal",
    "Registration",
    "RejectedRequest",
    "Rejection",
    "Remembers",
    "ReportsStatistics",
    "RequestError",
    "Resolves",
    "Rework",
    "RewritesPrompts",
    "RunError",
    "Sampling",
    "SessionConfig",
    "Signature",
    "SolvesAtStoredKeys",
    "StatisticsError",
    "StorageError",
    "SubjectNotFoundError",
    "TakesContext",
    "Trial",
    "UnknownNameError",
    "VectorDelta",
    "Verdict",
    "WeightChange",
    "Workspace",
    "Written",
    "as_change",
    "hookimpl",
    "workspace",
]


def test_public_names_are_pinned_and_sorted() -> None:
    assert editcore.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    fresh = [sys.executable, "-c", "import editcore; print(*dir(editcore))"]
    assert subprocess.run(fresh, check=True, capture_output=True, text=True).stdout.split() == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(editcore, name) is not None


def test_the_version_is_the_distributions() -> None:
    assert editcore.__version__ == importlib.metadata.version("editcore")


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="No editcore attribute Nonsense"):
        editcore.Nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_importing_what_plugins_need_loads_nothing_heavy() -> None:
    code = (
        "import sys; from editcore import EditorSpec, EditRequest, HParams, Plugins, Editor, hookimpl; "
        "from editcore import Evaluator, EvaluatorSpec, EvaluationContext, MetricSpec, Observation; "
        "Plugins.load().listing(); "
        "print(*sorted({'torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# The rooms

ROOMS = {
    "cli": """
        TerminalProgress loaded_plugins make_console print_table
    """,
    "datasets": """
        FORMAT Fields Finding Findings Format KnownFact ProfilesHParams Published Pulled Selection
        check_records check_requests content_hash dataset_name dataset_settings find_published findings_in is_path
        load_known_facts load_profiles load_records load_worldfacts parse_record published_files pull_file short_name
    """,
    "evaluation": """
        Average CAPABILITY COUNTERFACT CapabilityEvaluator CapabilityHParams CapabilityItem Chain ChainQuestion
        CounterFactEvaluator DAMAGE DEFAULT_EVALUATORS DamageEvaluator DamageHParams GENERATION
        GenerationEvaluator GenerationHParams LONG_ANSWERS LongAnswersEvaluator LongAnswersHParams MULTIHOP
        Measure Measurement MultihopEvaluator MultihopHParams PairedDifference Summary TEACHER_FORCED
        TargetScore TeacherForcedEvaluator average_of capability_items chains_of kl_divergences legend
        log_probabilities_after measure measures_of next_token_log_probabilities ngram_entropy objectives_of
        paired_differences perplexity retention_of rouge_l_recall score_targets shown
    """,
    "execution": """
        LOST LocalExecutor LocalHParams ModelSource attempt lost make_executor sharded_moments
    """,
    "figures": """
        AFTER BEFORE Estimate Series bars_figure curves_figure draw_run forgetting_figure forgetting_runs_figure
        layers_figure lines_figure new_figure per_relation_figure png save summary_figure tracing_figure
    """,
    "ledger": """
        Bisection Blame Comparison Contribution DELTAS_NAME HeaderLine LEDGER_NAME Ledger Verification
        write_ledger
    """,
    "locate_then_edit": """
        FactRows KeyWeighting LayerProblem LocateThenEdit LocateThenEditHParams OPENINGS Prepared ROLES ResidualKey
        ResidualKind Targets Tracing
        fact_rows optimise_plainly optimise_targets prefixes_can_be_cached sample_context_templates store_tracing
        stored_tracing traced_layer
    """,
    "models": """
        AnswerStore CATALOGUE CHECKS Captured CatalogueEntry DEFAULT_MODEL DTYPES EditedModel Encoded FactToken
        HubModel JsonServer LanguageModel LayerByLayerCapture LoadOptions ModelLayout PassBudget PromptForm
        RefusedError Sampling TargetTokens TokenRow Wheel add_changes asking_for_gradients attached_reason
        attention_output check_dtype check_layout continuation_row detect_layout dtype_of first_tensor hooks in_float64
        join_continuation last_index_covering local_gguf local_path logits_at look_at lookup_row misfits
        pad_rows plan_passes project pull pull_gguf replace_first rounded skip_first_blocks split_address
        stop_after target_losses target_tokens
    """,
    "onboarding": """
        Bench SEARCH TracingOptions Trial best candidate_layers preset_paths span_below trace tunable_editors
        write_presets
    """,
    "plugins": """
        Lifecycle Offer PluginInfo Plugins boundary code_versions lifecycle resolve
    """,
    "report": """
        PAGE_NAME REPORT_NAME Report make_report
    """,
    "runs": """
        AdapterReading BatchRecord BatchResult ChangedSides Checkpoint CheckpointHistory ComparedResults
        Composition Conflict EditPack EditSession Evaluated EvaluationPlan EvaluationRecord HarnessPlan
        HarnessScore MethodRecord ModelRecord Perplexity QuestionCounts REQUESTS_NAME RUN_NAME RawBackend
        RunConfig RunOptions RunRecord RunResult RunSummary Sample SessionConfig Target TargetOptions
        compare_results default_editor evaluate find_target folder_of has_begun is_finished json_text new_folder
        open_run open_session read_batches read_checkpoint_history read_pack read_requests record_text
        records_of refuse_existing replacing run statistics_of write_batches write_pack write_tensors write_text
    """,
    "second_moments": """
        Accumulator Corpus CorpusOptions Metric MomentKey StatisticsStore SubspaceMetric Update cached_moments hold_at
        norm_of_sum open_corpus second_moments solve_update
    """,
    "settings": """
        HParams Imported Layer Preset Setting build describe get_preset import_file layers_named list_presets
        load_preset model_stem own_folder parse_assignment parse_toml preset_for preset_models presets_of read_toml
        run_values to_toml toml_lines
    """,
    "sweeps": """
        Arm FAILURES_NAME Failure FigureSpec PLAN_NAME Plan PlanRecord Point STATE_NAME STUDY SWEEP_NAME State Sweep
        SweepFile SweepRecord SweepResult Trial UNEDITED Watch failure_of load_study load_sweep make_comparison
        make_plan run_sweep state_of trial_directory
    """,
    "testing": """
        AttachmentContract BackendContract DatasetContract EditorContract EvaluatorContract ExecutorContract
        ExtensionContract StandInServer TINY_FAMILIES TINY_MOE_FAMILIES check_presets repeating_model three_facts
        tiny_hf_model tiny_model tiny_records tiny_requests tiny_tokenizer
    """,
}
"""By room, what it lists: a name that is here is a promise (docs/explanation/compatibility.md)."""


def test_the_names_of_every_room_are_pinned() -> None:
    rooms = {path.parent.name for path in Path(editcore.__file__).parent.glob("*/__init__.pyi")}
    assert rooms - {"interfaces"} == set(ROOMS)
    for room, names in ROOMS.items():
        assert sorted(importlib.import_module(f"editcore.{room}").__all__) == names.split(), room


def test_interfaces_lists_what_editcore_does_of_it() -> None:
    """A plugin finds there what it is given, and hears of the rest by name."""
    listed = set(importlib.import_module("editcore.interfaces").__all__)
    modules = {name: getattr(getattr(editcore, name), "__module__", "") for name in PUBLIC}
    of_interfaces = {name for name, module in modules.items() if module.startswith("editcore.interfaces.")}
    assert of_interfaces <= listed


# What hooks and values have: it grows, and nothing of it goes

FIELDS = {
    "AfterBatch": "batch entry model proposal seconds",
    "AfterEvaluation": "model num_edits observations phase records scores",
    "AfterRun": "directory model num_edits records",
    "AfterSolve": "changes model",
    "AfterUndo": "history model redone undone",
    "Attachment": "fields kind tensors",
    "AttachmentSpec": "name summary target",
    "BackendContext": "directory metrics",
    "BackendSpec": "hparams name summary takes target writes_weights",
    "BatchAddition": "held known requests weights withdrawn",
    "BeforeApply": "batch model proposal trial without",
    "BeforeBatch": "batch model",
    "BeforeRun": "directory history model records",
    "Capabilities": """
        gives max_batch multi_layer needs_backend needs_plugins needs_subject rewrites_subject
        uses_held
    """,
    "CommandSpec": "name summary target",
    "ComponentSpec": "kind name summary target",
    "DatasetSpec": "argument hparams name summary target",
    "DenseDelta": "value",
    "EditBatch": "held index known num_new requests weights",
    "EditContext": "learnt plugins progress records seed statistics trial",
    "EditEvidence": "figures replayed request_id",
    "EditRequest": "id join prompt subject tags target_new target_true",
    "EditorSpec": "baseline capabilities hparams name preferred presets summary target",
    "EvaluationContext": "folder progress seed tell unedited",
    "EvaluatorSpec": "compares hparams metrics metrics_of name summary target",
    "ExecutorSpec": "hparams name summary target",
    "ExtensionContext": "capabilities plugins progress seed",
    "ExtensionSpec": "hparams name settles_conflicts summary target",
    "FactRecord": "extra probes relation request",
    "FactoredDelta": "left right",
    "HeldKey": "batch keys request_id weight",
    "KnownTarget": "figures keys values",
    "LedgerEntry": """
        attachment batch builds_on changes diagnostics evidence held known memory notes num_new reason rejected
        requests scale signature verdicts weights
    """,
    "LoadOptions": "chat_template device dtype trust_remote_code",
    "MetricSpec": """
        about average better caution checklist combine instead_of keep label meaning name needs objective of retention
        show signed tally unit
    """,
    "ModelFamilySpec": "model_types name paths summary target",
    "ModelLayout": """
        blocks d_ff d_model final_norm has_bias head norm_placement num_layers orientation post_norm
        projection residual_scale vocab_size
    """,
    "Observation": "kind metric prompt request_id text value",
    "Outcome": "attempts error index kind traceback value",
    "Probe": "answers kind prompt",
    "Proposal": "attachment changes diagnostics evidence known memory notes seconds",
    "RejectedRequest": "by figures reason request",
    "Rejection": "figures reason",
    "Rework": "changes diagnostics notes",
    "Sampling": "seed temperature top_k",
    "Signature": "author note time",
    "SessionConfig": """
        backend chat_template corpus corpus_seed corpus_tokens device dtype editor evaluators plugins preset seed
        settings
    """,
    "VectorDelta": "value",
    "Verdict": "action figures reason rejected scale",
    "Written": "attachment changes memory",
}
"""By class, the fields that plugins may read, or give by these names."""


def fields_of(described: type) -> set[str]:
    if dataclasses.is_dataclass(described):
        return {field.name for field in dataclasses.fields(described)}
    assert issubclass(described, BaseModel)
    return set(described.model_fields)


def with_fields(name: str) -> bool:
    value = getattr(editcore, name)
    return inspect.isclass(value) and (dataclasses.is_dataclass(value) or issubclass(value, BaseModel))


def test_fields_of_events_and_values_are_pinned() -> None:
    """A new field is added here with it. One that is missing breaks plugins: it waits for the next major version."""
    for name in [name for name in PUBLIC if with_fields(name)]:
        assert sorted(fields_of(getattr(editcore, name))) == FIELDS.get(name, "").split(), name


HOOKS = """
    editcore_after_batch editcore_after_evaluation editcore_after_run editcore_after_solve editcore_after_undo
    editcore_attachments editcore_backends editcore_before_apply editcore_before_batch editcore_before_run
    editcore_commands editcore_components editcore_datasets editcore_editors editcore_evaluators editcore_executors
    editcore_extensions editcore_model_families
"""


def test_hooks_are_pinned_and_take_one_event() -> None:
    families = (_hookspecs.RegistrationHooks, _hookspecs.LifecycleHooks)
    hooks = {name: hook for family in families for name, hook in vars(family).items() if name.startswith("editcore_")}
    assert sorted(hooks) == HOOKS.split()
    for name, hook in hooks.items():
        assert list(inspect.signature(hook).parameters) == ["self", "event"], name


# help()


def public_classes() -> list[tuple[str, type]]:
    """Every class that ``editcore`` or a room lists, once."""
    found: dict[type, str] = {}
    for module in ["editcore", *(f"editcore.{room}" for room in ("interfaces", *ROOMS))]:
        room = importlib.import_module(module)
        for name in room.__all__:
            if inspect.isclass(value := getattr(room, name)):
                found.setdefault(value, f"{module}.{name}")
    return [(name, value) for value, name in found.items()]


def meanings(described: type) -> dict[str, str]:
    """Of each field, the docstring that help() prints below it."""
    helped = [line.removeprefix(" |  ") for line in pydoc.plain(pydoc.render_doc(described)).splitlines()]
    found: dict[str, str] = {}
    name = ""
    for line in helped[helped.index("Fields:") + 1 :] if "Fields:" in helped else []:
        if line.startswith(" " * 8):
            found[name] += line.strip()
        elif line.startswith("    "):
            name = line.strip().partition(":")[0]
            found[name] = ""
        elif line.strip():
            break
    return found


def test_help_has_every_field_of_a_public_class_with_its_meaning() -> None:
    described = [
        (name, cls) for name, cls in public_classes() if dataclasses.is_dataclass(cls) or issubclass(cls, BaseModel)
    ]
    assert len(described) > 80
    for name, cls in described:
        found = meanings(cls)
        assert set(found) == fields_of(cls), name
        assert all(found.values()), f"{name}: {[field for field, said in found.items() if not said]}"


@pytest.mark.parametrize(
    ("room", "name", "fields"),
    [
        ("second_moments", "Metric", {"matrix", "subspace"}),
        (
            "models",
            "LanguageModel",
            {"hf", "tokenizer", "layout", "name", "hub", "weights", "prompt_form", "positions", "answers"},
        ),
        ("locate_then_edit", "LocateThenEdit", {"name", "right_from_keys"}),
    ],
)
def test_help_has_the_attributes_of_other_classes(room: str, name: str, fields: set[str]) -> None:
    found = meanings(getattr(importlib.import_module(f"editcore.{room}"), name))
    assert set(found) == fields
    assert all(found.values())


def test_every_public_class_and_function_says_what_it_is() -> None:
    for room in ("interfaces", *ROOMS):
        module = importlib.import_module(f"editcore.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                said = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
                assert said, f"{room}.{name}"
                # A dataclass without a docstring has its signature for one.
                assert not str(value.__doc__).startswith(f"{name}("), f"{room}.{name}"


def test_settings_of_a_plugin_are_in_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word of the plugin's, those that it inherits included."""
    source = '''
    from editcore.locate_then_edit import LocateThenEditHParams

    class ShyHParams(LocateThenEditHParams):
        shyness: float = 0.5
        """From 0 to 1.

        Source: made up."""
        plain: int = 1
    '''
    (tmp_path / "shy_hparams.py").write_text(textwrap.dedent(source), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    shy = importlib.import_module("shy_hparams").ShyHParams
    found = meanings(shy)
    assert found["layers"].startswith("Blocks whose MLP output projection is rewritten")
    assert found["shyness"] == "From 0 to 1.Source: made up."
    assert found["plain"] == ""
    assert list(found)[-2:] == ["shyness", "plain"]
    assert shy.__doc__.startswith("ShyHParams\n\nFields:\n    layers: ")


def test_a_class_without_source_keeps_its_own_words() -> None:
    made = documented(dataclasses.make_dataclass("Made", [("size", int)], namespace={"__doc__": "Has a size."}))
    assert made.__doc__ == "Has a size."
    assert made(size=1).__doc__ == "Has a size."  # type: ignore[call-arg]


def test_a_path_may_be_a_text() -> None:
    """Every public function that takes a path takes a text, too: its annotation says so, and mypy reads its body."""
    wrong = []
    for room in ("editcore", *(f"editcore.{name}" for name in ROOMS)):
        module = importlib.import_module(room)
        for name in module.__all__:
            found = getattr(module, name)
            functions = {name: found} if inspect.isfunction(found) else {}
            if inspect.isclass(found) and not issubclass(found, BaseException):
                functions = {
                    f"{name}.{key}": getattr(value, "__func__", value)
                    for key, value in vars(found).items()
                    if not key.startswith(("_", "test_")) and inspect.isfunction(getattr(value, "__func__", value))
                }
            for called, function in functions.items():
                for parameter in inspect.signature(function).parameters.values():
                    told = str(parameter.annotation)
                    if re.search(r"\bPath\b", told) and "str" not in told:
                        wrong.append(f"{room}: {called}({parameter})")
    assert wrong == []
