"""The contract suites notice what they are for: each class below breaks one clause on purpose and fails that one, and
what cannot hold without it.

The suites run once, in a process of their own, on plugins that are installed into a temporary folder. (``pytester`` in
this process would unload what the suites imported, which torch does not survive.)
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace as Outcomes

import pytest
from editcore.testing import BackendContract, EditorContract

RunSuites = Callable[[Path, str], Outcomes]

HONEST_EDITOR = '''
"""An editor that keeps the contract, and ones that each break a clause."""

import contextlib
import dataclasses

import torch

from editcore import Attachment, DenseDelta, EditEvidence, FactoredDelta, Proposal, RequestError
from editcore.locate_then_edit import LocateThenEdit, LocateThenEditHParams
from editcore.models import continuation_row


class Honest(LocateThenEdit):
    name = "honest"

    def __init__(self, hparams):
        super().__init__(LocateThenEditHParams(layers=(1,), v_num_grad_steps=4, context_templates=("{}",)))


def edited(model):
    return model.weight(model.layout.weight_name(1))


def with_changes(proposal, change):
    changes = {name: change(name, delta) for name, delta in proposal.changes.items()}
    return Proposal(changes=changes, evidence=proposal.evidence, known=proposal.known)


class Remembering(Honest):
    """Goes further with every batch that is active, as the ledger has it."""

    def recall(self, history):
        self.seen = len(history)

    def absorb(self, entry):
        self.seen += 1

    def propose(self, model, batch, context):
        seen = getattr(self, "seen", 0)  # nobody recalls anything outside a session
        return with_changes(super().propose(model, batch, context), lambda _, delta: delta.scaled(1 + 1e-3 * seen))


class Beside:
    """Keeps its edits beside the weights: a number that is added to the logit of each target's first token."""

    def __init__(self, hparams):
        self.hparams = hparams

    def prepare(self, model, context):
        return {}

    def propose(self, model, batch, context):
        if not len(batch):
            raise RequestError("The batch is empty.")
        rows = [continuation_row(model, request) for request in batch.requests]
        shift = torch.zeros(model.hf.config.vocab_size)
        shift[[row.targets[0] for row in rows]] = 1.0
        evidence = tuple(EditEvidence(request_id=request.id) for request in batch.requests)
        attachment = Attachment(kind="shift", tensors={"shift": shift}, fields={"facts": len(batch)})
        return Proposal(attachment=attachment, evidence=evidence)


class Shift:
    def install(self, model, attachments):
        total = sum(attachment.tensors["shift"] for attachment in attachments)
        head = model.hf.get_output_embeddings()
        self.handle = head.register_forward_hook(lambda _module, _inputs, logits: logits + total.to(logits))

    def remove(self):
        self.handle.remove()


class Leaky(Honest):
    """Leaves the edited weight changed."""

    def propose(self, model, batch, context):
        proposal = super().propose(model, batch, context)
        edited(model).add_(1e-3)
        return proposal


class Hooked(Honest):
    """Leaves a hook behind."""

    def propose(self, model, batch, context):
        proposal = super().propose(model, batch, context)
        model.block(0).register_forward_hook(lambda *_: None)
        return proposal


class Careless(Honest):
    """Restores the weight only if nothing goes wrong."""

    def propose(self, model, batch, context):
        saved = edited(model).clone()
        edited(model).mul_(1.0001)
        proposal = super().propose(model, batch, context)
        edited(model).copy_(saved)
        return proposal


class Silent(Honest):
    """Says nothing about what it did."""

    def propose(self, model, batch, context):
        proposal = super().propose(model, batch, context)
        return Proposal(changes=proposal.changes)


class Alias(Honest):
    """Answers with a factor that is the model's own memory: W (W⁺ Δ) = Δ for a weight of full row rank."""

    def propose(self, model, batch, context):
        def alias(name, delta):
            weight = model.as_out_in(name, model.weight(name))
            return FactoredDelta(weight, torch.linalg.pinv(weight.double()) @ delta.dense())

        proposal = with_changes(super().propose(model, batch, context), alias)
        return with_changes(proposal, lambda _, delta: FactoredDelta(delta.left, delta.right.float()))


class Stray(Honest):
    """Changes another weight when it looks at the model."""

    def prepare(self, model, context):
        provenance = super().prepare(model, context)
        model.weight(model.layout.weight_name(2)).mul_(1.0001)
        return provenance


