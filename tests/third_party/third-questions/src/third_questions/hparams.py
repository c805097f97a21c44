"""What can be set."""

from typing import Annotated

from editcore import HParams
from pydantic import Field


class QuestionsHParams(HParams):
    """Where the facts are."""

    file: str
    """A file of JSON lines: a fact with ``follows`` and ``others``, lists of a question and its answer each."""


class ConsequencesHParams(HParams):
    """How it is asked."""

    tokens: Annotated[int, Field(ge=1)] = 4
    """Longest answer about other things."""
