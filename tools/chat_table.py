"""What edits in a chat template say, and what becomes of other answers, as a Markdown table.

    python tools/chat_table.py --edits 40 --arm emmet --arm "emmet chat_answer=beginning kl_position=lookup"

The facts of worldfacts are asked as questions, in the user's turn. *Said*: the first sentence of the answer has the new
object. *Distinct word pairs*: of answers of up to 60 tokens, those of two words or more. *About*: the same for answers
to "Tell me about {subject}." Presets and corpus are the defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from editcore import EditRequest, EditSession, LanguageModel, Plugins, SessionConfig
from editcore.cli.run import settings_from
from editcore.datasets import load_records
from editcore.evaluation.generation import answer_of, distinct_bigrams, is_said
from editcore.models import LoadOptions

TOKENS = 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="one with a chat template")
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--arm", action="append", default=[], metavar="'EDITOR KEY=VALUE ...'")
    parser.add_argument("--preset", action="append", default=[], metavar="EDITOR=NAME", help="in place of the model's")
    options = parser.parse_args(arguments)
    presets = dict(preset.split("=", 1) for preset in options.preset)
    requests = questions(options.edits)
    model = LanguageModel.load(options.model, LoadOptions(chat_template=True))
    print("| | facts said | distinct word pairs, edited questions | about |\n|---|--:|--:|--:|")
    print(row("unedited", model, requests), flush=True)
    for arm in options.arm or ["emmet"]:
        editor, *assignments = arm.split()
        settings = settings_from(assignments, {}, editor=editor)
        config = SessionConfig(editor=editor, preset=presets.get(editor), settings=settings)
        session = EditSession.open(model, config)
        session.edit(requests, batch_size=options.batch_size)
        print(row(arm, model, requests), flush=True)
        session.close()


def questions(count: int) -> list[EditRequest]:
    """The first facts of worldfacts, each as a question."""
    records = load_records("worldfacts", plugins=Plugins.load())[:count]
    return [record.request.model_copy(update={"prompt": record.extra["question"]}) for record in records]


def row(name: str, model: LanguageModel, requests: Sequence[EditRequest]) -> str:
    """A line of the table, of the model as it is now."""
    answers = model.generate([request.text for request in requests], max_new_tokens=TOKENS)
    said = [
        is_said([request.target_new], answer_of(answer, [".", "\n"], [request.target_new]))
        for request, answer in zip(requests, answers, strict=True)
    ]
    about = model.generate([f"Tell me about {request.subject}." for request in requests], max_new_tokens=TOKENS)
    return f"| {name} | {100 * sum(said) / len(said):.1f} | {pairs(answers):.1f} | {pairs(about):.1f} |"


def pairs(texts: Sequence[str]) -> float:
    """Distinct word pairs in percent, averaged over the texts that have any."""
    shares = [share for text in texts if (share := distinct_bigrams(text)) is not None]
    return 100 * sum(shares) / len(shares) if shares else float("nan")


if __name__ == "__main__":
    main()
