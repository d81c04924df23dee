"""The HTTP API: responses, errors, limits, the key, batching and shutdown."""

import json
import os
import socket
import threading
import time
from functools import partial

import httpx
import pytest
from malformed_requests import data_url, encode_image, malformed_requests, rejection_problem
from PIL import Image
from rerank_server import FakeRanker, run_server, wait_until

RED, GREEN, BLUE = (data_url(encode_image("PNG", color=c)) for c in ("red", "green", "blue"))
ROUTES = ("/v1/rerank", "/v2/rerank", "/rerank")
MALFORMED = malformed_requests()


def error_of(response: httpx.Response) -> dict[str, str]:
    body = response.json()
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert body["message"] == body["detail"] == error["message"], "where other clients look"
    return error


@pytest.mark.parametrize("route", ROUTES)
def test_results_are_ordered_by_score(server, route):
    pages = [{"image": BLUE}, RED, {"image_url": {"url": GREEN, "detail": "low"}}]
    body = {"model": "fake", "query": "Which page is red?", "documents": pages, "return_documents": True}
    response = server.client.post(route, json=body | {"return_reasoning": True}).json()
    assert [result["index"] for result in response["results"]] == [1, 2, 0]
    scores = [result["relevance_score"] for result in response["results"]]
    assert scores == sorted(scores, reverse=True)
    documents = [result["document"] for result in response["results"]]
    assert documents == [
        {"image": RED, "text": ""},
        {"image_url": {"url": GREEN}, "text": ""},
        {"image": BLUE, "text": ""},
    ]
    assert response["results"][0]["reasoning"].startswith("<b>page 1</b>")
    assert response["reasoning"].count("\n") == 2
    assert (response["model"], response["usage"], response["defects"]) == (
        "fake",
        {"total_tokens": 7},
        ["no_think"],
    )
    assert response["has_scores"] is True
    assert response["id"].startswith("rerank-")


def test_only_requested_fields_are_returned(server):
    response = server.rerank("red?", [GREEN, RED, BLUE], top_n=2, max_tokens_per_doc=4096).json()
    assert [sorted(result) for result in response["results"]] == [["index", "relevance_score"]] * 2
    assert response["reasoning"] is None
    assert len(server.rerank("red?", [GREEN, RED], top_n=9).json()["results"]) == 2


@pytest.mark.parametrize("malformed", MALFORMED, ids=lambda malformed: malformed.name)
def test_malformed_request_is_rejected(server, malformed):
    response = server.client.request(
        malformed.method, malformed.path, content=malformed.body, headers=malformed.headers
    )
    assert rejection_problem(malformed, response) is None
    assert error_of(response)["type"] == "invalid_request_error"


def test_body_without_content_length_is_limited(server):
    sent_bytes = 0

    def endless():
        nonlocal sent_bytes
        while sent_bytes < 200_000_000:
            sent_bytes += 1_000_000
            yield b" " * 1_000_000

    with run_server(limits={"body_mb": 2}) as small:
        try:
            response = small.client.post(
                "/v1/rerank", content=endless(), headers={"Content-Type": "application/json"}
            )
            assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        except httpx.WriteError:  # the server closed the connection while the client was still sending
            assert sent_bytes < 200_000_000
        assert small.rerank("red?", [RED]).status_code == 200


def test_limits_come_from_the_config():
    limits = {"pages": 2, "query_chars": 20, "megapixels": 0.02}
    with run_server(limits=limits) as small:
        too_many = error_of(small.rerank("red?", [RED, RED, RED]))
        assert too_many["message"] == "documents: expected at most 2 pages, found 3"
        assert error_of(small.rerank("q" * 21, [RED]))["code"] == "query_too_long"
        large = data_url(encode_image("PNG", (200, 101)))
        assert error_of(small.rerank("red?", [RED, large])) == {
            "message": "documents[1]: is 200 × 101 pixels, more than 0.02 megapixels; send a smaller image",
            "type": "invalid_request_error",
            "param": "documents[1]",
            "code": "too_many_pixels",
        }
        assert small.rerank("red?", [RED, BLUE]).status_code == 200


