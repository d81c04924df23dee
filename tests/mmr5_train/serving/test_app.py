"""The API as a client meets it: answers, refusals, limits, the key, batches, and what happens at the end."""

import json
import os
import socket
import threading
import time

import bench_serve
import httpx
import pytest
from PIL import Image
from rerank_server import FakeRanker, serving, until

RED, GREEN, BLUE = (bench_serve.data_url(bench_serve.encoded("PNG", color=c)) for c in ("red", "green", "blue"))
ROUTES = ("/v1/rerank", "/v2/rerank", "/rerank")
KINDS = bench_serve.malformed_kinds()


def error_of(response: httpx.Response) -> dict[str, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("route", ROUTES)
def test_pages_come_back_in_order(served, route):
    documents = [{"image": BLUE}, RED, {"image_url": {"url": GREEN, "detail": "low"}}]
    body = {"model": "fake", "query": "Which page is red?", "documents": documents, "return_documents": True}
    answered = served.client.post(route, json=body | {"return_reasoning": True}).json()
    assert [result["index"] for result in answered["results"]] == [1, 2, 0]
    scores = [result["relevance_score"] for result in answered["results"]]
    assert scores == sorted(scores, reverse=True)
    echoes = [result["document"] for result in answered["results"]]
    assert echoes == [{"image": RED}, {"image_url": {"url": GREEN}}, {"image": BLUE}]
    assert answered["results"][0]["reasoning"].startswith("<b>page 1</b>")
    assert answered["reasoning"].count("\n") == 2
    assert (answered["model"], answered["usage"], answered["defects"]) == (
        "fake",
        {"total_tokens": 7},
        ["no_think"],
    )
    assert answered["has_scores"] is True
    assert answered["id"].startswith("rerank-")


def test_only_what_was_asked_for_comes_back(served):
    answered = served.ask("red?", [GREEN, RED, BLUE], top_n=2, max_tokens_per_doc=4096).json()
    assert [sorted(result) for result in answered["results"]] == [["index", "relevance_score"]] * 2
    assert answered["reasoning"] is None
    assert len(served.ask("red?", [GREEN, RED], top_n=9).json()["results"]) == 2


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_malformed_is_refused_in_words(served, kind):
    response = served.client.request(kind.method, kind.path, content=kind.body, headers=kind.headers)
    assert bench_serve.fault(kind, response) is None
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_body_of_unknown_length_is_cut_off(served):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 200_000_000:
            sent += 1_000_000
            yield b" " * 1_000_000

    with serving(limits={"body_mb": 2}) as small:
        try:
            response = small.client.post(
                "/v1/rerank", content=endless(), headers={"Content-Type": "application/json"}
            )
            assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        except httpx.WriteError:  # closed on us while we still sent
            assert sent < 200_000_000
        assert small.ask("red?", [RED]).status_code == 200


def test_limits_are_those_of_the_config():
    limits = {"pages": 2, "query_chars": 20, "megapixels": 0.02}
    with serving(limits=limits) as small:
        assert error_of(small.ask("red?", [RED, RED, RED]))["message"].startswith("documents: 3 pages, at most 2")
        assert error_of(small.ask("q" * 21, [RED]))["code"] == "query_too_long"
        large = bench_serve.data_url(bench_serve.encoded("PNG", (200, 101)))
        assert error_of(small.ask("red?", [RED, large])) == {
            "message": "documents[1]: is 200 × 101 pixels, more than 0.02 megapixels; send it smaller",
            "type": "invalid_request_error",
            "param": "documents[1]",
            "code": "too_many_pixels",
        }
        assert small.ask("red?", [RED, BLUE]).status_code == 200


def test_pages_of_a_folder(tmp_path):
    folder, outside = tmp_path / "pages", tmp_path / "outside.png"
    (folder / "doc").mkdir(parents=True)
    (folder / "doc/page 1.png").write_bytes(bench_serve.encoded("PNG"))
    (folder / "doc/page-2.png").write_bytes(bench_serve.encoded("PNG", color="blue"))
    outside.write_bytes(bench_serve.encoded("PNG"))
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "doc/page-2.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    (folder / "large.png").write_bytes(bytes(1_500_000))
    Image.effect_noise((800, 800), 60).save(folder / "noisy.png")
    os.mkfifo(folder / "pipe.png")
    with serving(folder=folder, limits={"body_mb": 1}) as here:
        documents = [{"image": "doc/page-2.png"}, "doc/page 1.png", "file:doc/page%201.png", "inside.png"]
        documents += [f"file://{folder}/doc/page-2.png", {"image_url": {"url": "doc/../doc/page-2.png"}}]
        answered = here.ask("red?", documents, return_documents=True)
        assert answered.status_code == 200, answered.text
        assert {result["index"] for result in answered.json()["results"][:2]} == {1, 2}
        assert answered.json()["results"][0]["document"] == {"image": "doc/page 1.png"}
        for path in (
            "../outside.png",
            "link.png",
            "up/outside.png",
            str(outside),
            f"file://{outside}",
            "file:/etc/hosts",
        ):
            error = error_of(here.ask("red?", [RED, {"image": path}]))
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
            response = here.ask("red?", [{"image": path}]) if path.isprintable() else post_ascii(here, path)
            assert response.status_code == 422, path
            assert error_of(response)["code"] == ("invalid_character" if "\ud800" in path else "not_a_picture")
        assert error_of(here.ask("red?", ["large.png"]))["code"] == "picture_too_large"
        assert here.ask("red?", ["noisy.png"]).status_code == 200
        assert error_of(here.ask("red?", ["noisy.png"] * 3))["code"] == "pictures_too_large"
        assert "not fetched" in error_of(here.ask("red?", ["https://example.com/page.png"]))["message"]


def post_ascii(served, path):
    """As `ask`, for text that is no UTF-8."""
    body = json.dumps({"query": "red?", "documents": [path]}).encode("ascii")
    return served.client.post("/v1/rerank", content=body, headers={"Content-Type": "application/json"})


def test_a_key_is_asked_for():
    with serving(key="sk-right") as locked:
        wrong = ("Bearer sk-wrong", "sk-right", "Basic sk-right", "Bearer sk-r\xefght".encode("latin-1"))
        for headers in ({}, *({"Authorization": value} for value in wrong)):
            for path in (*ROUTES, "/pages"):
                response = locked.client.post(path, json={}, headers=headers)
                assert response.status_code == 401
                assert error_of(response)["type"] == "authentication_error"
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert "sk-" not in response.text
            assert locked.client.get("/v1/models", headers=headers).status_code == 401
        right = {"Authorization": "Bearer sk-right"}
        assert locked.client.get("/v1/models", headers=right).json()["data"][0]["id"] == "fake"
        assert (
            locked.client.post("/rerank", json={"query": "?", "documents": [RED]}, headers=right).status_code
            == 200
        )
        assert locked.client.get("/").status_code == locked.client.get("/health").status_code == 200
        assert "sk-" not in locked.client.get("/health").text


def test_requests_that_come_together_are_ranked_together():
    with serving(batch_size=4) as busy:
        busy.ranker.gate.clear()
        first = busy.in_background("first", documents=[RED])
        assert busy.ranker.entered.acquire(timeout=10)
        others = busy.in_background(*(f"other {i}" for i in range(6)), documents=[GREEN, RED])
        until(lambda: busy.server.batcher.waiting == 6, "six wait")
        assert busy.client.get("/health").json()["waiting"] == 6
        busy.ranker.gate.set()
        for asking in (*first, *others):
            assert asking.answer().status_code == 200
        assert [asking.answer().json()["results"][0]["index"] for asking in others] == [1] * 6
        assert [len(call) for call in busy.ranker.calls] == [1, 4, 2]


def test_a_request_waits_for_others_to_join_it():
    with serving(wait_ms=2000, batch_size=2) as patient:
        start = time.monotonic()
        both = patient.in_background("one", "two", documents=[RED])
        assert [asking.answer().status_code for asking in both] == [200, 200]
        assert time.monotonic() - start < 1.5  # full before the time is over
        assert [len(call) for call in patient.ranker.calls] == [2]


def test_what_makes_a_batch_fail_fails_alone(caplog):
    with serving() as busy:
        busy.ranker.gate.clear()
        first = busy.in_background("first", documents=[RED])
        assert busy.ranker.entered.acquire(timeout=10)
        others = busy.in_background("good", "poison", "unfit", documents=[GREEN, RED])
        until(lambda: busy.server.batcher.waiting == 3, "three wait")
        busy.ranker.gate.set()
        good, poison, unfit = (asking.answer() for asking in others)
        assert first[0].answer().status_code == good.status_code == 200
        assert (poison.status_code, error_of(poison)["code"]) == (500, "internal_error")
        assert "secret" not in poison.text
        assert "/srv/secret" in caplog.text
        assert unfit.status_code == 422
        assert error_of(unfit)["message"] == "documents: page 2 is too long for its width"
        assert busy.ask("again", [RED]).status_code == 200


def test_what_is_out_of_time_is_not_ranked():
    with serving(limits={"seconds": 0.5}) as slow:
        slow.ranker.gate.clear()
        late = [*slow.in_background("held", documents=[RED])]
        assert slow.ranker.entered.acquire(timeout=10)
        late += slow.in_background("never ranked", documents=[RED])
        for asking in late:
            response = asking.answer()
            assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
            assert int(response.headers["Retry-After"]) > 0
        assert slow.server.batcher.waiting == 0
        slow.ranker.gate.set()
        assert slow.ask("afterwards", [RED]).status_code == 200
        assert slow.ranker.calls == [["held"], ["afterwards"]]


def test_a_client_that_goes_is_not_waited_for():
    with serving() as busy:
        busy.ranker.gate.clear()
        held = busy.in_background("held", documents=[RED])
        assert busy.ranker.entered.acquire(timeout=10)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{busy.url}/rerank", json={"query": "gone", "documents": [RED]}, timeout=0.5, trust_env=False
            )
        until(lambda: busy.server.batcher.waiting == 0, "the request is forgotten")
        busy.ranker.gate.set()
        assert held[0].answer().status_code == 200
        assert busy.ask("afterwards", [RED]).status_code == 200
        assert busy.ranker.calls == [["held"], ["afterwards"]]


