"""How long each part of ranking takes: opening pages, resizing them, and what the model does with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

PARTS = ("open", "resize", "encode", "vision", "prefill", "decode")
"""Pages are opened and resized, then cut into patches and put into prompts (encode). The vision tower reads the
patches, the text model reads the prompts (prefill), and completions are decoded."""


class PartTimes:
    """Seconds of each part. Parts that run in several threads at once count the seconds of each thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = Lock()

    @contextmanager
    def part(self, name: str, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Adds the seconds of the block to a part. `finish` waits for work that the block has only started."""
        start = time.perf_counter()
        yield
        finish()
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
