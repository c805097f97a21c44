"""Records: JSON files that one class writes and reads.

A record is written with the keys that it was made with, in the order of the fields of its class. NaN and infinities are
written as ``null``, because JSON does not have them. A field of the type :data:`FloatOrNull` reads ``null`` as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from editcore._util.files import json_text, write_text
from editcore.interfaces.errors import RunError
from editcore.interfaces.values import first_problem

__all__ = ["Figures", "FloatOrNull", "Record", "read_record", "read_records", "record_text"]

Model = TypeVar("Model", bound=BaseModel)


def _nan_of_null(value: object) -> object:
    return math.nan if value is None else value


FloatOrNull = Annotated[float, BeforeValidator(_nan_of_null)]
"""A number; ``null`` in a file is read as NaN."""

Figures = Mapping[str, bool | int | float | None]
"""Numbers by name, each with the type that it has in the file."""


class Record(BaseModel):
    """A JSON object of a file. Keys that this version does not know are left out when it is read."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    @model_serializer(mode="wrap")
    def _keys_that_were_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name in self.model_fields_set}

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            RunError: it cannot be read, or is damaged.
        """
        return read_record(path, cls)

    def write_file(self, path: Path) -> None:
        """Write a file, whole or not at all.

        Raises:
            StorageError: the file cannot be written; ``path`` is as it was.
        """
        write_text(path, record_text(self, indent=2) + "\n")


def read_record(path: Path, model: type[Model]) -> Model:
    """Read a file as an object of a class.

    Raises:
        RunError: it cannot be read, or is damaged.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise RunError(f"{path} is damaged ({first_problem(error)}).") from error


def read_records(path: Path, model: type[Model]) -> list[Model]:
    """Read a file with an object of a class in each line; none if there is no such file.

    Raises:
        RunError: it cannot be read, or a line is damaged.
    """
    try:
        return [model.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise RunError(f"{path} is damaged ({first_problem(error)}).") from error


def record_text(record: BaseModel, *, indent: int | None = None) -> str:
    """The JSON of a record."""
    return json_text(record.model_dump(mode="json"), indent=indent)
