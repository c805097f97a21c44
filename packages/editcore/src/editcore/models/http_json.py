"""JSON over HTTP to a server that the user names, with its errors in sentences."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from editcore.interfaces.documented import documented
from editcore.interfaces.errors import EditcoreError, ModelError

__all__ = ["JsonServer", "RefusedError"]

_SAID = 400
"""Characters of a server's own message that are shown."""


class RefusedError(EditcoreError):
    """A server answered a request with an error."""

    def __init__(self, message: str, *, status: int, said: str) -> None:
        super().__init__(message)
        self.status = status
        self.said = said
        """The server's own message."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class JsonServer:
    """An HTTP server that speaks JSON."""

    url: str
    """Without a slash at its end."""
    key: str | None = None
    """Sent as a bearer token."""
    timeout: float = 60.0
    """Seconds that an answer may take."""
    timeout_setting: str = "--timeout"
    """What a message names to allow more."""

    def get(self, path: str) -> Any:
        """The answer to a question.

        Raises:
            RefusedError: the server answers with an error.
            ModelError: it does not answer, or not with JSON.
        """
        return self._ask(urllib.request.Request(self.url + path))

    def post(self, path: str, body: object) -> Any:
        """The answer to a body in JSON. Raises as :meth:`get`."""
        return self._ask(urllib.request.Request(self.url + path, data=json.dumps(body).encode()))

    def _ask(self, request: urllib.request.Request) -> Any:
        request.add_header("Content-Type", "application/json")
        if self.key is not None:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            said = _message(error.read().decode(errors="replace"))
            raise RefusedError(
                f"{request.full_url} answers with the error {error.code}: {said or error.reason}",
                status=error.code,
                said=said,
            ) from error
        except TimeoutError as error:
            raise self._too_slow() from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._too_slow() from error
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise ModelError(f"No server answers at {self.url} ({reason}).") from error
        except (OSError, HTTPException, ValueError) as error:
            raise ModelError(f"The connection to {self.url} broke: {error or type(error).__name__}.") from error
        try:
            return json.loads(text) if text.strip().startswith(("{", "[")) else text
        except ValueError as error:
            raise ModelError(f"{request.full_url} does not answer with JSON.") from error

    def _too_slow(self) -> ModelError:
        return ModelError(
            f"{self.url} did not answer within {self.timeout:g} seconds; allow more with {self.timeout_setting}."
        )


def _message(text: str) -> str:
    """The sentence in an error's body, which servers put into different fields."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = text
    for name in ("error", "message", "detail"):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
    return " ".join(str(found).split())[:_SAID]
