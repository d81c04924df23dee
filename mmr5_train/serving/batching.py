"""Ranks concurrent requests in batches, on one thread that holds the model.

A request that is cancelled while it waits is never ranked. If a batch fails, its requests are ranked one by one,
so that only the request that causes the failure fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mmr5_train.ranking.results import RankedResults

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "stopping", "failed"]


class Ranker(Protocol):
    """The part of `Reranker` that the server uses."""

    @property
    def mode(self) -> str: ...

    def rank_many(
        self, queries: Sequence[str], pages: Sequence[Sequence[bytes]], top_k: int | None = None
    ) -> list[RankedResults]: ...


class StoppingError(Exception):
    """The server is stopping and does not rank this request."""


@dataclass(eq=False)
class _Job:
    query: str
    pages: list[bytes]
    future: Future[RankedResults] = field(default_factory=Future)


class Batcher:
    """A queue of requests, and the thread that ranks them.

    `failure` is the exception that `load` raised, if any. `mode` is the ranker's mode, or None until it is loaded.
    """

    def __init__(self, load: Callable[[], Ranker], batch_size: int, wait_s: float) -> None:
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.mode: str | None = None
        self._load, self._batch_size, self._wait_s = load, batch_size, wait_s
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        # A daemon thread, so that a forward pass that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="reranker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def submit(self, query: str, pages: list[bytes]) -> Future[RankedResults]:
        """Queues a request. Cancelling the future removes it from the queue. Raises `StoppingError`."""
        job = _Job(query, pages)
        with self._changed:
            if self.state != "ready":
                raise StoppingError
            self._jobs.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda future: self._remove(job) if future.cancelled() else None)
        return job.future

    def stop(self) -> None:
        """Rejects the queued requests with `StoppingError`. The thread finishes its current batch and ends."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopping"
            rejected = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in rejected:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(StoppingError())

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _remove(self, job: _Job) -> None:
        """Removes a cancelled job at once, to free the memory of its images."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def _work(self) -> None:
        try:
            ranker = self._load()
        except BaseException as error:
            self.failure = error
            self.state = "failed"
            return
        self.mode = ranker.mode
        with self._changed:
            if self.state == "loading":
                self.state = "ready"
        while batch := self._next_batch():
            _rank(ranker, batch)
            del batch  # free the images before waiting for the next request

    def _next_batch(self) -> list[_Job]:
        """Waits for at least one job and returns it with the others of its batch. Empty when the server stops."""
        batch: list[_Job] = []
        while not batch:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self.state == "stopping")
                if self.state == "stopping":
                    return []
                self._wait_for_more()
                while self._jobs and len(batch) < self._batch_size:
                    job = self._jobs.popleft()
                    if job.future.set_running_or_notify_cancel():
                        batch.append(job)
        return batch

    def _wait_for_more(self) -> None:
        deadline = time.monotonic() + self._wait_s
        while len(self._jobs) < self._batch_size and self.state == "ready":
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            self._changed.wait(remaining)


def _rank(ranker: Ranker, batch: list[_Job]) -> None:
    """Ranks a batch and sets the futures of its jobs. If the batch fails, ranks each job separately."""
    try:
        results = ranker.rank_many([job.query for job in batch], [job.pages for job in batch])
        if len(results) != len(batch):
            raise RuntimeError(f"expected {len(batch)} results from the reranker, found {len(results)}")
    except Exception as error:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        log.warning("a batch of %d requests failed (%s); ranking each request separately", len(batch), error)
        for job in batch:
            _rank(ranker, [job])
        return
    for job, result in zip(batch, results, strict=True):
        job.future.set_result(result)
