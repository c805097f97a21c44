"""Second moments: what they are, and that a cache file is only ever taken for what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editcore import Sampling, StatisticsError
from editcore.models import DEFAULT_MODEL, LanguageModel, local_path
from editcore.second_moments import CorpusOptions
from editcore.second_moments.corpora import SelfCorpus, open_corpus
from editcore.second_moments.linalg import Metric
from editcore.second_moments.statistics import TOKENS_PER_WIDTH, StatisticsStore, cached_moments, second_moments
from editcore.second_moments.stored import TEXTS
from editcore.testing import tiny_model


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_moments_are_the_mean_outer_product_of_projection_inputs(family: str) -> None:
    """Against a loop over every token of every sequence, one sequence at a time."""
    model = tiny_model(family)
    sequences = torch.randint(3, 60, (10, 12), generator=torch.Generator().manual_seed(0))
    found = second_moments(model, sequences, [0, 2])
    for layer, moment in found.items():
        seen: list[torch.Tensor] = []
        handle = model.projection(layer).register_forward_hook(
            lambda _module, args, _output, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for row in sequences:
            model.hf(input_ids=row[None])
        handle.remove()
        keys = torch.cat(seen).double()
        expected = sum(torch.outer(key, key) for key in keys) / len(keys)
        assert torch.allclose(moment, expected, atol=1e-6)
        assert moment.dtype == torch.float64


def test_nothing_is_computed_from_the_deepest_projection_on() -> None:
    model = tiny_model(num_layers=3)
    ran: list[int] = []
    for layer in range(3):
        model.projection(layer).register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    second_moments(model, torch.tensor([[5, 6, 7]]), [1, 0])
    assert ran == [0]


def store(
    model: LanguageModel, file: Path, *, compute: Callable[..., Any] = second_moments, **text: Any
) -> StatisticsStore:
    options = CorpusOptions(**{"name": str(file), "tokens": 600, **text})
    return StatisticsStore(model, options, directory=file.parent / "statistics", compute=compute)


def test_a_second_store_reads_what_the_first_computed(corpus_file: Path) -> None:
    model = tiny_model("llama")
    first = store(model, corpus_file).moments([0, 1])
    second = store(model, corpus_file, compute=lambda *_a, **_k: pytest.fail("computed again")).moments([1, 0])
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    listed = list(cached_moments(corpus_file.parent / "statistics"))
    assert {metadata["layer"] for _, metadata in listed} == {"0", "1"}


def test_everything_that_changes_the_answer_changes_the_file(corpus_file: Path) -> None:
    model, other_model = tiny_model("llama"), tiny_model("llama", seed=1)
    text = corpus_file.with_name("other.txt")
    text.write_text(corpus_file.read_text() + "One more line.\n")
    paths = {
        store(model, corpus_file).path(0),
        store(model, corpus_file).path(1),
        store(other_model, corpus_file).path(0),
        store(model, text).path(0),
        store(model, corpus_file, tokens=700).path(0),
        store(model, corpus_file, name="self").path(0),
        store(model, corpus_file, name="self", seed=1).path(0),
    }
    assert len(paths) == 7


def test_the_models_own_text_is_the_same_for_a_seed() -> None:
    model = tiny_model("llama")
    first, again, other_seed = (SelfCorpus(seed).sequences(model, 300, 32) for seed in (0, 0, 1))
    assert first.shape == (10, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)


def test_more_layers_later_need_no_second_sample(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    asked = store(model, corpus_file, name="self", tokens=128)
    first = asked.moments([0])
    monkeypatch.setattr(model, "generate_ids", None)
    both = asked.moments([0, 1])
    assert torch.equal(both[0], first[0])
    monkeypatch.undo()
    expected = second_moments(model, SelfCorpus(0).sequences(model, 128, 128), [1])
    assert torch.equal(both[1], expected[1])


def test_the_text_of_the_default_model_comes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of texts is the one that was put there; it is taken for its model and settings alone."""
    model = tiny_model("llama")
    monkeypatch.setattr(model, "generate_ids", lambda rows, **_options: [[0] * 128 for _ in rows])
    [text] = TEXTS
    ids = text.read()
    assert hashlib.sha256(ids.numpy().tobytes()).hexdigest() == text.sha256
    assert (ids.shape, text.model) == ((120, 128), DEFAULT_MODEL)
    monkeypatch.setattr(model, "_base_fingerprint", text.fingerprint)
    corpus = SelfCorpus(0)
    assert corpus.expected_seconds(model, 15360, 128) == 0
    assert torch.equal(corpus.sequences(model, 15360, 128), ids)
    assert corpus.content_hash == text.sha256
    for seed, tokens, length in ((1, 15360, 128), (0, 15000, 128), (0, 15360, 64)):
        assert not SelfCorpus(seed).sequences(model, tokens, length)[:, 1:].any()
    monkeypatch.setattr(model, "_base_fingerprint", "0" * 64)
    assert not SelfCorpus(0).sequences(model, 15360, 128)[:, 1:].any()
    damaged = dataclasses.replace(text, sha256="0" * 64)
    with pytest.raises(StatisticsError, match=r"holds another text than it should\. Install editcore again"):
        damaged.read()


