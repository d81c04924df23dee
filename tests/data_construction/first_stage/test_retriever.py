from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_construction.corpus.documents import Document
from data_construction.first_stage.retriever import Retriever, open_retriever, rank_by_bm25
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Page, PageId, Question, Skipped


def asked(query_id: str, query: str = "Q?", doc_name: str = "a.pdf") -> Question:
    positives = (PageId(doc_name=doc_name, page=0),)
    return Question(query_id=query_id, query=query, doc_name=doc_name, domain="d", positives=positives)


def document(texts: list[str], *queries: str, shown: set[int] | None = None) -> Document:
    """A document whose pages have these texts; `shown` names the pages that could be rendered."""
    pages = tuple(
        Page(doc_name="a.pdf", page=i, domain="d", image=f"{i}.jpg", width=1, height=1, text=text)
        for i, text in enumerate(texts)
        if shown is None or i in shown
    )
    questions = tuple(asked(f"a.pdf/{k}", query) for k, query in enumerate(queries))
    return Document("a.pdf", "d", len(texts), "hash", pages, questions)


def bm25_order(texts: list[str], query: str) -> list[int]:
    (ranked,) = rank_by_bm25(document(texts, query))
    return [page.page for page, _ in ranked]


def test_bm25_finds_the_words() -> None:
    texts = ["solar capacity rose", "water use fell", "solar capacity and solar panels", "nothing else"]
    assert bm25_order(texts, "Where are the solar panels?")[:2] == [2, 0]
    (ranked,) = rank_by_bm25(document(texts, "solar panels"))
    scores = [score for _, score in ranked]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[1] > 0 == scores[2]


def test_each_question_has_its_own_order() -> None:
    first, second = rank_by_bm25(document(["apples", "pears"], "apples", "pears"))
    assert [page.page for page, _ in first] == [0, 1]
    assert [page.page for page, _ in second] == [1, 0]


def test_pages_without_text_come_last_in_page_order() -> None:
    assert bm25_order(["", "other words", " \n", "solar", "more words"], "solar") == [3, 1, 4, 0, 2]


def test_a_scanned_document_stays_in_page_order() -> None:
    assert bm25_order(["", " ", "", "\n"], "solar") == [0, 1, 2, 3]
    assert bm25_order(["a", "the of", "! ?"], "solar") == [0, 1, 2]  # text, but not one word to search


@pytest.mark.parametrize("query", ["the of and", "?!", "words unknown here"])
def test_a_question_that_finds_nothing_keeps_page_order(query: str) -> None:
    assert bm25_order(["one page", "", "another page"], query) == [0, 2, 1]


def test_a_document_without_pages_or_questions() -> None:
    assert rank_by_bm25(document([], "solar")) == [[]]
    assert rank_by_bm25(document(["solar"])) == []


@given(
    st.lists(st.text(alphabet="ab c", max_size=12), min_size=1, max_size=8), st.text(alphabet="ab c", max_size=8)
)
def test_every_page_is_ranked_once(texts: list[str], query: str) -> None:
    assert sorted(bm25_order(texts, query or "q")) == list(range(len(texts)))


# Score files.


def scored(
    path: Path, *questions: Question, skipped: list[Skipped] | None = None
) -> list[list[tuple[int, float]]]:
    """What a score file makes of a document with four pages, the third of which could not be rendered."""
    rank = open_retriever(Retriever(name="scores", file=path), questions, [] if skipped is None else skipped)
    made = document(["", "", "", ""], *[""] * 0, shown={0, 1, 3})
    with_questions = Document(made.doc_name, made.domain, made.n_pages, made.sha256, made.pages, questions)
    return [[(page.page, score) for page, score in ranked] for ranked in rank(with_questions)]


