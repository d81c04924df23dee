"""Requests that come at the same time are ranked together, by one thread that holds the model.

A request that is cancelled before its turn is never ranked, and one that makes a batch fail fails alone.
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
    """What the server needs of a reranker."""

    @property
    def mode(self) -> str: ...

    def rank_many(
        self, queries: Sequence[str], pages: Sequence[Sequence[bytes]], top_k: int | None = None
    ) -> list[RankedResults]: ...


class StoppingError(Exception):
    """The server stops, and does not rank this any more."""


@dataclass(eq=False)
class _Job:
    query: str
    pages: list[bytes]
    future: Future[RankedResults] = field(default_factory=Future)


class Batcher:
    """A queue, and the thread that ranks what stands in it.

    `failure` is what kept the model from loading, `mode` how it ranks when it is loaded.
    """

    def __init__(self, load: Callable[[], Ranker], batch_size: int, wait_s: float) -> None:
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.mode: str | None = None
        self._load, self._batch_size, self._wait_s = load, batch_size, wait_s
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        # A daemon: a forward pass that never ends must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="reranker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def submit(self, query: str, pages: list[bytes]) -> Future[RankedResults]:
        """The ranking to come. Cancelled before its turn, it is not made. Raises `StoppingError`."""
        job = _Job(query, pages)
        with self._changed:
            if self.state != "ready":
                raise StoppingError
            self._jobs.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda future: self._forget(job) if future.cancelled() else None)
        return job.future

    def stop(self) -> None:
        """Refuses what waits; the batch that is being ranked is ended, and then the thread."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopping"
            refused = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(StoppingError())

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _forget(self, job: _Job) -> None:
        """Its pictures need not be kept until its turn."""
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
        while batch := self._take():
            _rank(ranker, batch)
            del batch  # nothing is kept of it until the next request comes

    def _take(self) -> list[_Job]:
        """The next jobs, one at least; none when the server stops."""
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
        end = time.monotonic() + self._wait_s
        while len(self._jobs) < self._batch_size and self.state == "ready":
            remaining = end - time.monotonic()
            if remaining <= 0:
                return
            self._changed.wait(remaining)


def _rank(ranker: Ranker, batch: list[_Job]) -> None:
    try:
        results = ranker.rank_many([job.query for job in batch], [job.pages for job in batch])
        if len(results) != len(batch):
            raise RuntimeError(f"{len(batch)} questions were given to the reranker, {len(results)} came back")
    except Exception as error:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        log.warning("a batch of %d failed (%s); each request of it is ranked alone", len(batch), error)
        for job in batch:
            _rank(ranker, [job])
        return
    for job, result in zip(batch, results, strict=True):
        job.future.set_result(result)