@pytest.mark.skipif(local_path(DEFAULT_MODEL) is None, reason=f"{DEFAULT_MODEL} is not here: editctl models pull")
def test_the_default_model_would_write_that_text() -> None:
    """Its first tokens in each row: all rows are drawn together, token by token."""
    model = LanguageModel.load(DEFAULT_MODEL)
    [text] = TEXTS
    assert model.base_fingerprint == text.fingerprint
    assert model.layout.d_ff * TOKENS_PER_WIDTH == text.rows * text.length
    written = model.generate_ids(
        [[]] * text.rows, max_new_tokens=3, sampling=Sampling(seed=text.seed), stop_at_end=False
    )
    assert torch.equal(torch.tensor(written), text.read()[:, :3])


def test_long_work_is_announced_with_an_estimate(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    store(model, corpus_file).moments([0])
    assert caplog.messages == []  # it takes no time
    monkeypatch.setattr("editcore.second_moments.statistics._LONG", 0.0)
    store(model, corpus_file).moments([0])
    assert caplog.messages == []  # it is in the cache
    store(model, corpus_file, name="self").moments([0, 2])
    [said] = caplog.messages
    assert re.fullmatch(
        r"The second moments of layers 0, 2 in .+ are not in the cache yet\. Computing them over 600 tokens takes "
        r"about \d+ s, and sampling that text about \d+ s before that; they are kept\.",
        said,
    )


def test_documentation_needs_no_file() -> None:
    model = tiny_model("llama")
    assert open_corpus("docs").sequences(model, 512, 128).shape == (4, 128)


def test_bad_corpora_are_one_sentence(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(StatisticsError, match="neither 'self', 'docs'"):
        open_corpus(str(tmp_path / "missing.txt"))
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(StatisticsError, match="at least"):
        open_corpus(str(short)).sequences(model, 1000, 256)
    damaged = tmp_path / "damaged.txt.gz"
    damaged.write_bytes(b"not gzip")
    with pytest.raises(StatisticsError, match="Cannot read the corpus"):
        open_corpus(str(damaged))


def test_a_damaged_cache_file_is_named(corpus_file: Path) -> None:
    model = tiny_model("llama")
    first = store(model, corpus_file)
    first.moments([0])
    first.path(0).write_bytes(first.path(0).read_bytes()[:100])
    with pytest.raises(StatisticsError, match="delete it"):
        store(model, corpus_file).moments([0])


def test_the_factor_is_kept_beside_the_moment_and_goes_with_it(corpus_file: Path) -> None:
    model = tiny_model("llama")
    first = store(model, corpus_file)
    metric = first.metrics([1])[1]
    factor, jitter = metric.factor
    [path] = first.path(1).parent.glob("*.factor.safetensors")
    again = store(model, corpus_file).metrics([1])[1]
    assert "factor" in again.__dict__, "read, not computed"
    assert torch.equal(again.factor[0], factor)
    assert again.factor[1] == jitter
    assert torch.equal(again.matrix, first.moments([1])[1])
    first.path(1).unlink()
    store(model, corpus_file).moments([1])
    assert not path.exists(), "a moment computed anew has no factor yet"


def test_what_follows_from_a_moment_is_computed_once_and_goes_with_it(corpus_file: Path) -> None:
    model = tiny_model("llama")
    asked: list[Metric] = []

    def compute(metric: Metric) -> dict[str, torch.Tensor]:
        asked.append(metric)
        values, vectors = torch.linalg.eigh(metric.matrix)
        return {"values": values, "vectors": vectors.T}

    first = store(model, corpus_file)
    found = first.derived(1, "eigenvectors", compute)
    again = store(model, corpus_file).derived(1, "eigenvectors", compute)
    assert len(asked) == 1
    assert sorted(found) == sorted(again) == ["values", "vectors"]
    assert all(torch.equal(found[name], again[name]) for name in found)
    rebuilt = found["vectors"].T @ found["values"].diag() @ found["vectors"]
    torch.testing.assert_close(rebuilt, first.moments([1])[1], rtol=0, atol=1e-10 * float(found["values"].max()))
    first.derived(1, "null-space-0.02", compute)
    assert len(asked) == 2, "another name is another thing"
    first.path(1).unlink()
    anew = store(model, corpus_file)
    anew.moments([1])
    anew.derived(1, "eigenvectors", compute)
    assert len(asked) == 3, "a moment computed anew has nothing derived yet"


@pytest.mark.parametrize("name", ["", "Eigen", "../x", "a b", ".hidden"])
def test_derived_tensors_have_the_name_of_a_file(corpus_file: Path, name: str) -> None:
    with pytest.raises(StatisticsError, match=f"'{re.escape(name)}' cannot name derived tensors"):
        store(tiny_model("llama"), corpus_file).derived(1, name, lambda _: {})


def test_derived_tensors_are_not_taken_for_the_factor_of_the_moment(corpus_file: Path) -> None:
    with pytest.raises(StatisticsError, match="'factor' is the name of the moment's own factor"):
        store(tiny_model("llama"), corpus_file).derived(1, "factor", lambda _: {})
