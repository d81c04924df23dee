"""A real server on a free port, with a fake reranker that scores pages by their color."""

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

from mmr5_train.common.cancelling import raise_if_cancelled
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import ModelAnswer
from mmr5_train.ranking.results import Document, RankedResults, build_results
from mmr5_train.serving.batching import Ranker
from mmr5_train.serving.server import Server, listen
from mmr5_train.serving.settings import ServeConfig


class FakeRanker:
    """Scores a page by how red it is.

    A query that contains "poison" makes its batch fail with `RuntimeError`, one that contains "unfit" with
    `InputError`. Each call waits until `gate` is set, and releases `entered` when it starts waiting. `stopped` has
    the queries of the calls that were cancelled.
    """

    mode = "reason"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.stopped: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def rank_many(
        self,
        queries: Sequence[str],
        pages: Sequence[Sequence[bytes]],
        top_k: int | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> list[RankedResults]:
        self.calls.append(list(queries))
        self.entered.release()
        end = time.monotonic() + 30
        while not self.gate.wait(0.01):
            if cancel is not None and cancel.is_set():
                self.stopped.append(list(queries))
            raise_if_cancelled(cancel)
            assert time.monotonic() < end
        if any("poison" in query for query in queries):
            raise RuntimeError("out of memory in /srv/secret")
        if any("unfit" in query for query in queries):
            raise InputError("page 2 is too long for its width")
        return [self.rank(query, candidates) for query, candidates in zip(queries, pages, strict=True)]

    def rank(self, query: str, pages: Sequence[bytes]) -> RankedResults:
        redness = []
        for page in pages:
            with Image.open(io.BytesIO(page)) as image:
                red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
            redness.append((red - (green + blue) / 2 + 255) / 510)
        order = sorted(range(len(pages)), key=lambda i: -redness[i])
        notes = {i: f"<b>page {i}</b> is {redness[i]:.2f} red" for i in range(len(pages))}
        answer = ModelAnswer(completion="…", order=tuple(i + 1 for i in order), defects=("no_think",), tokens=7)
        scores = [redness[i] for i in order]
        reasoning = "\n".join(notes.values())
        return build_results(
            query,
            [Document(page) for page in pages],
            order,
            scores=scores,
            notes=notes,
            reasoning=reasoning,
            answers=[answer],
        )


@dataclass
class RunningServer:
    """A running server, its ranker and its thread, and a client for it."""

    server: Server
    ranker: FakeRanker
    url: str
    client: httpx.Client
    thread: threading.Thread

    def rerank(self, query: str, documents: Sequence[Any], **fields: Any) -> httpx.Response:
        return self.client.post("/v1/rerank", json={"query": query, "documents": list(documents), **fields})

    def rerank_in_background(self, *queries: str, documents: Sequence[Any]) -> list[BackgroundRequest]:
        """Sends one request per query at the same time, each from its own thread."""
        requests = [BackgroundRequest(self, query, documents) for query in queries]
        for request in requests:
            request.start()
        return requests


class BackgroundRequest(threading.Thread):
    """A rerank request sent from its own thread."""

    def __init__(self, server: RunningServer, query: str, documents: Sequence[Any]) -> None:
        super().__init__(daemon=True)
        self.arguments = (query, documents)
        self.server = server
        self._response: httpx.Response | None = None

    def run(self) -> None:
        self._response = self.server.rerank(*self.arguments)

    def response(self) -> httpx.Response:
        """Waits for the response."""
        self.join(20)
        assert self._response is not None
        return self._response


def wait_until(condition: Callable[[], bool], description: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out after {seconds} s: {description}"
        time.sleep(0.005)


@contextmanager
def run_server(
    ranker: FakeRanker | None = None,
    *,
    key: str | None = None,
    load: Callable[[], Ranker] | None = None,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Runs a server. Waits until the ranker is loaded, unless `load` is given."""
    ranker = ranker or FakeRanker()
    config = ServeConfig(checkpoint="fake", port=0, shutdown_s=5, **settings)
    server = Server(config, load or (lambda: ranker), key)
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        try:
            wait_until(lambda: server.started, "the server listens")
            if load is None:
                wait_until(lambda: server.batcher.state == "ready", "the model is loaded")
            yield RunningServer(server, ranker, url, client, thread)
        finally:
            ranker.gate.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def blank_pdf(*sizes):
    """A PDF with an empty page of each size, in points."""
    document = pypdfium2.PdfDocument.new()
    for width, height in sizes:
        document.new_page(width, height)
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()
