"""A real server on a free port, around a reranker that judges pages by their colour."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pypdfium2
from PIL import Image

from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import ModelAnswer
from mmr5_train.ranking.results import RankedResults, build_results
from mmr5_train.serving.batching import Ranker
from mmr5_train.serving.server import Server, listen
from mmr5_train.serving.settings import ServeConfig


class FakeRanker:
    """The redder a page, the better. A question with "poison" in it makes its batch fail; `gate` holds it up."""

    mode = "reason"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def rank_many(
        self, queries: Sequence[str], pages: Sequence[Sequence[bytes]], top_k: int | None = None
    ) -> list[RankedResults]:
        self.calls.append(list(queries))
        self.entered.release()
        assert self.gate.wait(30)
        if any("poison" in query for query in queries):
            raise RuntimeError("out of memory in /srv/secret")
        if any("unfit" in query for query in queries):
            raise InputError("page 2 is too long for its width")
        return [self.rank(query, shown) for query, shown in zip(queries, pages, strict=True)]

    def rank(self, query: str, pages: Sequence[bytes]) -> RankedResults:
        reds = []
        for page in pages:
            with Image.open(io.BytesIO(page)) as image:
                red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
            reds.append((red - (green + blue) / 2 + 255) / 510)
        order = sorted(range(len(pages)), key=lambda i: -reds[i])
        notes = {i: f"<b>page {i}</b> is {reds[i]:.2f} red" for i in range(len(pages))}
        answered = ModelAnswer(completion="…", order=tuple(i + 1 for i in order), defects=("no_think",), tokens=7)
        scores = [reds[i] for i in order]
        reasoning = "\n".join(notes.values())
        return build_results(
            query, pages, order, scores=scores, notes=notes, reasoning=reasoning, answers=[answered]
        )


@dataclass
class Served:
    """A running server, what it ranks with, and a client of it."""

    server: Server
    ranker: FakeRanker
    url: str
    client: httpx.Client
    thread: threading.Thread

    def ask(self, query: str, documents: Sequence[Any], **fields: Any) -> httpx.Response:
        return self.client.post("/v1/rerank", json={"query": query, "documents": list(documents), **fields})

    def in_background(self, *queries: str, documents: Sequence[Any]) -> list[Asking]:
        """The questions asked at the same time, each by a thread of its own."""
        asking = [Asking(self, query, documents) for query in queries]
        for one in asking:
            one.start()
        return asking


class Asking(threading.Thread):
    """A question that is being asked; `response` is there after `join`."""

    def __init__(self, served: Served, query: str, documents: Sequence[Any]) -> None:
        super().__init__(daemon=True)
        self.arguments = (query, documents)
        self.served = served
        self.response: httpx.Response | None = None

    def run(self) -> None:
        self.response = self.served.ask(*self.arguments)

    def answer(self) -> httpx.Response:
        self.join(20)
        assert self.response is not None
        return self.response


def until(true: Callable[[], bool], what: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.005)


@contextmanager
def serving(
    ranker: FakeRanker | None = None,
    *,
    key: str | None = None,
    load: Callable[[], Ranker] | None = None,
    **config: Any,
) -> Iterator[Served]:
    ranker = ranker or FakeRanker()
    made = ServeConfig(checkpoint="fake", port=0, shutdown_s=5, **config)
    server = Server(made, load or (lambda: ranker), key)
    listener = listen(made)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        try:
            until(lambda: server.started, "the server listens")
            if load is None:
                until(lambda: server.batcher.state == "ready", "the model is loaded")
            yield Served(server, ranker, url, client, thread)
        finally:
            ranker.gate.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def made_pdf(*sizes):
    """A PDF with an empty page of each size, in points."""
    document = pypdfium2.PdfDocument.new()
    for width, height in sizes:
        document.new_page(width, height)
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()
