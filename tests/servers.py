"""HTTP servers for tests: the address of a real OpenAI-compatible server, and a server with scripted replies."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

THOUGHT, RECITED_TEXT = "so it shows", "a red bar chart"
RECITED = f"{RECITED_TEXT}\vVerdict: helps"
"""The reply of the fixture `reciting_model` to every prompt: `THOUGHT` as its reasoning, then `RECITED`.

Its line break is a token that the prompt does not end with, since no token may occur twice.
"""


class OpenAIServer(NamedTuple):
    """A running `transformers serve`: its base URL, and a model that it can serve.

    It loads any checkpoint folder that a request names as its model, so tests can serve their own too.
    """

    base_url: str
    model: str


class Reply(NamedTuple):
    """One HTTP reply. A `body` that is not a str is sent as JSON. Status 0 drops the connection."""

    status: int = 200
    body: Any = ""
    headers: dict[str, str] | None = None
    delay: float = 0.0
    """Seconds before the reply is sent."""


def completion(content: Any, finish_reason: str = "stop", **fields: Any) -> Reply:
    """A chat completion; `fields` are further fields of its message."""
    message = {"role": "assistant", "content": content, **fields}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return Reply(body=body)


class ScriptedServer(ThreadingHTTPServer):
    """Answers each request with the reply that `script` returns for its number and JSON body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ScriptedHandler)
        self.script: Callable[[int, dict[str, Any]], Reply] = lambda number, body: completion(
            "Fine.\nVerdict: helps"
        )
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.concurrent = self.max_concurrent = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints errors, except that a client was killed: its line would end up in the output of a later test."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def replies(self, *replies: Reply) -> None:
        """Sends these replies in order, then the last one for every further request."""
        self.script = lambda number, body: replies[min(number, len(replies) - 1)]


class _ScriptedHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.concurrent += 1
            self.server.max_concurrent = max(self.server.max_concurrent, self.server.concurrent)
        reply = self.server.script(number, body)
        time.sleep(reply.delay)
        with self.server.lock:
            self.server.concurrent -= 1
        if reply.status == 0:
            self.close_connection = True
            return
        data = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **(reply.headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Does not log requests."""
