"""A chat completion server for benchmarks. It answers after a delay, injects faults, and counts its replies.

    python scripts/benchmarks/chat_server.py --delay 0.2                  # prints its base URL
    python scripts/benchmarks/chat_server.py --delay 0.05 --faults 0.3    # 30 % of the calls fail, in six ways

The answer depends only on the question, the page and the relevance label in the request, and differs for each
combination. Below the base URL, `GET /counts` returns the number of requests, of valid answers (`answered`), of
different valid answers (`distinct`), and of each kind of fault. `GET /answers` returns how often each answer was
sent. The server does as little work as possible, since it shares the machine with the measured program.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
from collections import Counter
from typing import Any

FAULTS = ("429", "500", "reset", "hang", "cut_off", "empty")
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_REASON = {200: "OK", 429: "Too Many Requests", 500: "Internal Server Error"}


class ServerState:
    """The state that all connections share: settings and counts."""

    def __init__(self, delay: float, faults: float, seed: int) -> None:
        self.delay, self.fault_rate, self.random = delay, faults, random.Random(seed)
        self.requests = 0
        self.answers: Counter[str] = Counter()
        self.faults_sent: Counter[str] = Counter()

    def report(self, path: bytes) -> dict[str, int]:
        if path.startswith(b"GET /v1/answers"):
            return self.answers
        answered = {"answered": self.answers.total(), "distinct": len(self.answers)}
        return {"requests": self.requests, **answered, **self.faults_sent}


class Endpoint(asyncio.BufferedProtocol):
    """One connection, which handles one request after the other."""

    def __init__(self, state: ServerState) -> None:
        self.state, self.buffer, self.received = state, bytearray(1 << 18), bytearray()
        self.body_start = self.expected_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += memoryview(self.buffer)[:nbytes]
        if not self.expected_bytes and (end := self.received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.received, 0, end)
            self.body_start, self.expected_bytes = end + 4, end + 4 + (int(length[1]) if length else 0)
        if self.expected_bytes and len(self.received) >= self.expected_bytes:
            request, self.received, self.expected_bytes = self.received, bytearray(), 0
            if request.startswith(b"GET"):
                self.reply(200, json.dumps(self.state.report(bytes(request[:40]))))
            else:
                body = memoryview(request)[self.body_start :]
                asyncio.get_running_loop().call_later(self.state.delay, self.answer, body)

    def answer(self, body: memoryview) -> None:
        if self.transport.is_closing():  # the client disconnected, so nothing is answered or counted
            return
        state = self.state
        state.requests += 1
        fault = state.random.choice(FAULTS) if state.random.random() < state.fault_rate else None
        if fault:
            state.faults_sent[fault] += 1
            self.fail(fault, body)
        else:
            answer = answer_to(body)
            state.answers[answer] += 1
            self.reply(200, completion(answer))

    def fail(self, fault: str, body: memoryview) -> None:
        if fault in ("429", "500"):
            header = "Retry-After: 1\r\n" if fault == "429" else ""
            self.reply(int(fault), json.dumps({"error": {"message": "not now"}}), header)
        elif fault == "reset":
            self.transport.abort()
        elif fault == "cut_off":
            complete = completion(answer_to(body))
            self.reply(200, complete[: len(complete) // 2])
        elif fault == "empty":
            self.reply(200, completion(""))
        # "hang" never replies

    def reply(self, status: int, body: str, header: str = "") -> None:
        data = body.encode()
        head = f"HTTP/1.1 {status} {_REASON[status]}\r\nContent-Type: application/json\r\n{header}"
        self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def answer_to(body: memoryview) -> str:
    """A note, or two sentences, as the default templates of configs/teacher/openai.yaml request."""
    user = json.loads(bytes(body))["messages"][1]["content"]
    # A request that is repeated after an unusable answer gets the same answer.
    text = user[-1]["text"].partition("\n\nYour last reply")[0]
    images = [part["image_url"]["url"] for part in user[:-1]]
    figure = hashlib.sha256("\n".join([text, *images]).encode()).hexdigest()[:12]
    if not images:
        helping, _, rest = text.partition("why ")[2].partition(" can help")
        others = rest.partition("why ")[2].partition(" can't")[0]
        return f"{helping} can help with figure {figure}." + (f" {others} can't." if others else "")
    return f"It shows figure {figure}.\nVerdict: {'helps' if 'is of use' in text else 'does not help'}"


def completion(text: str) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1300, "completion_tokens": 20, "total_tokens": 1320}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    )


async def serve(args: argparse.Namespace) -> None:
    state = ServerState(args.delay, args.faults, args.seed)
    server = await asyncio.get_running_loop().create_server(lambda: Endpoint(state), "127.0.0.1", args.port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds before a reply")
    parser.add_argument("--faults", type=float, default=0.0, help="share of calls that fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))
