"""A server with OpenAI's batch endpoints, for tests and benchmarks. It answers chat requests one by one, too.

    python scripts/benchmarks/batch_server.py --delay 2                 # prints its base URL
    python scripts/benchmarks/batch_server.py --delay 2 --faults 0.3    # with faults

A batch is completed `--delay` seconds after it was created. With faults, that share of the HTTP requests fails:
with status 429 or 500, or by a connection that is closed before or after the request is handled. The same share of
the lines of a batch gets an error, is missing from the answers, or has an empty text. Answers are those of
chat_server.py, and so are `GET /counts` and `GET /answers` below the base URL: they count each answer that was
paid for, in a batch or by itself. `GET /batched` counts those in a batch.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from chat_server import answer_to, completion

HTTP_FAULTS = ("429", "500", "reset_before", "reset_after")
LINE_FAULTS = ("error", "missing", "empty")
LISTED = 2  # batches on a page of the list; OpenAI has up to 100, small pages are harder


class BatchServer(ThreadingHTTPServer):
    """Files and batches in memory. `lock` guards them."""

    daemon_threads = True

    def __init__(self, port: int, delay: float, faults: float, seed: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.delay, self.fault_rate, self.random = delay, faults, random.Random(seed)
        self.lock = threading.RLock()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}  # in the order of their creation
        self.answers: Counter[str] = Counter()
        self.batched: Counter[str] = Counter()  # the answers that were in a batch
        self.counts: Counter[str] = Counter()
        self.has_batches = True
        """False: only single requests, as on most servers."""
        self.moderates_first = False
        """Whether the first single request is refused by moderation."""
        self.refused: str | None = None
        """If set, batches fail validation with this message."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints errors, except that a client was killed: the benchmark kills clients, and so do the tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def fault(self, kinds: tuple[str, ...]) -> str | None:
        with self.lock:
            kind = self.random.choice(kinds) if self.random.random() < self.fault_rate else None
            if kind:
                self.counts[kind] += 1
        return kind

    def add_file(self, data: bytes) -> dict[str, Any]:
        with self.lock:
            name = f"file-{len(self.files)}"
            self.files[name] = data
        return {"id": name, "object": "file", "bytes": len(data), "purpose": "batch"}

    def create_batch(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            batch = {
                "id": f"batch-{len(self.batches)}",
                "object": "batch",
                "status": "in_progress",
                "endpoint": request["endpoint"],
                "input_file_id": request["input_file_id"],
                "metadata": request.get("metadata"),
                "created_at": time.time(),
            }
            self.batches[batch["id"]] = batch
            self.counts["batches"] += 1
            return batch

    def state(self, name: str) -> dict[str, Any]:
        """A batch's state. Its lines are answered, and paid for, when its time has come."""
        with self.lock:
            batch = self.batches[name]
            due = time.time() - batch["created_at"] >= self.delay
            if due and batch["status"] == "in_progress":
                self._finish(batch)
            lines = self.files[batch["input_file_id"]].count(b"\n")
            done = lines if batch["status"] == "completed" else 0
            return {**batch, "request_counts": {"total": lines, "completed": done, "failed": 0}}

    def _finish(self, batch: dict[str, Any]) -> None:
        if self.refused:
            batch |= {"status": "failed", "errors": {"data": [{"message": self.refused}]}}
            return
        lines = self.files[batch["input_file_id"]].splitlines()
        self.random.shuffle(lines)
        answers, errors = [], []
        for line in lines:
            request = json.loads(line)
            fault, answered = self.fault(LINE_FAULTS), {"custom_id": request["custom_id"], "error": None}
            if fault == "error":
                errors.append({**answered, "response": {"status_code": 500, "body": {"error": {"message": "no"}}}})
            elif fault != "missing":
                text = "" if fault == "empty" else answer_to(memoryview(json.dumps(request["body"]).encode()))
                if text:
                    self.answers[text] += 1
                    self.batched[text] += 1
                body = json.loads(completion(text))
                answers.append({**answered, "response": {"status_code": 200, "body": body}})
        batch["status"] = "completed"
        for field, rows in (("output_file_id", answers), ("error_file_id", errors)):
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            batch[field] = self.add_file(data)["id"] if rows else None

    def listed(self, after: str | None) -> dict[str, Any]:
        """A page of the batches, newest first."""
        with self.lock:
            names = list(reversed(self.batches))
            start = names.index(after) + 1 if after else 0
            page = [self.batches[name] for name in names[start : start + LISTED]]
            return {"object": "list", "data": page, "has_more": start + LISTED < len(names)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BatchServer
    ROUTES: ClassVar[dict[str, str]] = {
        r"POST /v1/files": "upload",
        r"POST /v1/batches": "create",
        r"GET /v1/batches": "list_batches",
        r"GET /v1/batches/([\w-]+)": "batch",
        r"GET /v1/files/([\w-]+)/content": "content",
        r"POST /v1/chat/completions": "complete",
        r"GET /v1/(answers|batched|counts)": "report",
    }

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        found = [(re.fullmatch(route, f"{self.command} {path}"), name) for route, name in self.ROUTES.items()]
        match, name = next(((match, name) for match, name in found if match), (None, "report"))
        if match is None or not (self.server.has_batches or name in ("complete", "report")):
            self.reply(404, {"error": {"message": f"no such address {path}"}})
            return
        if name == "complete" and self.server.moderates_first:
            self.server.moderates_first = False
            self.reply(400, {"error": {"message": "flagged", "code": "content_filter"}})
            return
        fault = None if name == "report" else self.server.fault(HTTP_FAULTS)
        if fault in ("429", "500"):
            self.reply(int(fault), {"error": {"message": "not now"}}, {"Retry-After": "0.2"})
            return
        if fault != "reset_before":
            result = getattr(self, name)(body, *match.groups())
            if fault is None:
                self.reply(200, result)
                return
        self.close_connection = True  # without a reply
        self.connection.close()

    do_GET = do_POST = handle_request

    def upload(self, body: bytes) -> dict[str, Any]:
        boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
        parts = body.split(b"--" + boundary)
        part = next(part for part in parts if b'name="file"' in part.partition(b"\r\n\r\n")[0])
        return self.server.add_file(part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n"))

    def create(self, body: bytes) -> dict[str, Any]:
        return self.server.create_batch(json.loads(body))

    def list_batches(self, body: bytes) -> dict[str, Any]:
        return self.server.listed(parse_qs(urlsplit(self.path).query).get("after", [None])[0])

    def batch(self, body: bytes, name: str) -> dict[str, Any]:
        return self.server.state(name)

    def content(self, body: bytes, name: str) -> bytes:
        return self.server.files[name]

    def complete(self, body: bytes) -> dict[str, Any]:
        text = answer_to(memoryview(body))
        with self.server.lock:
            self.server.answers[text] += 1
            self.server.counts["online"] += 1
        return dict(json.loads(completion(text)))

    def report(self, body: bytes, what: str) -> dict[str, int]:
        with self.server.lock:
            if what != "counts":
                return dict(getattr(self.server, what))
            answered = {"answered": self.server.answers.total(), "distinct": len(self.server.answers)}
            return {**answered, **self.server.counts}

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the output is the base URL only."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=2.0, help="seconds until a batch is completed")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests and of lines that fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    server = BatchServer(args.port, args.delay, args.faults, args.seed)
    print(server.base_url, flush=True)
    server.serve_forever()
