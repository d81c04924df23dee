"""A chat completion endpoint for measurements: it answers after a delay, or makes trouble, and counts both.

    python scripts/benchmarks/chat_server.py --delay 0.2                  # prints its base URL
    python scripts/benchmarks/chat_server.py --delay 0.05 --faults 0.3    # 30 % of the calls go wrong, in six ways

The answer depends on the question, the page and the label that are asked about, and on nothing else; no two are
alike. `GET /counts` says how many requests came, how many were answered well (`answered`), how many of these
answers were different (`distinct`), and which faults were made; `GET /answers` says how often each answer was
given. It does as little as it can, since it shares its machine with what is measured.
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


class Counts:
    """What every connection of the server shares."""

    def __init__(self, delay: float, faults: float, seed: int) -> None:
        self.delay, self.faults, self.random = delay, faults, random.Random(seed)
        self.requests = 0
        self.answers: Counter[str] = Counter()
        self.made: Counter[str] = Counter()

    def report(self, path: bytes) -> dict[str, int]:
        if path.startswith(b"GET /v1/answers"):
            return self.answers
        answered = {"answered": self.answers.total(), "distinct": len(self.answers)}
        return {"requests": self.requests, **answered, **self.made}


class Endpoint(asyncio.BufferedProtocol):
    """One connection: a request, its reply, the next request."""

    def __init__(self, counts: Counts) -> None:
        self.counts, self.buffer, self.received = counts, bytearray(1 << 18), bytearray()
        self.body_at = self.expected = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += memoryview(self.buffer)[:nbytes]
        if not self.expected and (end := self.received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.received, 0, end)
            self.body_at, self.expected = end + 4, end + 4 + (int(length[1]) if length else 0)
        if self.expected and len(self.received) >= self.expected:
            whole, self.received, self.expected = self.received, bytearray(), 0
            if whole.startswith(b"GET"):
                self.reply(200, json.dumps(self.counts.report(bytes(whole[:40]))))
            else:
                asyncio.get_running_loop().call_later(
                    self.counts.delay, self.answer, memoryview(whole)[self.body_at :]
                )

    def answer(self, body: memoryview) -> None:
        if self.transport.is_closing():  # nobody is there any more: nothing was answered
            return
        counts = self.counts
        counts.requests += 1
        fault = counts.random.choice(FAULTS) if counts.random.random() < counts.faults else None
        if fault:
            counts.made[fault] += 1
            self.fail(fault, body)
        else:
            answer = answer_to(body)
            counts.answers[answer] += 1
            self.reply(200, completion(answer))

    def fail(self, fault: str, body: memoryview) -> None:
        if fault in ("429", "500"):
            header = "Retry-After: 1\r\n" if fault == "429" else ""
            self.reply(int(fault), json.dumps({"error": {"message": "not now"}}), header)
        elif fault == "reset":
            self.transport.abort()
        elif fault == "cut_off":
            whole = completion(answer_to(body))
            self.reply(200, whole[: len(whole) // 2])
        elif fault == "empty":
            self.reply(200, completion(""))
        # and "hang" says nothing, ever

    def reply(self, status: int, body: str, header: str = "") -> None:
        data = body.encode()
        head = f"HTTP/1.1 {status} {_REASON[status]}\r\nContent-Type: application/json\r\n{header}"
        self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def answer_to(body: memoryview) -> str:
    """A note, or two sentences, made of what the default templates of configs/teacher/openai.yaml ask."""
    user = json.loads(bytes(body))["messages"][1]["content"]
    text = user[-1]["text"].partition("\n\nYour last reply")[0]  # nor on what is said when asked again
    pictures = [part["image_url"]["url"] for part in user[:-1]]
    what = hashlib.sha256("\n".join([text, *pictures]).encode()).hexdigest()[:12]
    if not pictures:
        helping, _, rest = text.partition("why ")[2].partition(" can help")
        others = rest.partition("why ")[2].partition(" can't")[0]
        return f"{helping} can help with figure {what}." + (f" {others} can't." if others else "")
    return f"It shows figure {what}, so it {'helps' if 'is of use' in text else 'does not help'}."


def completion(text: str) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1300, "completion_tokens": 20, "total_tokens": 1320}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    )


async def serve(args: argparse.Namespace) -> None:
    counts = Counts(args.delay, args.faults, args.seed)
    server = await asyncio.get_running_loop().create_server(lambda: Endpoint(counts), "127.0.0.1", args.port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds before a reply")
    parser.add_argument("--faults", type=float, default=0.0, help="share of calls that go wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))
