"""Ranks concurrent requests in batches, on one thread that holds the model.

A request that is abandoned while it waits is never ranked. When all requests of the batch that is being ranked are
abandoned, ranking stops within a decoding step. If a batch fails, its requests are ranked one by one, so that only
the request that causes the failure fails. Requests with few pages come before those with many (`take_batch`).
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

from mmr5_train.common.cancelling import RankingCancelled
from mmr5_train.models.pages import PageLimits
from mmr5_train.ranking.results import RankedResults

log = logging.getLogger(__name__)

PAGES_PER_SECOND = 2.0
"""How much a second of waiting counts, in pages: a request of 50 pages is overtaken for less than 25 seconds."""

State = Literal["loading", "ready", "stopping", "failed"]


class Ranker(Protocol):
    """The part of `Reranker` that the server uses."""

    @property
    def mode(self) -> str: ...

    def rank_many(
        self,
        queries: Sequence[str],
        pages: Sequence[Sequence[bytes]],
        top_k: int | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> list[RankedResults]: ...


class StoppingError(Exception):
    """The server is stopping and does not rank this request."""


@dataclass(eq=False)
class Job:
    """A request in the queue. `future` has its result."""

    query: str
    pages: list[bytes]
    future: Future[RankedResults] = field(default_factory=Future)
    abandoned: bool = False
    submitted: float = field(default_factory=time.monotonic)


def take_batch(jobs: deque[Job], size: int, max_pages: int, now: float) -> list[Job]:
    """Removes from `jobs` the requests of the next batch, at most `size` with at most `max_pages` pages in all.

    The first has the fewest pages, less what it has waited (`PAGES_PER_SECOND`). The others are the next ones with
    at most twice its pages, because all of them are finished at the same time. A single request may have more than
    `max_pages`.
    """
    by_urgency = sorted(jobs, key=lambda job: len(job.pages) - PAGES_PER_SECOND * (now - job.submitted))
    batch: list[Job] = []
    pages = 0
    for job in by_urgency:
        n = len(job.pages)
        if batch and (len(batch) == size or n > 2 * len(batch[0].pages) or pages + n > max_pages):
            continue
        batch.append(job)
        pages += n
    for job in batch:
        jobs.remove(job)
    return batch


class Batcher:
    """A queue of requests, and the thread that ranks them.

    `failure` is the exception that `load` raised, if any. `mode` is the ranker's mode, or None until it is loaded.
    """

    def __init__(self, load: Callable[[], Ranker], batch_size: int, wait_s: float, batch_pages: int = 64) -> None:
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.mode: str | None = None
        self.page_limits: PageLimits | None = None
        """The page sizes of the model, from which the visual tokens of a request follow; None: unknown."""
        self._load, self._batch_size, self._wait_s, self._batch_pages = load, batch_size, wait_s, batch_pages
        self._jobs: deque[Job] = deque()
        self._running: list[Job] = []
        self._running_since = 0.0
        self._cancel = threading.Event()
        self._changed = threading.Condition()
        # A daemon thread, so that a forward pass that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="reranker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def ranking(self) -> dict[str, float] | None:
        """The batch that is being ranked: its requests, pages and seconds so far; None if there is none."""
        with self._changed:
            if not self._running:
                return None
            pages = sum(len(job.pages) for job in self._running)
            seconds = round(time.monotonic() - self._running_since, 1)
            return {"requests": len(self._running), "pages": pages, "seconds": seconds}

    def submit(self, query: str, pages: list[bytes]) -> Job:
        """Queues a request. Raises `StoppingError`."""
        job = Job(query, pages)
        with self._changed:
            if self.state != "ready":
                raise StoppingError
            self._jobs.append(job)
            self._changed.notify()
        return job

    def abandon(self, job: Job) -> None:
        """Nobody waits for this request any more: it leaves the queue, or its batch if nobody waits for that."""
        with self._changed:
            job.abandoned = True
            job.future.cancel()
            if job in self._jobs:
                self._jobs.remove(job)  # at once, to free the memory of its images
            if self._running and all(running.abandoned for running in self._running):
                self._cancel.set()

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

    def _work(self) -> None:
        try:
            ranker = self._load()
        except BaseException as error:
            self.failure = error
            self.state = "failed"
            return
        self.mode, self.page_limits = ranker.mode, getattr(ranker, "page_limits", None)
        with self._changed:
            if self.state == "loading":
                self.state = "ready"
        while batch := self._next_batch():
            self._rank(ranker, batch)
            del batch  # free the images before waiting for the next request

    def _next_batch(self) -> list[Job]:
        """Waits for at least one job and returns it with the others of its batch. Empty when the server stops."""
        batch: list[Job] = []
        while not batch:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self.state == "stopping")
                if self.state == "stopping":
                    return []
                self._wait_for_more()
                taken = take_batch(self._jobs, self._batch_size, self._batch_pages, time.monotonic())
                batch = [job for job in taken if job.future.set_running_or_notify_cancel()]
        return batch

    def _wait_for_more(self) -> None:
        deadline = time.monotonic() + self._wait_s
        while len(self._jobs) < self._batch_size and self.state == "ready":
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            self._changed.wait(remaining)

    def _rank(self, ranker: Ranker, batch: list[Job]) -> None:
        """Ranks a batch and sets the futures of its jobs. If the batch fails, ranks each job separately."""
        with self._changed:
            self._running, self._running_since = batch, time.monotonic()
            self._cancel.clear()
            if all(job.abandoned for job in batch):
                self._cancel.set()
        try:
            queries, pages = [job.query for job in batch], [job.pages for job in batch]
            results = ranker.rank_many(queries, pages, cancel=self._cancel)
            if len(results) != len(batch):
                raise RuntimeError(f"expected {len(batch)} results from the reranker, found {len(results)}")
        except RankingCancelled as error:
            log.info("ranking of %d requests stopped: their clients do not wait any more", len(batch))
            for job in batch:
                job.future.set_exception(error)
        except Exception as error:
            self._rank_separately(ranker, batch, error)
        else:
            for job, result in zip(batch, results, strict=True):
                job.future.set_result(result)
        finally:
            with self._changed:
                self._running = []

    def _rank_separately(self, ranker: Ranker, batch: list[Job], error: Exception) -> None:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        log.warning("a batch of %d requests failed (%s); ranking each request separately", len(batch), error)
        for job in batch:
            self._rank(ranker, [job])
