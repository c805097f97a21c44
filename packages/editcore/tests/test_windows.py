"""Long targets in windows, against a plain loop in float64 over one window after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from editcore import (
    EditBatch,
    EditorSpec,
    EditRequest,
    EditSession,
    HParams,
    HParamsError,
    LanguageModel,
    Plugins,
    RequestError,
    SessionConfig,
)
from editcore.locate_then_edit import LocateThenEditHParams, fact_rows
from editcore.locate_then_edit.key_memory import KeyMemory
from editcore.locate_then_edit.windows import Windows
from editcore.models.tokens import continuation_row, lookup_row
from editcore.runs import RunConfig, records_of
from editcore.runs.facts import recorded_editor
from editcore.runs.fit import check_subjects, needs_subject
from editcore.runs.resolved import editor_settings
from editcore.settings import build
from editcore.testing import tiny_model, tiny_requests, tiny_tokenizer
from torch import Tensor

LONG = tiny_requests(1)[0].model_copy(
    update={"target_new": "Paris and works as a painter in Rome", "target_true": None}
)
SHORT = tiny_requests(3)[1:]
CONTEXTS = ("{}", "I said so. {}")
SETTINGS: dict[str, Any] = {
    "layers": [1],
    "context_templates": list(CONTEXTS),
    "key_weighting": "prompt",
    "mom2_adjustment": False,
    "v_num_grad_steps": 4,
    "v_lr": 0.2,
    "v_stop_loss": 0.0,
    "v_weight_decay": 0.0,
    "target_window": 3,
}

Open = Callable[..., EditSession]


@pytest.fixture
def open_session() -> Open:
    """Opens a session of a locate-then-edit editor on a tiny model in float64."""

    def make(editor: str = "emmet", directory: Path | None = None, **changes: Any) -> EditSession:
        settings = {**SETTINGS, **changes}
        return EditSession.open(
            tiny_model("llama", dtype=torch.float64),
            SessionConfig(editor=editor, settings={editor: settings}),
            directory=directory,
        )

    return make


def outputs(
    model: LanguageModel, ids: tuple[int, ...], added: dict[int, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """log p behind every token, and the output of the edited projection at every token, with δ at some."""
    seen: list[Tensor] = []

    def hook(_module: object, _args: object, output: Tensor) -> Tensor:
        seen.append(output[0].detach())
        moved = output.clone()
        for place, delta in (added or {}).items():
            moved[0, place] = moved[0, place] + delta
        return moved

    handle = model.projection(1).register_forward_hook(hook)
    logits = model.hf(input_ids=torch.tensor([ids])).logits[0]
    handle.remove()
    return logits.double().log_softmax(-1), seen[0]


def plain_windows(model: LanguageModel, request: EditRequest, size: int, steps: int) -> list[Tensor]:
    """δ of one window after the other; those before it are in place. Adam on the mean over contexts of −log p."""
    rows = [continuation_row(model, request, template=template) for template in CONTEXTS]
    length = len(rows[0].targets)
    found: list[Tensor] = []
    for start in range(0, length, size):
        end = min(start + size, length)
        delta = torch.zeros(model.layout.d_model, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=SETTINGS["v_lr"])
        for _ in range(steps):
            losses = []
            for row in rows:
                first = row.target_start
                added = {first + number * size - 1: earlier for number, earlier in enumerate(found)}
                log_p, _ = outputs(model, row.ids[: first + end], {**added, first + start - 1: delta})
                said = [log_p[first + place - 1, row.ids[first + place]] for place in range(start, end)]
                losses.append(-torch.stack(said).mean())
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            adam.step()
        found.append(delta.detach())
    return found


def test_each_window_is_written_at_the_token_before_it(open_session: Open) -> None:
    """One layer, constraints met exactly: W' k = W k + δ at the last token of the prompt and of every window but the
    last, with δ from the plain loop."""
    session = open_session(clamp_norm_factor=100.0)
    model = tiny_model("llama", dtype=torch.float64)
    row = continuation_row(model, LONG)
    count = -(-len(row.targets) // 3)
    assert count >= 3, "several windows, and the last one shorter"
    assert len(row.targets) % 3
    [result] = session.edit([LONG])
    expected = plain_windows(model, LONG, 3, steps=3)
    _, before = outputs(model, row.ids)
    _, after = outputs(session.model, row.ids)
    for number, delta in enumerate(expected):
        place = row.target_start + 3 * number - 1
        torch.testing.assert_close(after[place] - before[place], delta.double(), rtol=1e-3, atol=1e-4)
    [evidence] = result.proposal.evidence
    assert evidence.request_id == LONG.id
    assert (evidence.figures["windows"], evidence.figures["steps"]) == (count, 3.0 * count)
    assert result.proposal.known == {}


def test_the_whole_target_becomes_more_likely_than_without_windows(open_session: Open) -> None:
    def likelihood(model: LanguageModel) -> float:
        row = continuation_row(model, LONG)
        log_p, _ = outputs(model, row.ids)
        places = torch.arange(row.target_start, len(row.ids))
        return float(log_p[places - 1, torch.tensor(row.targets)].mean())

    found = {}
    for window in (3, None):
        session = open_session(v_num_grad_steps=20, v_lr=0.5, fact_token="last", target_window=window)
        found["before"] = likelihood(session.model)
        session.edit([LONG])
        found[window] = likelihood(session.model)
    assert found[3] > found[None] + 0.5 > found["before"] + 0.5


@pytest.mark.parametrize(
    ("editor", "own"),
    [
        ("rome", {"key_mode": "original"}),
        ("rome", {"key_mode": "mean", "key_weighting": "mean"}),
        ("memit", {"layers": [0, 1], "first_token_layers": None}),
        ("memit", {"layers": [0, 1], "first_token_layers": None, "layer_rule": "blue", "memory": "keys"}),
        ("emmet", {}),
        ("alphaedit", {"mom2_adjustment": True}),
    ],
    ids=str,
)
def test_every_editor_writes_short_and_long_targets_together(
    open_session: Open, editor: str, own: dict[str, Any]
) -> None:
    session = open_session(editor, **own)
    before = {name: tensor.clone() for name, tensor in session.model.hf.state_dict().items()}
    session.edit([LONG, *SHORT])
    figures = {
        evidence.request_id: evidence.figures for entry in session.ledger.history() for evidence in entry.evidence
    }
    assert figures.keys() == {LONG.id, *(request.id for request in SHORT)}
    assert [name for name, found in figures.items() if "windows" in found] == [LONG.id]
    assert all(found["said_probability"] > 0 for found in figures.values())
    for request in (LONG, *SHORT):
        session.undo(request.id)
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.hf.state_dict().items())


def test_a_batch_without_its_long_target_is_as_if_that_had_not_come(open_session: Open) -> None:
    session, alone = open_session(), open_session()
    session.edit([LONG, *SHORT])
    session.undo(LONG.id)
    alone.edit(SHORT)
    name = alone.model.layout.weight_name(1)
    torch.testing.assert_close(session.model.weight(name), alone.model.weight(name), rtol=1e-4, atol=1e-5)
    session.redo(LONG.id)
    session.undo(SHORT[0].id)
    others = open_session()
    others.edit([LONG, SHORT[1]])
    torch.testing.assert_close(session.model.weight(name), others.model.weight(name), rtol=1e-3, atol=1e-4)


def test_a_target_that_fits_a_window_is_written_as_without(open_session: Open) -> None:
    sessions = [open_session(target_window=window) for window in (3, None)]
    for session in sessions:
        session.edit(SHORT)
    name = sessions[0].model.layout.weight_name(1)
    assert torch.equal(*(session.model.weight(name) for session in sessions))


def test_windows_of_one_fact_are_facts_of_their_own(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one subject, and still no common value; and their fact is rewritten once."""
    rewritten: list[Any] = []
    sum_at = KeyMemory.sum_at

    def watched(self: KeyMemory, *values: Any, **options: Any) -> Any:
        rewritten.extend(options["rewritten"])
        return sum_at(self, *values, **options)

    monkeypatch.setattr(KeyMemory, "sum_at", watched)
    session = open_session("memit-seq", shared_key_cosine=1e-6)
    [result] = session.edit([LONG])
    assert "facts_of_value" not in result.proposal.evidence[0].figures
    assert rewritten == [LONG.fact_key]


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(open_session: Open, tmp_path: Path) -> None:
    whole, part = open_session(directory=tmp_path / "whole"), open_session(directory=tmp_path / "part")
    whole.edit([LONG, *SHORT], batch_size=1)
    part.edit([LONG])
    part.close()
    resumed = open_session(directory=tmp_path / "part")
    resumed.edit(SHORT, batch_size=1)
    name = whole.model.layout.weight_name(1)
    assert torch.equal(whole.model.weight(name), resumed.model.weight(name))


