"""What the HTTP servers of conftest.py are made of: a server that replies as a test says, faults included."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

THOUGHT, RECITED = "so it shows", "a red bar chart"
"""What the fixture `reciting_model` replies, whatever it is asked: its reasoning, and the rest."""


class OpenAIServer(NamedTuple):
    """A running `transformers serve`: its base URL, and the model to ask for.

    It loads whatever checkpoint folder a request names as its model, so tests can serve their own too.
    """

    base_url: str
    model: str


class Reply(NamedTuple):
    """One HTTP reply. A `body` that is not text is sent as JSON; status 0 drops the connection."""

    status: int = 200
    body: Any = ""
    headers: dict[str, str] | None = None
    delay: float = 0.0


def completion(content: Any, finish_reason: str = "stop", **fields: Any) -> Reply:
    """The reply of a chat completion endpoint."""
    message = {"role": "assistant", "content": content, **fields}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return Reply(body=body)


class ScriptedServer(ThreadingHTTPServer):
    """Replies as a test says: `script` makes a reply of each request, given its number and JSON body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ScriptedHandler)
        self.script: Callable[[int, dict[str, Any]], Reply] = lambda number, body: completion("fine")
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def replies(self, *replies: Reply) -> None:
        """These replies in order, the last one for every request after them."""
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
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        reply = self.server.script(number, body)
        time.sleep(reply.delay)
        with self.server.lock:
            self.server.at_once -= 1
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
        """Quiet."""
