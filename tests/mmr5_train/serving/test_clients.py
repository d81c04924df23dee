"""Unmodified clients of rerank services against the running server; docs/serving.md has the table."""

import os
from pathlib import Path

import cohere
import httpx
import pytest
import voyageai
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from malformed_requests import data_url, encode_image
from rerankers.models.api_rankers import APIRanker

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm would fetch it from the network
import litellm

GREEN, RED = (data_url(encode_image("PNG", color=c)) for c in ("green", "red"))
PAGES = [GREEN, RED]
QUERY = "Which page is red?"
DOCS = Path(__file__).resolve().parents[3] / "docs/serving.md"


def with_litellm(provider, **fields):
    def rank(url):
        response = litellm.rerank(
            model=f"{provider}/fake", query=QUERY, documents=PAGES, api_base=url, api_key="x", **fields
        )
        return [result["index"] for result in response.results]

    return rank


def with_rerankers(provider):
    def rank(url):
        ranker = APIRanker("fake", "x", provider, url=f"{url}/v1/rerank", verbose=0)
        return [result.doc_id for result in ranker.rank(QUERY, PAGES).results]

    return rank


def with_langchain(url):
    compressor = CohereRerank(model="fake", top_n=2, cohere_api_key="x", base_url=url)
    documents = [Document(page, metadata={"index": index}) for index, page in enumerate(PAGES)]
    return [document.metadata["index"] for document in compressor.compress_documents(documents, QUERY)]


def with_vllms_form(url):
    parts = [{"type": "image_url", "image_url": {"url": page}} for page in PAGES]
    body = {"model": "fake", "query": QUERY, "documents": {"content": parts}}
    return [result["index"] for result in httpx.post(f"{url}/rerank", json=body).json()["results"]]


def with_jinas_form(url):
    documents = [{"image": page.partition(",")[2]} for page in PAGES]
    body = {"model": "fake", "query": QUERY, "documents": documents, "top_n": 2, "return_documents": False}
    return [result["index"] for result in httpx.post(f"{url}/v1/rerank", json=body).json()["results"]]


def indices(response):
    return [result.index for result in response.results]


CLIENTS = {
    "cohere, `Client`": lambda url: indices(
        cohere.Client("x", base_url=url).rerank(model="fake", query=QUERY, documents=PAGES, return_documents=True)
    ),
    "cohere, `ClientV2`": lambda url: indices(
        cohere.ClientV2("x", base_url=url).rerank(model="fake", query=QUERY, documents=PAGES, top_n=2)
    ),
    "litellm, `cohere/…`": with_litellm("cohere"),
    "litellm, `jina_ai/…`": with_litellm("jina_ai"),
    "litellm, `hosted_vllm/…`": with_litellm("hosted_vllm"),
    "litellm, `voyage/…`, with `top_n`": with_litellm("voyage", top_n=2),
    "litellm, `infinity/…`, with `return_documents=False`": with_litellm("infinity", return_documents=False),
    "rerankers, `APIRanker` for cohere": with_rerankers("cohere"),
    "rerankers, `APIRanker` for jina": with_rerankers("jina"),
    "rerankers, `APIRanker` for voyage": with_rerankers("voyage"),
    "langchain-cohere, `CohereRerank`": with_langchain,
    "voyageai, `Client`": lambda url: indices(
        voyageai.Client("x", base_url=f"{url}/v1").rerank(QUERY, PAGES, model="fake", top_k=2)
    ),
    "vLLM's documented image form": with_vllms_form,
    "Jina's documented image form": with_jinas_form,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_client_ranks_the_pages(server, client):
    assert CLIENTS[client](server.url) == [1, 0]


def test_errors_reach_the_clients_user(server):
    with pytest.raises(cohere.core.ApiError, match="pages must be images"):
        cohere.ClientV2("x", base_url=server.url).rerank(model="fake", query=QUERY, documents=["a text"])
    with pytest.raises(voyageai.error.MalformedRequestError, match="pages must be images"):
        voyageai.Client("x", base_url=f"{server.url}/v1").rerank(QUERY, ["a text"], model="fake")


def test_the_documented_table_is_this_list():
    table = "\n".join(["| client | |", "|---|---|", *(f"| {client} | works |" for client in CLIENTS)])
    assert table in DOCS.read_text()
