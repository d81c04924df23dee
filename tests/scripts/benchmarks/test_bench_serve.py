"""The load test, small, against a server in this process."""

import asyncio
import os

import bench_serve
from rerank_server import serving


def test_a_small_load_and_some_malformed_requests():
    kinds = bench_serve.malformed_kinds()
    assert len({kind.name for kind in kinds}) == len(kinds) >= 15
    with serving(wait_ms=5) as served:
        loaded = asyncio.run(bench_serve.load(served.url, os.getpid(), clients=4, seconds=1))
        assert loaded["answered"] > 4
        assert loaded["failed"] == {}
        assert 0 < loaded["p50_s"] <= loaded["p99_s"] < 2
        assert len(loaded["memory"]) > 5
        assert max(map(len, served.ranker.calls)) > 1
        refused = bench_serve.send_malformed(served.url, len(kinds) + 3, kinds)
        assert refused["wrong"] == []
        assert sum(refused["statuses"].values()) == len(kinds) + 3
        assert bench_serve.ask_once(served.url).status_code == 200


def test_what_is_answered_wrongly_is_found():
    kinds = [
        bench_serve.Malformed("good", 422, "query", b'{"query": 3}'),
        bench_serve.Malformed("another status", 400, "query", b'{"query": 3}'),
        bench_serve.Malformed("other words", 422, "elephants", b'{"query": 3}'),
    ]
    with serving() as served:
        wrong = bench_serve.send_malformed(served.url, 3, kinds)["wrong"]
    assert [problem.partition(":")[0] for problem in wrong] == ["another status", "other words"]