def test_a_full_house_is_said_at_once():
    with serving(limits={"requests": 2}) as full:
        full.ranker.gate.clear()
        asking = full.in_background("one", "two", documents=[RED])
        until(lambda: full.client.get("/health").json()["requests"] == 2, "two are in the house")
        refused = full.ask("three", [RED])
        assert (refused.status_code, error_of(refused)["code"]) == (503, "queue_full")
        assert refused.headers["Retry-After"]
        full.ranker.gate.set()
        assert [one.answer().status_code for one in asking] == [200, 200]
        assert full.ask("three", [RED]).status_code == 200


def test_a_body_that_trickles_is_not_waited_for():
    with serving(limits={"seconds": 0.3}) as quick:
        with socket.create_connection(("127.0.0.1", httpx.URL(quick.url).port), timeout=10) as raw:
            headers = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 99"
            raw.sendall(f"POST /rerank HTTP/1.1\r\n{headers}\r\n\r\n{{".encode())
            assert b"408" in raw.recv(4096).splitlines()[0]
        assert quick.ask("afterwards", [RED]).status_code == 200


def test_until_the_model_is_loaded_the_server_says_so():
    ready = threading.Event()
    ranker = FakeRanker()

    def load():
        assert ready.wait(20)
        return ranker

    with serving(ranker, load=load) as early:
        assert (early.client.get("/health").status_code, early.client.get("/health").json()["status"]) == (
            503,
            "loading",
        )
        refused = early.ask("red?", [RED])
        assert (refused.status_code, error_of(refused)["code"]) == (503, "not_ready")
        assert refused.headers["Retry-After"]
        ready.set()
        until(lambda: early.client.get("/health").status_code == 200, "the model is loaded")
        health = early.client.get("/health").json()
        assert health.items() >= {"status": "ready", "model": "fake", "mode": "reason", "waiting": 0}.items()
        assert early.ask("red?", [RED]).status_code == 200


def test_a_server_that_stops_ends_what_is_ranked_and_refuses_what_waits():
    with serving() as stopping:
        stopping.ranker.gate.clear()
        ranked = stopping.in_background("ranked", documents=[RED])
        assert stopping.ranker.entered.acquire(timeout=10)
        waiting = stopping.in_background("waiting", documents=[RED])
        until(lambda: stopping.server.batcher.waiting == 1, "one waits")
        stopping.server.should_exit = True
        refused = waiting[0].answer()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "not_ready")
        stopping.ranker.gate.set()
        assert ranked[0].answer().status_code == 200
        stopping.thread.join(10)
        assert not stopping.thread.is_alive()
        assert stopping.ranker.calls == [["ranked"]]
