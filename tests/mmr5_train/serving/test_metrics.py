"""Counts in Prometheus's format, request ids, and the log of requests."""

import json
import logging
import threading

import pytest
from malformed_requests import data_url, encode_image
from prometheus_client.parser import text_string_to_metric_families
from rerank_server import FakeRanker, run_server, wait_until

RED = data_url(encode_image("PNG", color="red"))


def samples(server, headers=None):
    text = server.client.get("/metrics", headers=headers).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_pages_tokens_and_defects_are_counted():
    with run_server(wait_ms=0) as server:
        for _ in range(2):
            server.rerank("red?", [RED, RED, RED])
        server.rerank("red?", ["no image"])
        server.client.get("/nothing/here")
        counts = samples(server)
    assert counts["mmr5_requests_total", "/v1/rerank", "200"] == 2
    assert counts["mmr5_requests_total", "/v1/rerank", "422"] == 1
    assert counts["mmr5_requests_total", "other", "404"] == 1
    assert counts["mmr5_request_seconds_count", "/v1/rerank"] == 3
    assert counts["mmr5_ranked_pages_total",] == 6
    assert counts["mmr5_tokens_total", "generated"] == 14
    assert counts["mmr5_defects_total", "no_think"] == 2
    assert counts["mmr5_waiting",] == counts["mmr5_abandoned_total",] == 0


def test_metrics_need_the_key():
    with run_server(key="secret") as server:
        assert server.client.get("/metrics").status_code == 401
        assert samples(server, {"Authorization": "Bearer secret"})["mmr5_waiting",] == 0


def test_health_shows_what_is_ranked_since_when():
    ranker, release = FakeRanker(), threading.Event()
    rank_many = ranker.rank_many
    ranker.rank_many = lambda *args, **options: release.wait(10) and rank_many(*args, **options)
    with run_server(ranker, wait_ms=0) as server:
        assert server.client.get("/health").json()["ranking"] is None
        [request] = server.rerank_in_background("red?", documents=[RED, RED])
        wait_until(lambda: server.client.get("/health").json()["ranking"], "a batch is being ranked")
        ranking = server.client.get("/health").json()["ranking"]
        assert (ranking["requests"], ranking["pages"]) == (1, 2)
        assert 0 <= ranking["seconds"] < 10
        release.set()
        assert request.response().status_code == 200


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 65, False), ("", False)])
def test_each_response_has_a_request_id(server, given, kept):
    response = server.client.get("/health", headers={"X-Request-Id": given} if given else {})
    assert (response.headers["x-request-id"] == given) == kept
    assert len(response.headers["x-request-id"]) <= 64


def test_requests_are_logged_without_their_content(caplog):
    with (
        caplog.at_level(logging.INFO, "mmr5_train.serving.requests_log"),
        run_server(wait_ms=0, request_log="INFO") as server,
    ):
        response = server.rerank("a private question", [RED])
    lines = [r.message for r in caplog.records if r.name == "mmr5_train.serving.requests_log"]
    entry = json.loads(lines[-1])
    assert entry["id"] == response.headers["x-request-id"]
    assert (entry["route"], entry["status"]) == ("/v1/rerank", 200)
    assert set(entry) == {"id", "route", "status", "seconds"}
    assert "private" not in "".join(lines)