class Random(Honest):
    """Draws from the process's generator."""

    def propose(self, model, batch, context):
        def shaken(_, delta):
            # One factor for all would be one of nine float32 numbers: twice the same, now and then.
            return FactoredDelta(delta.left * (1 + 1e-6 * torch.rand_like(delta.left)), delta.right)

        return with_changes(super().propose(model, batch, context), shaken)


class Noisy(Honest):
    """Keeps what it drew from the process's generator."""

    def propose(self, model, batch, context):
        return dataclasses.replace(super().propose(model, batch, context), memory={"noise": torch.rand(3)})


class Counting(Honest):
    """Goes further with every batch that it was asked for, whatever became of it."""

    asked = 0

    def propose(self, model, batch, context):
        self.asked += 1
        factor = 1 + 1e-3 * self.asked
        return with_changes(super().propose(model, batch, context), lambda _, delta: delta.scaled(factor))


class Undeclared(Honest):
    """Gives dense changes and announces thin ones."""

    def propose(self, model, batch, context):
        return with_changes(super().propose(model, batch, context), lambda _, delta: DenseDelta(delta.dense()))


class Idle(Honest):
    """Writes nothing."""

    def propose(self, model, batch, context):
        proposal = super().propose(model, batch, context)
        return with_changes(proposal, lambda _, delta: FactoredDelta(delta.left * 0, delta.right))


class Small(Honest):
    """Takes fewer facts than it says."""

    def propose(self, model, batch, context):
        if len(batch) > 2:
            raise RequestError("no more than two")
        return super().propose(model, batch, context)


class Eager(Honest):
    """Answers when nothing was asked."""

    def propose(self, model, batch, context):
        if not len(batch):
            return Proposal()
        return super().propose(model, batch, context)


class Base:
    """A backend that keeps the contract, summing anew from the base each time."""

    def open(self, model):
        self.model, self.active = model, []
        self.base = {name: weight.clone() for name, weight in model.hf.named_parameters()}

    def apply(self, changes):
        self.rebuild([*self.active, changes])

    def rebuild(self, active):
        self.active = list(active)
        for name, base in self.base.items():
            total = base.clone()
            for changes in self.active:
                if name in changes:
                    total += self.model.as_out_in(name, changes[name].dense())
            self.model.weight(name).copy_(total)

    @contextlib.contextmanager
    def trial(self, changes):
        before = self.active
        self.rebuild([*before, changes])
        try:
            yield
        finally:
            self.rebuild(before)


class Meddling(Base):
    """Changes a weight in its last bits when it takes over."""

    def open(self, model):
        edited(model).mul_(1 + 1e-12)
        super().open(model)


class Forgetful(Base):
    """Knows the last batch only."""

    def rebuild(self, active):
        super().rebuild(active[-1:])


class Greedy(Base):
    """Changes the embedding of a token that no test reads."""

    def rebuild(self, active):
        super().rebuild(active)
        if active:
            self.model.hf.get_input_embeddings().weight[-1] += 1


class Subtracting(Base):
    """Takes several batches out by subtraction."""

    def rebuild(self, active):
        if active or len(self.active) < 2:
            return super().rebuild(active)
        for changes in self.active:
            for name, change in changes.items():
                self.model.weight(name).sub_(self.model.as_out_in(name, change.dense()))
        self.active = []


class Sticky(Base):
    """Keeps what was applied when it rebuilds with fewer."""

    def rebuild(self, active):
        kept = [changes for changes in self.active if not any(changes is other for other in active)]
        super().rebuild([*kept, *active] if 1 < len(active) < len(self.active) else active)


class Sorting(Base):
    """Rebuilds in an order of its own."""

    def apply(self, changes):
        super().rebuild([*self.active, changes])

    def rebuild(self, active):
        super().rebuild(sorted(active, key=min))  # by the first weight, which batches mostly come in


class Lingering(Base):
    """Takes what was on trial out by subtraction."""

    @contextlib.contextmanager
    def trial(self, changes):
        self.add(changes, 1)
        try:
            yield
        finally:
            self.add(changes, -1)

    def add(self, changes, sign):
        for name, change in changes.items():
            self.model.weight(name).add_(sign * self.model.as_out_in(name, change.dense()))


class Hasty(Base):
    """Ends a trial only if nothing goes wrong in it."""

    @contextlib.contextmanager
    def trial(self, changes):
        before = self.active
        self.rebuild([*before, changes])
        yield
        self.rebuild(before)


