"""The server's benchmark at a small size, with a server in this process."""

import asyncio
import os

import bench_serve
from malformed_requests import Malformed, malformed_requests
from rerank_server import run_server


def test_load_has_no_failures_and_malformed_requests_are_rejected():
    malformed = malformed_requests()
    assert len({request.name for request in malformed}) == len(malformed) == 54
    with run_server(wait_ms=5) as server:
        load = asyncio.run(bench_serve.run_load(server.url, os.getpid(), clients=4, seconds=1))
        assert load["answered"] > 4
        assert load["failed"] == {}
        assert 0 < load["p50_s"] <= load["p99_s"] < 2
        assert len(load["memory"]) > 5
        assert max(map(len, server.ranker.calls)) > 1
        rejections = bench_serve.send_malformed(server.url, len(malformed) + 3, malformed)
        assert rejections["wrong"] == []
        assert sum(rejections["statuses"].values()) == len(malformed) + 3
        status = bench_serve.send_valid(server.url).status_code
        assert status == 200
    result = {"load": load, "malformed": rejections, "good_request_afterwards": status}
    assert [target["met"] for target in bench_serve.targets(result)] == [True] * 5
    assert not bench_serve.has_wrong_response(result)


def test_wrong_responses_are_reported():
    malformed = [
        Malformed("as expected", 422, "query", b'{"query": 3}'),
        Malformed("another status", 400, "query", b'{"query": 3}'),
        Malformed("another message", 422, "elephants", b'{"query": 3}'),
    ]
    with run_server() as server:
        problems = bench_serve.send_malformed(server.url, 3, malformed)["wrong"]
    assert [problem.partition(":")[0] for problem in problems] == ["another status", "another message"]