def test_images_may_be_paths_inside_the_folder_only(tmp_path):
    folder, outside = tmp_path / "pages", tmp_path / "outside.png"
    (folder / "doc").mkdir(parents=True)
    (folder / "doc/page 1.png").write_bytes(encode_image("PNG"))
    (folder / "doc/page-2.png").write_bytes(encode_image("PNG", color="blue"))
    outside.write_bytes(encode_image("PNG"))
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "doc/page-2.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    (folder / "large.png").write_bytes(bytes(1_500_000))
    Image.effect_noise((800, 800), 60).save(folder / "noisy.png")
    os.mkfifo(folder / "pipe.png")
    with run_server(folder=folder, limits={"body_mb": 1}) as folder_server:
        documents = [{"image": "doc/page-2.png"}, "doc/page 1.png", "file:doc/page%201.png", "inside.png"]
        documents += [f"file://{folder}/doc/page-2.png", {"image_url": {"url": "doc/../doc/page-2.png"}}]
        response = folder_server.rerank("red?", documents, return_documents=True)
        assert response.status_code == 200, response.text
        assert {result["index"] for result in response.json()["results"][:2]} == {1, 2}
        assert response.json()["results"][0]["document"] == {"image": "doc/page 1.png", "text": ""}
        for path in (
            "../outside.png",
            "link.png",
            "up/outside.png",
            str(outside),
            f"file://{outside}",
            "file:/etc/hosts",
        ):
            error = error_of(folder_server.rerank("red?", [RED, {"image": path}]))
            assert (error["code"], error["param"]) == ("path_refused", "documents[1]"), path
            assert str(tmp_path) not in error["message"].replace(path, "")
        for path in (
            "nothing.png",
            "doc",
            "pipe.png",
            "round.png",
            "a\0b",
            "Water use fell.",
            "x\ud800.png",
            "y" * 5000,
        ):
            rerank = folder_server.rerank if path.isprintable() else partial(post_ascii, folder_server)
            response = rerank("red?", [{"image": path}])
            assert response.status_code == 422, path
            assert error_of(response)["code"] == ("invalid_character" if "\ud800" in path else "not_a_picture")
        assert error_of(folder_server.rerank("red?", ["large.png"]))["code"] == "picture_too_large"
        assert folder_server.rerank("red?", ["noisy.png"]).status_code == 200
        assert error_of(folder_server.rerank("red?", ["noisy.png"] * 3))["code"] == "pictures_too_large"
        url_error = error_of(folder_server.rerank("red?", ["https://example.com/page.png"]))
        assert "does not fetch URLs" in url_error["message"]


def post_ascii(server, query, documents):
    """Like `RunningServer.rerank`, for text that can't be encoded as UTF-8."""
    body = json.dumps({"query": query, "documents": documents}).encode("ascii")
    return server.client.post("/v1/rerank", content=body, headers={"Content-Type": "application/json"})


def test_key_is_required():
    with run_server(key="sk-right") as locked:
        invalid = ("Bearer sk-wrong", "sk-right", "Basic sk-right", "Bearer sk-r\xefght".encode("latin-1"))
        for headers in ({}, *({"Authorization": value} for value in invalid)):
            for path in (*ROUTES, "/pages"):
                response = locked.client.post(path, json={}, headers=headers)
                assert response.status_code == 401
                assert error_of(response)["type"] == "authentication_error"
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert "sk-" not in response.text
            assert locked.client.get("/v1/models", headers=headers).status_code == 401
        valid = {"Authorization": "Bearer sk-right"}
        assert locked.client.get("/v1/models", headers=valid).json()["data"][0]["id"] == "fake"
        assert (
            locked.client.post("/rerank", json={"query": "?", "documents": [RED]}, headers=valid).status_code
            == 200
        )
        assert locked.client.get("/").status_code == locked.client.get("/health").status_code == 200
        assert "sk-" not in locked.client.get("/health").text


