"""Fixtures of the server's tests."""

from collections.abc import Iterator

import pytest
from rerank_server import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server with default limits; tests that hold up or fail its ranker take one of their own."""
    with serving(wait_ms=0) as running:
        yield running