def test_without_a_subject_the_last_token_of_the_prompt_is_looked_up() -> None:
    model = tiny_model("gpt2")
    request = EditRequest(subject="", prompt="The old town lies by the", target_new="river")
    row = lookup_row(model, request, fact_token="last")
    assert row.ids == tuple(model.tokenizer(request.text)["input_ids"])
    assert row.lookup == len(row.ids) - 1
    behind = continuation_row(model, request, template="I said so. {}", fact_token="last")
    assert behind.lookup == behind.target_start - 1


SUBJECTLESS = EditRequest(subject="", prompt="The old town lies by the", target_new="river", id="no-subject")


@pytest.mark.parametrize(
    ("editor", "own"),
    [
        ("rome", {}),
        ("memit", {"layers": [0, 1]}),
        ("memit-seq", {}),
        ("emmet", {"kl_factor": 0.5}),
        ("alphaedit", {"mom2_adjustment": True}),
        ("memory", {}),
    ],
    ids=str,
)
def test_every_editor_writes_a_fact_without_a_subject_at_the_last_token(
    open_session: Open, editor: str, own: dict[str, Any]
) -> None:
    own = {"fact_token": "last", "target_window": None, "v_num_grad_steps": 8, "v_lr": 0.5, **own}
    session = open_session(editor, **own)
    before = {name: tensor.clone() for name, tensor in session.model.hf.state_dict().items()}
    settings = LocateThenEditHParams.model_validate({"layers": (1,), "kl_factor": 0.5, "fact_token": "last"})
    [fact] = fact_rows(session.model, [SUBJECTLESS], CONTEXTS, settings)
    assert fact.essence is None, "'{subject} is a' has no meaning"
    row = continuation_row(session.model, SUBJECTLESS, fact_token="last")
    start, _ = outputs(session.model, row.ids)
    session.edit([SUBJECTLESS, *SHORT])
    painter = EditRequest(subject="", prompt="The young painter lives in", target_new="Rome", id="other")
    session.edit([painter])
    assert session.ledger.history()[-1].builds_on == (), "two facts without a subject have none in common"
    after, _ = outputs(session.model, row.ids)
    target = (row.target_start - 1, row.targets[0])
    assert after[target] > start[target] + 0.5
    for request in (painter, SUBJECTLESS, *SHORT):
        session.undo(request.id)
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.hf.state_dict().items())