def test_concurrent_requests_are_batched():
    with run_server(batch_size=4) as busy:
        busy.ranker.gate.clear()
        first = busy.rerank_in_background("first", documents=[RED])
        assert busy.ranker.entered.acquire(timeout=10)
        others = busy.rerank_in_background(*(f"other {i}" for i in range(6)), documents=[GREEN, RED])
        wait_until(lambda: busy.server.batcher.waiting == 6, "six requests wait")
        assert busy.client.get("/health").json()["waiting"] == 6
        busy.ranker.gate.set()
        for request in (*first, *others):
            assert request.response().status_code == 200
        assert [request.response().json()["results"][0]["index"] for request in others] == [1] * 6
        assert [len(call) for call in busy.ranker.calls] == [1, 4, 2]


def test_request_waits_for_others_to_share_its_batch():
    with run_server(wait_ms=2000, batch_size=2) as patient:
        start = time.monotonic()
        both = patient.rerank_in_background("one", "two", documents=[RED])
        assert [request.response().status_code for request in both] == [200, 200]
        assert time.monotonic() - start < 1.5  # a full batch starts before the waiting time ends
        assert [len(call) for call in patient.ranker.calls] == [2]


def test_only_the_request_that_breaks_a_batch_fails(caplog):
    with run_server() as busy:
        busy.ranker.gate.clear()
        first = busy.rerank_in_background("first", documents=[RED])
        assert busy.ranker.entered.acquire(timeout=10)
        others = busy.rerank_in_background("good", "poison", "unfit", documents=[GREEN, RED])
        wait_until(lambda: busy.server.batcher.waiting == 3, "three requests wait")
        busy.ranker.gate.set()
        good, poison, unfit = (request.response() for request in others)
        assert first[0].response().status_code == good.status_code == 200
        assert (poison.status_code, error_of(poison)["code"]) == (500, "internal_error")
        assert "secret" not in poison.text
        assert "/srv/secret" in caplog.text
        assert unfit.status_code == 422
        assert error_of(unfit)["message"] == "documents: page 2 is too long for its width"
        assert busy.rerank("again", [RED]).status_code == 200


def test_ranking_stops_when_the_time_of_its_request_is_over():
    with run_server(limits={"seconds": 0.5}) as slow:
        slow.ranker.gate.clear()
        response = slow.rerank("held", [RED])
        assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
        assert int(response.headers["Retry-After"]) > 0
        wait_until(lambda: slow.ranker.stopped == [["held"]], "the model is free again")
        slow.ranker.gate.set()
        assert slow.rerank("afterwards", [RED]).status_code == 200
        assert slow.ranker.calls == [["held"], ["afterwards"]]


