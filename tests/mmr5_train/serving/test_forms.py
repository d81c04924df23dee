"""Requests and responses in the forms of other rerank services."""

import json
from pathlib import Path

import pytest
from malformed_requests import data_url, encode_image
from rerank_server import FakeRanker, run_server

from mmr5_train.models.pages import PageLimits, visual_tokens

RED, GREEN = (data_url(encode_image("PNG", color=c)) for c in ("red", "green"))
JPEG = data_url(encode_image("JPEG", color="red"))
CASES = Path(__file__).resolve().parents[4] / "shared/cases/rerank_requests.jsonl"


def post(server, body, path="/v1/rerank"):
    return server.client.post(path, json={"model": "fake", "query": "red?", **body})


@pytest.mark.parametrize(
    "documents",
    [
        [GREEN, RED],
        [{"image": GREEN.partition(",")[2]}, {"image": RED.partition(",")[2]}],  # Jina: base64
        [GREEN.partition(",")[2], JPEG.partition(",")[2]],
        [{"image_url": GREEN}, {"image_url": {"url": RED}}],
        [{"text": GREEN}, {"text": RED}],  # Cohere's and LiteLLM's clients send texts
        [{"content": [{"type": "image_url", "image_url": {"url": url}}]} for url in (GREEN, RED)],  # vLLM
        {"content": [{"type": "image_url", "image_url": {"url": url}} for url in (GREEN, RED)]},  # vLLM
    ],
)
def test_every_form_of_a_page_is_read(server, documents):
    response = post(server, {"documents": documents})
    assert response.status_code == 200, response.text
    assert [result["index"] for result in response.json()["results"]] == [1, 0]


def test_returned_documents_have_a_text(server):
    response = post(server, {"documents": [GREEN, {"text": RED}, {"image": JPEG}], "return_documents": True})
    documents = {result["index"]: result["document"] for result in response.json()["results"]}
    assert documents[0] == {"image": GREEN, "text": ""}
    assert documents[1] == {"text": RED}
    assert documents[2] == {"image": JPEG, "text": ""}
    assert "document" not in post(server, {"documents": [GREEN], "return_documents": None}).json()["results"][0]


def test_voyage_finds_its_list(server):
    response = post(server, {"documents": [GREEN, RED], "top_k": 1, "truncation": True}).json()
    assert response["data"] == response["results"]
    assert (response["object"], len(response["data"])) == ("list", 1)
    assert "data" not in post(server, {"documents": [GREEN]}).json()


def test_known_fields_without_a_meaning_are_ignored_with_a_warning(server):
    response = post(server, {"documents": [GREEN], "max_tokens_per_doc": 512, "rank_fields": ["text"]}).json()
    assert [warning.partition(":")[0] for warning in response["warnings"]] == ["max_tokens_per_doc", "rank_fields"]
    assert post(server, {"documents": [GREEN]}).json()["warnings"] == []
    misspelled = post(server, {"documents": [GREEN], "topn": 1})
    assert (misspelled.status_code, misspelled.json()["error"]["param"]) == (422, "topn")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            ["file: the yearly report", GREEN],
            "documents[0]: 'file: the yearly report' is a text; pages must be images",
        ),
        (["a page about water"], "documents[0]: 'a page about water' is a text"),
        ([{"text": "a page about water"}], "documents[0]: contains text; pages must be images"),
        ([{"content": "a text"}], "documents[0].content: expected a list of parts, found 'a text'"),
        (
            [{"content": [{"type": "text", "text": "a"}]}],
            "documents[0].content: expected one image and nothing else",
        ),
        ([{"content": [{"image_url": GREEN}, {"image_url": RED}]}], "found 2 of 2 parts"),
        (["iVBORw0KGgo" + "A" * 61], "documents[0]: is not an image in a supported format"),
        ({"content": []}, "documents: List should have at least 1 item"),
    ],
)
def test_what_is_not_a_page_is_refused(server, documents, message):
    response = post(server, {"documents": documents})
    assert response.status_code == 422
    assert message in response.json()["detail"]


def test_shared_cases(server):
    """Requests as clients send them, with what is expected of each."""
    if not CASES.is_file():
        pytest.skip(f"no {CASES}")
    for line in CASES.read_text().splitlines():
        text = line.replace("DATA_URL", RED).replace("BASE64", RED.partition(",")[2])
        case = json.loads(text.replace('"model": "m"', '"model": "fake"'))
        response = server.client.post(case["path"], json=case["body"])
        wanted = case["expect"]
        allowed = {200, 422} if "or a 422" in wanted else {int(wanted[:3])}
        assert response.status_code in allowed, (case["client"], response.text)
        if response.status_code == 200 and "one result" in wanted:
            assert len(response.json()["results"]) == 1, case["client"]
        if "`text`" in wanted:
            assert all("text" in result["document"] for result in response.json()["results"]), case["client"]
        if "names `documents`" in wanted and response.status_code == 422:
            assert "documents" in response.json()["error"]["message"], case["client"]


def test_requests_are_limited_by_visual_tokens():
    ranker = FakeRanker()
    ranker.page_limits = PageLimits(28, 784, 1_003_520)
    page = data_url(encode_image("PNG", (560, 840), color="red"))
    tokens = visual_tokens(560, 840, ranker.page_limits)
    assert tokens == 600
    with run_server(ranker, wait_ms=0, limits={"visual_tokens": 2 * tokens}) as server:
        assert post(server, {"documents": [page, page]}).status_code == 200
        rejected = post(server, {"documents": [page, page, page]})
    assert (rejected.status_code, rejected.json()["error"]["code"]) == (422, "too_many_visual_tokens")
    assert "the first 3 pages have 1,800 visual tokens, more than the 1,200" in rejected.json()["detail"]