class Rounding(Base):
    """Sums in float64, and tries a change on top of what is rounded already."""

    def rebuild(self, active):
        self.active = list(active)
        for name, base in self.base.items():
            total = base.double()
            for changes in self.active:
                if name in changes:
                    total = total + self.model.as_out_in(name, changes[name].dense()).double()
            self.model.weight(name).copy_(total)

    @contextlib.contextmanager
    def trial(self, changes):
        saved = {name: self.model.weight(name).clone() for name in changes}
        for name, change in changes.items():
            self.model.weight(name).add_(self.model.as_out_in(name, change.dense()))
        try:
            yield
        finally:
            for name, bits in saved.items():
                self.model.weight(name).copy_(bits)


class Lonely(Base):
    """Tries a change without what is active."""

    @contextlib.contextmanager
    def trial(self, changes):
        before = self.active
        self.rebuild([changes])
        try:
            yield
        finally:
            self.rebuild(before)


class Deaf(Base):
    """Takes dense changes and does nothing with them."""

    def rebuild(self, active):
        super().rebuild([{n: change for n, change in changes.items() if change.kind != "dense"} for changes in active])


class Baking(Base):
    """Leaves behind what it wrote for saving."""

    @contextlib.contextmanager
    def written(self):
        edited(self.model).mul_(1 + 1e-12)
        yield