def leave(server, query):
    """Sends a request and closes the connection after half a second."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/rerank", json={"query": query, "documents": [RED]}, timeout=0.5, trust_env=False)


def test_ranking_stops_when_all_clients_of_its_batch_are_gone():
    with run_server() as busy:
        busy.ranker.gate.clear()
        leave(busy, "leaves")
        wait_until(lambda: busy.ranker.stopped == [["leaves"]], "the model is free again")
        busy.ranker.gate.set()
        assert busy.rerank("afterwards", [RED]).status_code == 200


def test_ranking_goes_on_while_one_client_of_its_batch_waits():
    with run_server(wait_ms=300, batch_size=2) as busy:
        busy.ranker.gate.clear()
        waits = busy.rerank_in_background("waits", documents=[RED])
        leave(busy, "leaves")
        assert busy.ranker.entered.acquire(timeout=10)
        time.sleep(0.1)
        busy.ranker.gate.set()
        assert waits[0].response().status_code == 200
        assert sorted(busy.ranker.calls[0]) == ["leaves", "waits"]
        assert busy.ranker.stopped == []


def test_request_is_dropped_when_its_client_disconnects():
    with run_server() as busy:
        busy.ranker.gate.clear()
        held = busy.rerank_in_background("held", documents=[RED])
        assert busy.ranker.entered.acquire(timeout=10)
        leave(busy, "disconnects")
        wait_until(lambda: busy.server.batcher.waiting == 0, "the request is removed from the queue")
        busy.ranker.gate.set()
        assert held[0].response().status_code == 200
        assert busy.rerank("afterwards", [RED]).status_code == 200
        assert busy.ranker.calls == [["held"], ["afterwards"]]


def test_too_many_requests_are_rejected_at_once():
    with run_server(limits={"requests": 2}) as full:
        full.ranker.gate.clear()
        requests = full.rerank_in_background("one", "two", documents=[RED])
        wait_until(lambda: full.client.get("/health").json()["requests"] == 2, "two requests are admitted")
        rejected = full.rerank("three", [RED])
        assert (rejected.status_code, error_of(rejected)["code"]) == (503, "queue_full")
        assert rejected.headers["Retry-After"]
        full.ranker.gate.set()
        assert [request.response().status_code for request in requests] == [200, 200]
        assert full.rerank("three", [RED]).status_code == 200


@pytest.mark.parametrize("first", ["", "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_half_sent_headers_time_out(monkeypatch, first):
    """Also those of a second request on the same connection."""
    monkeypatch.setattr("mmr5_train.serving.protocol.HEADER_SECONDS", 0.3)
    with (
        run_server() as quick,
        socket.create_connection(("127.0.0.1", httpx.URL(quick.url).port), timeout=5) as raw,
    ):
        if first:
            raw.sendall(first.encode())
            assert b"200" in raw.recv(4096).splitlines()[0]
        start = time.monotonic()
        raw.sendall(b"POST /rerank HTTP/1.1\r\nHost: x\r\n")
        assert raw.recv(4096) == b"", "the server closes the connection"
        assert time.monotonic() - start < 3
        assert quick.rerank("afterwards", [RED]).status_code == 200


def test_slow_body_times_out():
    with run_server(limits={"seconds": 0.3}) as quick:
        with socket.create_connection(("127.0.0.1", httpx.URL(quick.url).port), timeout=10) as raw:
            headers = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 99"
            raw.sendall(f"POST /rerank HTTP/1.1\r\n{headers}\r\n\r\n{{".encode())
            assert b"408" in raw.recv(4096).splitlines()[0]
        assert quick.rerank("afterwards", [RED]).status_code == 200


def test_server_reports_that_the_model_is_loading():
    ready = threading.Event()
    ranker = FakeRanker()

    def load():
        assert ready.wait(20)
        return ranker

    with run_server(ranker, load=load) as early:
        assert (early.client.get("/health").status_code, early.client.get("/health").json()["status"]) == (
            503,
            "loading",
        )
        rejected = early.rerank("red?", [RED])
        assert (rejected.status_code, error_of(rejected)["code"]) == (503, "not_ready")
        assert rejected.headers["Retry-After"]
        ready.set()
        wait_until(lambda: early.client.get("/health").status_code == 200, "the model is loaded")
        health = early.client.get("/health").json()
        assert health.items() >= {"status": "ready", "model": "fake", "mode": "reason", "waiting": 0}.items()
        assert early.rerank("red?", [RED]).status_code == 200


def test_shutdown_finishes_the_batch_and_rejects_the_queue():
    with run_server() as stopping:
        stopping.ranker.gate.clear()
        ranked = stopping.rerank_in_background("ranked", documents=[RED])
        assert stopping.ranker.entered.acquire(timeout=10)
        waiting = stopping.rerank_in_background("waiting", documents=[RED])
        wait_until(lambda: stopping.server.batcher.waiting == 1, "one request waits")
        stopping.server.should_exit = True
        rejected = waiting[0].response()
        assert (rejected.status_code, error_of(rejected)["code"]) == (503, "not_ready")
        stopping.ranker.gate.set()
        assert ranked[0].response().status_code == 200
        stopping.thread.join(10)
        assert not stopping.thread.is_alive()
        assert stopping.ranker.calls == [["ranked"]]
