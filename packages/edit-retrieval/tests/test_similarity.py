"""Similarities against a slow computation in float64, and what they are there for."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
from edit_retrieval.similarity import ByTokens
from hypothesis import given, settings, strategies as st

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "rome", "12", "é", "."]), min_size=1, max_size=6).map(" ".join)


def plainly(statements: list[str], prompt: str) -> list[float]:
    """Cosines of TF-IDF vectors over the words of statements and prompt, word by word."""
    sets = [Counter(re.findall(r"\w+|[^\w\s]", text.lower())) for text in [*statements, prompt]]
    words = sorted({word for counts in sets for word in counts})
    idf = {
        word: math.log((1 + len(statements)) / (1 + sum(word in counts for counts in sets[:-1]))) + 1 for word in words
    }
    vectors = [[counts[word] * idf[word] for word in words] for counts in sets]
    asked = vectors.pop()
    return [math.fsum(map(math.prod, zip(vector, asked, strict=True))) / math.hypot(*vector) / math.hypot(*asked)
            for vector in vectors]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(statements=st.lists(WORDS, min_size=1, max_size=4), prompt=WORDS)
def test_the_cosines_are_those_of_tf_idf_with_the_prompts_own_words(statements: list[str], prompt: str) -> None:
    found = ByTokens(statements, "words")(prompt)
    assert np.allclose(found, plainly(statements, prompt), rtol=1e-12, atol=1e-12)


def test_a_question_about_somebody_else_is_less_similar_than_another_wording() -> None:
    born = [f"{name} was born in" for name in ("Marie Curie", "Isaac Newton", "Alan Turing", "Niels Bohr")]
    similar = ByTokens([f"{prompt} Rome" for prompt in born], "words")
    noether, *_ = similar("Emmy Noether was born in")
    reworded, *_ = similar("The birthplace of Marie Curie is")
    asked, newton, *_ = similar("Marie Curie was born in")
    assert noether < reworded < asked
    assert newton < asked


@pytest.mark.parametrize("tokens", ["words", "characters"])
def test_a_prompt_without_words_of_the_statements_has_no_similarity(tokens: str) -> None:
    assert ByTokens(["Rome"], tokens)("xyz").tolist() == [0.0]
    assert ByTokens(["Rome"], tokens)(" ").tolist() == [0.0]


def test_characters_find_what_has_no_spaces() -> None:
    statements = ["居里夫人出生在罗马", "牛顿出生在巴黎"]
    assert ByTokens(statements, "words")("居里夫人在哪里").tolist() == [0.0, 0.0]
    first, second = ByTokens(statements, "characters")("居里夫人在哪里")
    assert first > second
