"""Where a fact is looked up, and what is read there."""

from __future__ import annotations

import pytest
import torch
from editcore import EditRequest, SubjectNotFoundError
from editcore.models import LanguageModel
from editcore.models.capture import LayerByLayerCapture, capture
from editcore.models.tokens import continuation_row, last_index_covering, lookup_row
from editcore.testing import TINY_FAMILIES, tiny_hf_model, tiny_model, tiny_requests, tiny_tokenizer


def text_at(model: LanguageModel, ids: tuple[int, ...], index: int) -> str:
    return str(model.tokenizer.decode([ids[index]]))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_lookup_token_ends_the_subject(bos: bool, padding_side: str) -> None:
    """Neither a beginning-of-text token nor the tokenizer's padding side moves it."""
    tokenizer = tiny_tokenizer(bos=bos, padding_side=padding_side)  # type: ignore[arg-type]
    model = LanguageModel.wrap(tiny_hf_model("llama"), tokenizer)
    for request in tiny_requests(6):
        for template in ("{}", "It is late. {}"):
            row = lookup_row(model, request, template=template)
            assert request.subject.endswith(text_at(model, row.ids, row.lookup).strip())
            decoded = model.tokenizer.decode(row.ids[: row.lookup + 1], skip_special_tokens=True)
            assert decoded.endswith(request.subject)


def test_the_four_lookup_tokens() -> None:
    model = tiny_model("llama")
    request = EditRequest(subject="Anna Berg", prompt="{} was born in", target_new="Rome")
    rows = {name: lookup_row(model, request, fact_token=name) for name in  # type: ignore[arg-type]
            ("subject_first", "subject_last", "subject_first_after_last", "last")}  # fmt: skip
    assert text_at(model, rows["subject_first"].ids, rows["subject_first"].lookup).strip()[0] == "A"
    assert rows["subject_first_after_last"].lookup == rows["subject_last"].lookup + 1
    assert rows["last"].lookup == len(rows["last"].ids) - 1
    ends = EditRequest(subject="Anna Berg", prompt="A person is {}", target_new="Rome")
    with pytest.raises(SubjectNotFoundError, match="ends with the subject"):
        lookup_row(model, ends, fact_token="subject_first_after_last")
    without = EditRequest(prompt="The sky is", target_new="green")
    for name in rows:
        row = lookup_row(model, without, fact_token=name)  # type: ignore[arg-type]
        assert row.lookup == len(row.ids) - 1


def test_a_character_of_several_tokens_is_covered_by_its_last() -> None:
    assert last_index_covering([(0, 0), (0, 3), (3, 4), (3, 4), (4, 6)], 3) == 3
    assert last_index_covering([(0, 0), (0, 3)], 5) is None


def test_the_target_starts_where_the_prompt_ends() -> None:
    model = tiny_model("llama")
    for request in tiny_requests(5):
        row = continuation_row(model, request)
        assert model.tokenizer.decode(row.targets) == " " + request.target_new
        spaced = request.model_copy(update={"target_new": " " + request.target_new})
        assert continuation_row(model, spaced).targets == row.targets


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_captured_values_are_what_passed_through(family: str) -> None:
    """W k (+ bias) of the captured key is the captured output, whatever the batch and its padding."""
    model = tiny_model(family)
    rows = [lookup_row(model, request, template=t) for request in tiny_requests(3) for t in ("{}", "Well, yes. {}")]
    together = capture(model, rows, [0, 2])
    one_by_one = [capture(model, [row], [2])[2] for row in rows]
    for layer, seen in together.items():
        name = model.layout.weight_name(layer)
        bias = model.projection(layer).bias if model.layout.has_bias else torch.zeros(())
        expected = seen.inputs @ model.as_out_in(name, model.weight(name)).T + bias
        assert torch.allclose(seen.outputs, expected, atol=1e-5)
    assert torch.allclose(together[2].inputs, torch.cat([seen.inputs for seen in one_by_one]), atol=1e-5)
    assert torch.allclose(together[2].block_outputs, torch.cat([s.block_outputs for s in one_by_one]), atol=1e-4)


@pytest.mark.parametrize("keep", [0, 3000, 2**20])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_captures_sees_what_a_pass_from_below_sees(family: str, keep: int) -> None:
    """Weights change from the last captured layer on, as they do between the layers of an edit."""
    model = tiny_model(family)
    rows = {
        (place, template): lookup_row(model, request, template=template)
        for place, request in enumerate(tiny_requests(3))
        for template in ("{}", "Well, yes. {}")
    }
    ran = 0

    def count(*_arguments: object) -> None:
        nonlocal ran
        ran += 1

    captures = LayerByLayerCapture(model, keep_bytes=keep)
    for layer in (0, 1, 2):
        found = captures.capture(dict(rows), [layer, 2] if layer < 2 else [2])
        expected = capture(model, list(rows.values()), [layer, 2] if layer < 2 else [2])
        for captured_layer in expected:
            for name in ("inputs", "outputs", "block_outputs"):
                assert torch.allclose(
                    getattr(found[captured_layer], name), getattr(expected[captured_layer], name), atol=1e-4
                )
        with torch.no_grad():
            model.weight(model.layout.weight_name(layer)).mul_(1.5)
    handle = model.projection(0).register_forward_hook(count)
    captures.capture(dict(rows), [2])
    handle.remove()
    assert (ran == 0) == (keep == 2**20), "only what has all its rows kept may leave the lowest block out"