class Box(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Wrapping(Base):
    """Wraps a module and does not say so, which renames its weight in what is saved."""

    def rebuild(self, active):
        super().rebuild(active)
        parent, _, child = self.model.layout.projection.format(1).rpartition(".")
        module = self.model.projection(1)
        inner = module.inner if isinstance(module, Box) else module
        setattr(self.model.hf.get_submodule(parent), child, Box(inner) if active else inner)
'''

HPARAMS = '''
"""Hyperparameters of the editors; imports no torch."""

from editcore import HParams
from pydantic import ConfigDict, field_serializer


class BrokenHParams(HParams):
    strength: float = 1.0
    """How much."""


class Lossy(BrokenHParams):
    """Rounds what it writes."""

    @field_serializer("strength")
    def rounded(self, value: float) -> float:
        return float(round(value))


class Lax(BrokenHParams):
    """Ignores what it does not know."""

    model_config = ConfigDict(extra="ignore")
'''

PLUGIN = """
from editcore import AttachmentSpec, BackendSpec, Capabilities, EditorSpec, hookimpl

EDITORS = {editors!r}
BACKENDS = {backends!r}

def editor(name, hparams):
    limit = 2 if name == "limited" else None
    gives = frozenset(["attachment" if name == "beside" else "factored"])
    target = "Honest" if name in ("honest", "limited", "lossy", "lax", "heavy") else name.capitalize()
    return EditorSpec(name, "broken_parts:" + target, hparams=hparams, summary="A method.",
                      capabilities=Capabilities(max_batch=limit, gives=gives))

@hookimpl
def editcore_editors():
    return [editor(name, hparams) for name, hparams in EDITORS.items()]

@hookimpl
def editcore_backends():
    return [
        BackendSpec(name, "broken_parts:" + name.capitalize(), summary="A backend.", takes=frozenset(takes))
        for name, takes in BACKENDS.items()
    ]

@hookimpl
def editcore_attachments():
    return [AttachmentSpec("shift", "broken_parts:Shift", summary="Makes tokens likelier.")]
"""

PLAIN = "broken_hparams:BrokenHParams"
EDITORS: Mapping[str, str] = {
    **dict.fromkeys(["honest", "limited", "leaky", "hooked", "careless", "silent", "alias", "stray"], PLAIN),
    **dict.fromkeys(["random", "idle", "small", "eager"], PLAIN),
    **dict.fromkeys(["remembering", "beside", "noisy", "counting", "undeclared"], PLAIN),
    "lossy": "broken_hparams:Lossy",
    "lax": "broken_hparams:Lax",
    "heavy": "heavy_hparams:BrokenHParams",
}
BACKENDS: Mapping[str, tuple[str, ...]] = {
    "base": ("factored", "dense", "vector"),
    **dict.fromkeys(["meddling", "forgetful", "greedy", "subtracting", "sticky", "sorting"], ("factored",)),
    **dict.fromkeys(["baking", "wrapping", "lingering", "hasty", "rounding", "lonely"], ("factored",)),
    "deaf": ("factored", "dense"),
}
"""What each takes."""


def install(folder: Path) -> None:
    """A distribution whose plugin offers everything above."""
    (folder / "broken_parts.py").write_text(HONEST_EDITOR, encoding="utf-8")
    (folder / "broken_hparams.py").write_text(HPARAMS, encoding="utf-8")
    (folder / "heavy_hparams.py").write_text("import torch\nfrom broken_hparams import BrokenHParams\n", "utf-8")
    plugin = PLUGIN.format(editors=dict(EDITORS), backends=dict(BACKENDS))
    (folder / "broken_plugin.py").write_text(plugin, encoding="utf-8")
    info = folder / "edit_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edit-broken\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[editcore]\nbroken = broken_plugin\n", encoding="utf-8")


def contract_class(name: str, kind: str, body: str) -> str:
    return f"""
class Test{name.capitalize()}({kind.capitalize()}Contract):
    @pytest.fixture
    def {kind}_name(self):
        return {name!r}

    {body}
"""


def theirs() -> str:
    """The test file of a plugin's author."""
    setting = "hparams = pytest.fixture(lambda self: {'strength': 0.25})"
    float64 = "make_model = pytest.fixture(lambda self: lambda: tiny_model(dtype=torch.float64))"
    parts = [
        "import pytest, torch",
        "from editcore.testing import BackendContract, EditorContract, tiny_model",
        *(contract_class(name, "editor", setting) for name in [*EDITORS, "missing"]),
        *(contract_class(name, "backend", float64) for name in BACKENDS),
        override("Declared", XFAIL, "assert False"),
        override("Outdated", XFAIL, "super().test_is_announced(registry, editor_name)"),
    ]
    return "\n".join(parts)


OVERRIDE = """
class TestNAME(EditorContract):
    editor_name = pytest.fixture(lambda self: "honest")
    hparams = pytest.fixture(lambda self: {})

    MARK
    def test_is_announced(self, registry, editor_name):
        BODY
"""
XFAIL = "@pytest.mark.xfail(reason='why', strict=True)"


def override(name: str, mark: str, body: str) -> str:
    return OVERRIDE.replace("NAME", name).replace("MARK", mark).replace("BODY", body)


# A new process takes longer than all other tests of a class, and only one class differs there.
SELECTED = (
    "(not announcement_imports_no_torch or TestHeavy or TestHonest or TestBase) and "
    "(not TestDeclared and not TestOutdated or test_is_announced)"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, run_suites: RunSuites) -> Outcomes:
    """Everything in one run."""
    folder = tmp_path_factory.mktemp("theirs")
    install(folder)
    (folder / "test_theirs.py").write_text(theirs(), encoding="utf-8")
    return run_suites(folder, SELECTED)


BROKEN_EDITORS = {
    "leaky": "test_propose_leaves_the_model_unchanged",
    "hooked": "test_propose_leaves_the_model_unchanged",
    "careless": "test_a_failed_propose_leaves_the_model_unchanged",
    "silent": "test_a_proposal_is_complete",
    "alias": "test_a_proposal_can_be_applied_and_taken_back",
    "stray": "test_other_weights_stay_as_they_are",
    "random": "test_the_same_seed_gives_the_same_bits",
    "noisy": "test_the_same_seed_gives_the_same_bits",
    "counting": "test_what_is_remembered_is_what_the_ledger_has",
    "undeclared": "test_a_proposal_is_complete",
    "idle": "test_the_target_becomes_likelier",
    "small": "test_a_long_list_is_edited_in_batches_that_it_takes",
    "eager": "test_an_empty_batch_is_refused",
    "lossy": "test_hparams_survive_json_and_refuse_unknown_names",
    "lax": "test_hparams_survive_json_and_refuse_unknown_names",
    "heavy": "test_announcement_imports_no_torch",
}
BROKEN_BACKENDS = {
    "meddling": "test_opening_changes_nothing",
    "forgetful": "test_the_effect_is_that_of_the_weight_change",
    "greedy": "test_other_weights_stay_as_they_are",
    "subtracting": "test_the_base_comes_back_to_the_bit",
    "sticky": "test_rebuilding_is_a_fresh_start",
    "sorting": "test_order_is_kept",
    "baking": "test_saving_leaves_the_model_as_it_is",
    "wrapping": "test_what_was_saved_loads_as_the_edited_model",
    "lingering": "test_a_trial_is_the_state_after_it_and_leaves_nothing",
    "hasty": "test_a_trial_is_the_state_after_it_and_leaves_nothing",
    "lonely": "test_a_trial_is_the_state_after_it_and_leaves_nothing",
    "rounding": "test_a_trial_in_bfloat16_is_rounded_as_what_is_applied",
    "deaf": "test_every_kind_that_it_takes_has_its_effect",
}
ALSO: Mapping[str, set[str]] = {
    # What is drawn anew each time is not what was drawn before an undo, either.
    "random": {"test_what_is_remembered_is_what_the_ledger_has"},
    "noisy": {"test_what_is_remembered_is_what_the_ledger_has"},
    # What is on trial is the sum of other batches than those that are written.
    "sticky": {"test_a_trial_in_bfloat16_is_rounded_as_what_is_applied"},
    "lonely": {"test_a_trial_in_bfloat16_is_rounded_as_what_is_applied"},
    # A session refuses the proposal, so every test that opens one fails.
    "undeclared": {
        "test_other_weights_stay_as_they_are",
        "test_what_is_remembered_is_what_the_ledger_has",
        "test_a_long_list_is_edited_in_batches_that_it_takes",
    },
}
"""Clauses that cannot hold where another one is broken."""


@pytest.mark.parametrize("name", ["honest", "limited", "remembering", "beside", "base"])
def test_what_keeps_the_contract_passes(ran: Outcomes, name: str) -> None:
    owner = f"Test{name.capitalize()}"
    assert owner not in ran.failed
    assert owner not in ran.skipped
    assert len(ran.passed[owner]) >= 9


@pytest.mark.parametrize(("name", "clause"), [*BROKEN_EDITORS.items(), *BROKEN_BACKENDS.items()])
def test_what_breaks_one_clause_fails_that_one(ran: Outcomes, name: str, clause: str) -> None:
    assert ran.failed[f"Test{name.capitalize()}"] == {clause} | ALSO.get(name, set())


def test_every_clause_is_broken_by_somebody() -> None:
    for contract, broken in ((EditorContract, BROKEN_EDITORS), (BackendContract, BROKEN_BACKENDS)):
        clauses = {name for name in vars(contract) if name.startswith("test_")}
        shared = {"test_announcement_imports_no_torch", "test_hparams_survive_json_and_refuse_unknown_names"}
        # A name that is not announced fails at once; what both suites share is broken by the editors.
        expected = clauses - {"test_is_announced"} - (shared if contract is BackendContract else set())
        assert set(broken.values()) == expected


def test_a_name_that_nobody_announces_fails(ran: Outcomes) -> None:
    assert "test_is_announced" in ran.failed["TestMissing"]
    assert "TestMissing" not in ran.passed


def test_a_test_may_be_switched_off_in_the_open(ran: Outcomes) -> None:
    assert ran.skipped["TestDeclared"] == {"test_is_announced"}


def test_one_that_passes_after_all_has_to_be_switched_on_again(ran: Outcomes) -> None:
    assert ran.failed["TestOutdated"] == {"test_is_announced"}


def define(source: str) -> None:
    exec(f"import pytest\nfrom editcore.testing import EditorContract\n{source}", {"__name__": "test_theirs"})


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "@pytest.mark.skip(reason='slow')",
        "@pytest.mark.xfail",
        "@pytest.mark.xfail(strict=True)",
        "@pytest.mark.xfail(reason='why')",
        "@pytest.mark.xfail(False, reason='why', strict=True)",
        "@pytest.mark.xfail(reason='why', strict=True)\n    @pytest.mark.skip",
    ],
)
def test_a_silent_override_is_refused(mark: str) -> None:
    with pytest.raises(TypeError, match="TestHonest overrides the standard test test_is_announced"):
        define(override("Honest", mark, "assert False"))


@pytest.mark.parametrize(
    "source",
    [
        "class TestHonest(EditorContract):\n    test_is_announced = None",
        "class Mixin:\n    def test_is_announced(self): pass\nclass TestHonest(Mixin, EditorContract): pass",
        "class TestHonest(EditorContract):\n    pytestmark = pytest.mark.skip(reason='slow')",
        "class TestHonest(EditorContract):\n    pytestmark = [pytest.mark.xfail]",
    ],
)
def test_other_ways_to_switch_off_are_refused_too(source: str) -> None:
    with pytest.raises(TypeError, match=r"TestHonest (overrides the standard test|switches all standard tests off)"):
        define(source)


def test_tests_and_marks_of_ones_own_are_welcome() -> None:
    define(
        "class TestMine(EditorContract):\n"
        "    pytestmark = pytest.mark.filterwarnings('error')\n"
        "    def test_something_else(self): pass"
    )


def test_tiny_models_need_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; from editcore.testing import tiny_model"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
