"""Context templates: sampled with a seed, one place for the prompt in each, of the lengths asked for."""

from __future__ import annotations

from editcore.locate_then_edit.templates import OPENINGS, sample_context_templates
from editcore.models import LanguageModel
from editcore.testing import tiny_model


def tokens(model: LanguageModel, template: str) -> int:
    text = template.removesuffix(". {}")
    return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_several_lengths_are_taken_in_turn() -> None:
    """ROME's mix of short and long contexts; a short one is the start of what a long one would have been."""
    model = tiny_model()
    short = sample_context_templates(model, seed=1, count=6, length=1)
    long = sample_context_templates(model, seed=1, count=6, length=12)
    mixed = sample_context_templates(model, seed=1, count=6, length=(1, 12))
    assert mixed == (mixed[0], short[1], long[2], short[3], long[4], short[5], long[6])
    assert len(set(long)) == 7, "contexts with one opening have other continuations"
    assert sum(tokens(model, template) for template in short[1:]) < sum(tokens(model, t) for t in long[1:])


def test_the_bare_prompt_comes_first_and_each_has_one_place_for_it() -> None:
    templates = sample_context_templates(tiny_model(), seed=0, count=7)
    assert templates[0] == "{}"
    assert [template.split(" ")[0].startswith(OPENINGS[i % 5][:1]) for i, template in enumerate(templates[1:])]
    assert all(template.count("{}") == 1 for template in templates)
    assert sample_context_templates(tiny_model(), seed=0, count=0) == ("{}",)
