"""The reranker inside LangChain, LlamaIndex, Haystack and code for sentence-transformers' CrossEncoder."""

import base64
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from haystack import Document as HaystackDocument
from haystack import Pipeline
from haystack.dataclasses import ByteStream
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode

from mmr5_train import Reranker
from mmr5_train.common.files import InputError
from mmr5_train.integrations.cross_encoder import ListwiseCrossEncoder
from mmr5_train.integrations.haystack import PageRanker
from mmr5_train.integrations.langchain import RerankerCompressor
from mmr5_train.integrations.llama_index import RerankerPostprocessor
from mmr5_train.integrations.page_of import page_of

QUERY = "Which page is green?"


@pytest.fixture(scope="module")
def reranker():
    return Reranker("tiny", mode="logits")


@pytest.fixture(scope="module")
def paths(page_folder):
    return [str(page_folder / f"page-{i}.png") for i in range(3)]


@pytest.fixture(scope="module")
def ranked(reranker, paths):
    return reranker.rank(QUERY, paths)


@pytest.fixture(scope="module")
def pdf(tmp_path_factory):
    document, path = pypdfium2.PdfDocument.new(), tmp_path_factory.mktemp("pdf") / "report.pdf"
    for width in (60, 70, 80):
        document.new_page(width, 80)
    document.save(path)
    return str(path)


def encoded(path):
    return base64.b64encode(Path(path).read_bytes()).decode()


def test_langchain_compresses_documents_to_the_best(reranker, paths, ranked):
    documents = [
        LangChainDocument("red", metadata={"image": paths[0]}),
        LangChainDocument(f"data:image/png;base64,{encoded(paths[1])}", metadata={"id": 1}),
        LangChainDocument("blue", metadata={"source": paths[2]}),
    ]
    best = RerankerCompressor(reranker=reranker, top_n=2).compress_documents(documents, QUERY)
    contents = [document.page_content for document in documents]
    assert [contents.index(document.page_content) for document in best] == ranked.order[:2]
    assert [document.metadata["relevance_score"] for document in best] == [r.score for r in ranked.top_k(2)]
    assert "relevance_score" not in documents[0].metadata, "the caller's documents do not change"
    assert RerankerCompressor(reranker=reranker).compress_documents([], QUERY) == []


def test_llama_index_returns_the_best_nodes_with_scores(reranker, paths, ranked):
    nodes = [
        NodeWithScore(node=ImageNode(image=encoded(paths[0])), score=0.1),
        NodeWithScore(node=ImageNode(image_path=paths[1]), score=0.2),
        NodeWithScore(node=TextNode(text="blue", metadata={"file_path": paths[2]}), score=0.3),
    ]
    best = RerankerPostprocessor(reranker=reranker, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
    assert [node.node.node_id for node in best] == [nodes[i].node.node_id for i in ranked.order[:2]]
    assert [node.score for node in best] == [result.score for result in ranked.top_k(2)]
    assert [node.score for node in nodes] == [0.1, 0.2, 0.3]
    with pytest.raises(InputError, match="give the query"):
        RerankerPostprocessor(reranker=reranker).postprocess_nodes(nodes)


def test_haystack_ranks_documents_in_a_pipeline(reranker, paths, ranked):
    documents = [
        HaystackDocument(blob=ByteStream(Path(paths[0]).read_bytes(), mime_type="image/png")),
        HaystackDocument(content="green", meta={"image_path": paths[1]}),
        HaystackDocument(content="blue", meta={"file_path": paths[2]}),
    ]
    pipeline = Pipeline()
    pipeline.add_component("ranker", PageRanker(reranker))
    best = pipeline.run({"ranker": {"query": QUERY, "documents": documents}})["ranker"]["documents"]
    assert [document.id for document in best] == [documents[i].id for i in ranked.order]
    assert [document.score for document in best] == [result.score for result in ranked]
    assert len(PageRanker(reranker, top_k=2).run(QUERY, documents)["documents"]) == 2
    assert len(PageRanker(reranker, top_k=2).run(QUERY, documents, top_k=1)["documents"]) == 1


def test_cross_encoder_scores_pairs_and_ranks(reranker, paths, ranked):
    model = ListwiseCrossEncoder(reranker)
    by_index = {result.index: result.score for result in ranked}
    pairs = [(QUERY, paths[2]), ("Which is red?", paths[0]), (QUERY, paths[0]), (QUERY, paths[1])]
    scores = model.predict(pairs, batch_size=7, show_progress_bar=False)
    assert scores.dtype == np.float32
    # The pages of a query are ranked in the order of its pairs.
    other_order = reranker.rank(QUERY, [paths[2], paths[0], paths[1]])
    expected = [other_order.get_score_by_docid(i) for i in range(3)]
    assert scores[[0, 2, 3]] == pytest.approx(expected)
    assert scores[1] == 1
    assert model.predict((QUERY, paths[0])) == 1
    hits = model.rank(QUERY, paths, top_k=2, return_documents=True)
    assert [hit["corpus_id"] for hit in hits] == ranked.order[:2]
    assert [hit["score"] for hit in hits] == [by_index[i] for i in ranked.order[:2]]
    assert [hit["document"] for hit in hits] == [paths[i] for i in ranked.order[:2]]
    assert set(model.rank(QUERY, paths)[0]) == {"corpus_id", "score"}


def test_pages_of_a_pdf_are_found_by_each_frameworks_numbers(reranker, pdf):
    langchain = [LangChainDocument("", metadata={"source": pdf, "page": i, "page_label": "iv"}) for i in range(3)]
    llama = [NodeWithScore(node=TextNode(metadata={"file_path": pdf, "page_label": str(i)})) for i in (1, 2, 3)]
    haystack = [HaystackDocument(content="", meta={"file_path": pdf, "page_number": i}) for i in (1, 2, 3)]
    expected = reranker.rank(QUERY, pdf).order
    compressed = RerankerCompressor(reranker=reranker).compress_documents(langchain, QUERY)
    assert [document.metadata["page"] for document in compressed] == expected
    nodes = RerankerPostprocessor(reranker=reranker).postprocess_nodes(llama, query_str=QUERY)
    assert [int(node.metadata["page_label"]) - 1 for node in nodes] == expected
    documents = PageRanker(reranker).run(QUERY, haystack)["documents"]
    assert [document.meta["page_number"] - 1 for document in documents] == expected


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "document 4: no page image; expected one of image_path"),
        ({"source": "a.pdf"}, "document 4: no page number of a.pdf in its metadata; expected page_number"),
        ({"source": "a.pdf", "page_label": "iv"}, "page_label of a.pdf: expected a page number, found 'iv'"),
        ({"image": "data:image/png;base64,***"}, "document 4: its image is not valid base64"),
    ],
)
def test_documents_without_a_page_are_named(metadata, message):
    with pytest.raises(InputError, match=message):
        page_of(metadata, first_page=1, name="document 4")