def test_such_facts_are_refused_where_the_settings_do_not_ask_for_it(open_session: Open) -> None:
    with pytest.raises(RequestError, match=r"needs a subject in every request; 1 of 1 have none"):
        open_session(target_window=None).edit([SUBJECTLESS])
    open_session().edit([SUBJECTLESS])  # target_window asks for it
    spec = Plugins.load().editor("emmet")
    for settings, needed in (({}, True), ({"fact_token": "last"}, False), ({"target_window": 9}, False)):
        assert needs_subject(spec, build(LocateThenEditHParams, [{"layers": [1], **settings}], owner="emmet")) == needed
    assert needs_subject(spec, None)
    assert not needs_subject(Plugins.load().editor("ft"), None)


@pytest.mark.parametrize(("settings", "count"), [({}, 2), ({"fact_token": "last"}, 3), ({"target_window": 9}, 3)])
def test_a_run_takes_facts_without_a_subject_if_its_settings_do(
    tmp_path: Path, settings: dict[str, object], count: int
) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(fact.model_dump_json(exclude={"tags"}) + "\n" for fact in [*SHORT, SUBJECTLESS]))
    options = {"editor": "emmet", "dataset": str(path), "settings": {"emmet": {"layers": [1], **settings}}}
    plugins = Plugins.load()
    config = RunConfig.create(options, plugins)
    records, notes = records_of(config, plugins)
    assert len(records) == count
    assert len(notes) == (0 if count == 3 else 1)
    check_subjects([record.request for record in records], *recorded(config, plugins))


def recorded(config: RunConfig, plugins: Plugins) -> tuple[EditorSpec, HParams | None]:
    """The editor as ``run.json`` has it, with settings that are complete."""
    own = editor_settings(plugins, config, config.model)
    assert own is not None
    record = SimpleNamespace(config=config, settings={"emmet": own.model_dump(mode="json")})
    found: tuple[EditorSpec, HParams | None] = recorded_editor(plugins, record)  # type: ignore[arg-type]
    assert found[1] == own
    return found


def test_new_windows_stand_before_those_of_replayed_facts() -> None:
    model = tiny_model("llama")
    again = LONG.model_copy(update={"id": "again"})
    batch = EditBatch(index=0, requests=(SHORT[0], LONG, again, SHORT[1]), weights=(1.0, 1.0, 2.0, 3.0), num_new=2)
    cut, windows = Windows.cut(model, batch, 3)
    count = len(windows) // 2
    ids = [f"{name}#{number}" for name in (LONG.id, "again") for number in range(count)]
    assert [request.id for request in cut.requests] == [SHORT[0].id, *ids, SHORT[1].id]
    assert cut.num_new == 1 + count
    assert cut.weights == (*[1.0] * (1 + count), *[2.0] * count, 3.0)
    assert Windows.cut(model, batch, None) == (batch, {})


def test_the_token_that_ends_an_answer_belongs_to_the_last_window() -> None:
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    model.tokenizer.chat_template = "{% for turn in messages %}<{{ turn.content }}</s>{% endfor %}"
    model.use_chat_template()
    assert model.prompt_form.end
    settings = LocateThenEditHParams.model_validate({**SETTINGS, "layers": (1,), "context_templates": CONTEXTS})
    batch, windows = Windows.cut(model, EditBatch.of((LONG,)), 3)
    targets = [
        fact.contexts[1].targets for fact in fact_rows(model, batch.requests, CONTEXTS, settings, windows=windows)
    ]
    [whole] = fact_rows(model, [LONG], CONTEXTS, settings)
    assert tuple(token for part in targets for token in part) == whole.contexts[1].targets
    assert targets[-1][-1] == model.tokenizer.convert_tokens_to_ids(model.prompt_form.end)


def test_a_memory_has_one_key_for_a_fact() -> None:
    hparams = pytest.importorskip("edit_memory.hparams").MemoryHParams
    with pytest.raises(HParamsError, match="cannot be cut: leave target_window out"):
        build(hparams, [{"layers": [1], "target_window": 3}], owner="memory")