def write_scores(path: Path, *rows: tuple[str, str, int, float]) -> Path:
    names = ("query_id", "doc_name", "page", "score")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_scores_from_json_lines(tmp_path: Path) -> None:
    path = write_scores(
        tmp_path / "s.jsonl",
        ("q", "a.pdf", 3, 0.5),
        ("q", "a", 1, 2.5),
        ("q", "a.pdf", 0, 0.5),
        ("q", "a.pdf", 2, 9),
    )
    assert scored(path, asked("q")) == [[(1, 2.5), (0, 0.5), (3, 0.5)]]  # page 2 can't be shown


def test_scores_from_a_trec_run(tmp_path: Path) -> None:
    path = tmp_path / "colqwen.trec"
    path.write_text("a.pdf/0 Q0 a.pdf#3 2 11.5 colqwen\n\na.pdf/0 Q0 a.pdf#0 1 12.25 colqwen\n")
    assert scored(path, asked("a.pdf/0")) == [[(0, 12.25), (3, 11.5)]]


def test_a_trec_run_names_documents_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "colqwen.run"
    path.write_text("my%20q Q0 a.p%64f#3 1 11.5 colqwen\n")
    assert scored(path, asked("my q")) == [[(3, 11.5)]]


def test_scores_of_questions_that_are_not_asked_are_noted(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.jsonl", ("q", "a.pdf", 1, 1), ("other", "z.pdf", 700, 1))
    skipped: list[Skipped] = []
    assert scored(path, asked("q"), skipped=skipped) == [[(1, 1.0)]]
    assert [(s.reason, s.detail) for s in skipped] == [
        ("scores of questions not in the corpus", "1 questions, the first is other")
    ]


def test_a_score_file_that_lacks_a_question(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.jsonl", ("q", "a.pdf", 1, 1))
    with pytest.raises(
        InputError, match=r"s.jsonl: lacks scores for 1 of 2 questions, the first is 'r'; query ids"
    ):
        scored(path, asked("q"), asked("r"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("q", "a.pdf", 4, 1.0), r"scores page 4 for q, but a.pdf has 4 pages"),
        (("q", "b.pdf", 0, 1.0), r"line 2: scores a page of 'b.pdf' for q, which asks about 'a.pdf'"),
        (("q", "a.pdf", 1, 2.0), r"line 2: a second score of page a.pdf#1 for q"),
        (("q", "a.pdf", -1, 1.0), r"line 2: field page: .*greater than or equal to 0"),
        (("q", "a.pdf", 0, float("nan")), r"line 2: field score: .*finite"),
    ],
)
def test_wrong_scores_are_named(tmp_path: Path, row: tuple[str, str, int, float], message: str) -> None:
    path = write_scores(tmp_path / "s.jsonl", ("q", "a.pdf", 1, 1), row)
    with pytest.raises(InputError, match=message):
        scored(path, asked("q"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 a.pdf#1 1 2.0", "line 1: expected `qid Q0 docid rank score tag`, found 5 fields"),
        ("my doc/0 Q0 a.pdf#1 1 2.0 run", "names with spaces need JSON Lines"),
        ("q Q0 a.pdf 1 2.0 run", "line 1: docid must be <doc_name>#<page>, found 'a.pdf'"),
        ("q Q0 a.pdf#1 1 high run", "line 1: field score"),
    ],
)
def test_wrong_trec_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "s.run").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        scored(tmp_path / "s.run", asked("q"))


def test_files_that_are_absent_or_of_another_kind(tmp_path: Path) -> None:
    for name in ("s.jsonl", "s.trec"):
        with pytest.raises(InputError, match="no such file"):
            scored(tmp_path / name, asked("q"))
    with pytest.raises(
        InputError, match=r"s.csv: the name must end in .jsonl .* in .trec, .run, .txt .* or in .json"
    ):
        scored(tmp_path / "s.csv", asked("q"))


def test_the_retriever_and_its_file_must_fit() -> None:
    with pytest.raises(ValidationError, match=r"needs a file: retriever.file="):
        Retriever(name="scores")
    with pytest.raises(ValidationError, match="a file needs retriever=scores"):
        Retriever(name="bm25", file=Path("s.jsonl"))
