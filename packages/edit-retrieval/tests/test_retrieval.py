"""What the model reads, and what becomes of it when facts are edited again, undone or kept elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edit_retrieval import similarity
from editcore import EditRequest, EditSession, HParamsError, ModelError, SessionConfig
from editcore.models import LanguageModel
from editcore.testing import tiny_model, tiny_requests, tiny_tokenizer

FACTS = tiny_requests(3)


def open_session(model: LanguageModel | None = None, **settings: object) -> EditSession:
    plain = {"context": "{statements} {prompt}", "least_similarity": 0.5}
    config = SessionConfig(editor="retrieval", settings={"retrieval": {**plain, **settings}})
    return EditSession.open(model or tiny_model(), config)


def test_the_most_similar_statement_stands_before_the_prompt() -> None:
    session = open_session()
    session.edit(FACTS)
    first = FACTS[0]
    assert session.model.asked(first.text) == f"{first.text} {first.target_new}. {first.text}"
    assert session.model.asked("Completely different words") == "Completely different words"
    told = tiny_model().generate([f"{first.text} {first.target_new}. {first.text}"])
    assert session.generate([first.text]) == told


def test_settings_say_how_many_statements_and_how_they_are_put() -> None:
    ikes = "New Fact: {statements}\nPrompt: {prompt}"
    session = open_session(count=2, least_similarity=0, statement="<{}>", context=ikes)
    session.edit(FACTS)
    asked = session.model.asked(f"{FACTS[0].text} {FACTS[0].text} {FACTS[1].text}")
    first, second = (f"<{fact.text} {fact.target_new}>" for fact in FACTS[:2])
    assert asked.startswith(f"New Fact: {second} {first}\nPrompt: {FACTS[0].text}")


def test_a_fact_that_is_edited_again_replaces_the_older_one_until_it_is_undone() -> None:
    session = open_session(count=3, least_similarity=0.6)
    again = FACTS[0].model_copy(update={"target_new": "Madrid", "id": "again"})
    session.edit([FACTS[0]])
    session.edit([again])
    assert session.model.asked(again.text) == f"{again.text} Madrid. {again.text}"
    session.undo("again")
    assert session.model.asked(again.text) == f"{again.text} {FACTS[0].target_new}. {again.text}"
    session.undo(FACTS[0].id)
    assert session.model.asked(again.text) == again.text


def test_of_equally_similar_statements_the_newest_is_chosen() -> None:
    session = open_session(least_similarity=0.3)
    session.edit([EditRequest(prompt="One thing is", target_new="Paris")])
    session.edit([EditRequest(prompt="Other thing is", target_new="Rome")])
    assert session.model.asked("This thing is") == "Other thing is Rome. This thing is"
    session.edit([EditRequest(prompt="One thing is", target_new="Berlin")])
    assert session.model.asked("This thing is") == "One thing is Berlin. This thing is"


def test_one_fact_of_a_batch_is_undone_without_the_model() -> None:
    session = open_session(least_similarity=0)
    session.edit(FACTS)
    session.undo(FACTS[1].id)
    [attachment] = session.edited.attachments
    kept = [fact["statement"] for fact in attachment.fields["facts"]]
    assert kept == [f"{fact.text} {fact.target_new}" for fact in (FACTS[0], FACTS[2])]


def test_statements_for_which_there_is_no_room_are_left_out() -> None:
    fact = EditRequest(prompt=" ".join(["Marie Curie was born in Rome"] * 2), target_new="Paris")
    model = tiny_model("gpt2")
    assert model.positions is not None
    short, long = f"{fact.text} Paris. {fact.text}", fact.text
    for rest, expected in ((64, short), (63, long)):
        model = tiny_model("gpt2")
        model.positions = len(model.read_prompt(short)[0]) + rest
        session = open_session(model)
        session.edit([fact])
        assert session.model.asked(fact.text) == expected


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"statement": "so"}, "exactly once"),
        ({"context": "{prompt} {statements}"}, "ends with {prompt}"),
        ({"count": 0}, "out of range"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, object], sentence: str) -> None:
    with pytest.raises(HParamsError, match=sentence):
        open_session(**setting)


def test_without_sentence_transformers_an_embedder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edit_retrieval.hparams.find_spec", lambda _name: None)
    with pytest.raises(HParamsError, match=r"pip install 'edit-retrieval\[embedding\]'"):
        open_session(embedder="any")


# With an embedding model


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny embedding model: the mean of a random vector per token."""
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    weights = torch.randn(len(tiny_tokenizer()), 16, generator=torch.Generator().manual_seed(0)).numpy()
    part = parts.StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_weights=weights)
    folder = tmp_path_factory.mktemp("embedder")
    sentence_transformers.SentenceTransformer(modules=[part], device="cpu").save(str(folder))
    return str(folder)


def test_an_embedding_model_chooses_instead_of_words(embedder: str, tmp_path: Path) -> None:
    session = open_session(embedder=embedder, least_similarity=0)
    session.edit(FACTS)
    prompts = [fact.text for fact in FACTS] + ["Rome Rome", "is a"]
    statements = [f"{fact.text} {fact.target_new}" for fact in FACTS]
    cosines = similarity.embed(embedder, prompts) @ similarity.embed(embedder, statements).T
    for prompt, row in zip(prompts, cosines, strict=True):
        assert session.model.asked(prompt) == f"{statements[int(row.argmax())]}. {prompt}"
    similarity._loaded.cache_clear()
    [attachment] = session.edited.attachments
    assert json.loads(json.dumps(attachment.fields))["settings"]["embedder"] == embedder
    session.undo(FACTS[1].id)
    [attachment] = session.edited.attachments
    assert torch.equal(attachment.tensors["embeddings"], similarity.embed(embedder, [statements[0], statements[2]]))


def test_statements_of_two_embedders_are_refused(embedder: str) -> None:
    session, plain = open_session(embedder=embedder), open_session()
    for opened in (session, plain):
        opened.edit(FACTS[:1])
    with pytest.raises(ModelError, match="cannot be compared"):
        plain.edited.apply(session.ledger.entries[0].written)


def test_an_embedding_model_that_is_not_there_is_refused(embedder: str, tmp_path: Path) -> None:
    with pytest.raises(HParamsError, match="there is no folder"):
        open_session(embedder=str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="there is no sentence-embedding model"):
        open_session(embedder=str(tmp_path))
