"""A server on this machine for tests of what speaks JSON over HTTP."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["StandInServer"]

Answer = tuple[int, object]
"""A status, and what is sent as JSON."""


class StandInServer:
    """A server that answers with JSON. A subclass says what: :meth:`get` and :meth:`post`. Close it at the end.

    >>> server = StandInServer()
    >>> server.get("/")
    (404, {'detail': 'Not Found'})
    >>> server.close()
    """

    url: str
    """Its address, without a slash at its end."""
    keys: list[str | None]
    """The ``Authorization`` of each request."""

    def __init__(self) -> None:
        self.keys = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.keys.append(self.headers.get("Authorization"))
                self.say(*outer.get(self.path))

            def do_POST(self) -> None:
                outer.keys.append(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.say(*outer.post(self.path, body))

            def say(self, status: int, answer: object) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def get(self, _path: str) -> Answer:
        """The answer to a question."""
        return 404, {"detail": "Not Found"}

    def post(self, _path: str, _body: bytes) -> Answer:
        """The answer to a body."""
        return 404, {"detail": "Not Found"}

    def close(self) -> None:
        """Stop it."""
        self._http.shutdown()
        self._http.server_close()
