from collections.abc import Iterator

import pytest
from rerank_server import RunningServer, run_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server with default limits. Tests that block its ranker or make it fail start their own server."""
    with run_server(wait_ms=0) as running:
        yield running
