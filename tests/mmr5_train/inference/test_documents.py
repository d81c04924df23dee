"""What callers pass as pages, and what results return for it, also with the `rerankers` library's documents."""

import base64
import io
from pathlib import Path

import pypdfium2
import pytest
import rerankers

from mmr5_train import Document, Reranker
from mmr5_train.common.files import InputError
from mmr5_train.inference.documents import to_documents
from mmr5_train.ranking.notes import format_note
from mmr5_train.ranking.results import build_results


@pytest.fixture(scope="module")
def reranker():
    return Reranker("tiny", mode="logits")


@pytest.fixture(scope="module")
def paths(page_folder):
    return [str(page_folder / f"page-{i}.png") for i in range(3)]


@pytest.fixture(scope="module")
def pdf(tmp_path_factory):
    document, path = pypdfium2.PdfDocument.new(), tmp_path_factory.mktemp("pdf") / "report.pdf"
    for _ in range(2):
        document.new_page(60, 80)
    document.save(path)
    return path


def test_ids_and_metadata_come_back_with_their_pages(reranker, paths):
    metadata = [{"year": year} for year in (2001, 2002, 2003)]
    ranked = reranker.rank("Which is green?", docs=paths, doc_ids=["a", "b", "c"], metadata=metadata)
    assert sorted(result.doc_id for result in ranked) == ["a", "b", "c"]
    for result in ranked:
        index = "abc".index(result.doc_id)
        assert (result.index, result.page, result.metadata) == (index, paths[index], metadata[index])
        assert ranked.get_score_by_docid(result.doc_id) == result.score
        assert result.document.image_path == paths[index]


def test_documents_of_this_project_and_of_rerankers_rank_alike(reranker, paths):
    plain = reranker.rank("Which is green?", paths)
    encoded = [base64.b64encode(Path(path).read_bytes()).decode() for path in paths]
    inputs = {
        "ours": [Document(path, f"id-{i}", f"text {i}", {"i": i}) for i, path in enumerate(paths)],
        "paths": [
            rerankers.Document(f"text {i}", f"id-{i}", {"i": i}, "image", image_path=path)
            for i, path in enumerate(paths)
        ],
        "base64": [
            rerankers.Document(f"text {i}", f"id-{i}", {"i": i}, "image", base64=text)
            for i, text in enumerate(encoded)
        ],
        "data URIs": [
            rerankers.Document(f"text {i}", f"id-{i}", {"i": i}, "image", base64=f"data:image/png;base64,{text}")
            for i, text in enumerate(encoded)
        ],
    }
    for name, documents in inputs.items():
        ranked = reranker.rank("Which is green?", documents)
        assert ranked.order == plain.order, name
        assert [(r.doc_id, r.text, r.metadata) for r in ranked] == [
            (f"id-{i}", f"text {i}", {"i": i}) for i in plain.order
        ], name
    assert [result.document.doc_id for result in plain] == [result.doc_id for result in plain] == plain.order
    [only] = reranker.rank("Which is green?", inputs["ours"][0])
    assert only.doc_id == "id-0"


def test_each_page_of_a_pdf_has_its_own_id(reranker, paths, pdf):
    ranked = reranker.rank("Which?", [paths[0], pdf], doc_ids=["picture", "report"])
    assert sorted(ranked.order) == [0, 1, 2]
    by_index = {result.index: result for result in ranked}
    assert [by_index[i].doc_id for i in range(3)] == ["picture", "report#page=1", "report#page=2"]
    assert [by_index[i].page for i in range(3)] == [paths[0], f"{pdf}#page=1", f"{pdf}#page=2"]
    assert str(by_index[2].document) == f"{pdf}#page=2"
    assert [result.doc_id for result in reranker.rank("Which?", f"{pdf}#page=2", doc_ids=["second"])] == ["second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pages: give the pages"),
        ({"pages": ["a.png"], "docs": ["a.png"]}, "pages: give the pages"),
        ({"pages": ["a.png", "b.png"], "doc_ids": ["a"]}, "doc_ids: expected one for each of 2 pages, found 1"),
        ({"pages": ["a.png"], "metadata": []}, "metadata: expected one for each of 1 pages, found 0"),
        ({"pages": [Document(doc_id="a")]}, "page 1: the document has no page"),
        ({"pages": ["a.png"], "top_k": ["a"]}, r"top_k: expected a number of pages from 1, found \['a'\]"),
    ],
)
def test_what_is_wrong_is_said(reranker, arguments, message):
    with pytest.raises(InputError, match=message):
        reranker.rank("Which?", **arguments)


def test_documents_without_a_picture_are_refused():
    with pytest.raises(InputError, match="page 2: the document has text only"):
        to_documents(["a.png", rerankers.Document("only text", 1)])
    with pytest.raises(InputError, match="page 1: base64 can't be decoded"):
        to_documents(rerankers.Document("text", 1, document_type="image", base64="***"))


def test_open_files_and_generators_are_documents_too(paths):
    stream = io.BytesIO(b"x")
    assert [document.page for document in to_documents(iter([paths[0], stream]))] == [paths[0], stream]


def test_a_verdict_scores_one_page(paths, pdf, monkeypatch):
    reasoning, notes = Reranker("tiny", max_new_tokens=60), iter([format_note("a pie chart", True), "a pie chart"])
    generated = reasoning.rank("Which?", paths[0])
    assert generated[0].score == 1
    monkeypatch.setattr(
        reasoning,
        "rank",
        lambda query, pages: build_results(query, [Document(pages[0])], [0], notes={0: next(notes)}),
    )
    assert reasoning.score("Which?", paths[0]) == 1.0
    with pytest.raises(InputError, match="score: the reasoning states no verdict"):
        reasoning.score("Which?", paths[0])
    monkeypatch.undo()
    with pytest.raises(InputError, match="score: expected one page, found 2"):
        reasoning.score("Which?", pdf)
    with pytest.raises(InputError, match="score: a single page has no score in mode direct"):
        Reranker("tiny", mode="direct").score("Which?", paths[0])
