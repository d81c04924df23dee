from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_construction.corpus.documents import Document
from data_construction.first_stage.retriever import Retriever, open_retriever
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Page, PageId, Question, Skipped


def make_question(query_id: str, query: str = "Q?", doc_name: str = "a.pdf") -> Question:
    positives = (PageId(doc_name=doc_name, page=0),)
    return Question(query_id=query_id, query=query, doc_name=doc_name, domain="d", positives=positives)


def rank_with_scores(
    path: Path, *questions: Question, skipped: list[Skipped] | None = None
) -> list[list[tuple[int, float]]]:
    """Ranks a document with four pages by a score file. Its third page could not be rendered."""
    rank = open_retriever(Retriever(name="scores", file=path), questions, [] if skipped is None else skipped)
    pages = tuple(
        Page(doc_name="a.pdf", page=i, domain="d", image=f"{i}.jpg", width=1, height=1) for i in (0, 1, 3)
    )
    document = Document("a.pdf", "d", 4, "hash", pages, questions)
    return [[(page.page, score) for page, score in ranked] for ranked in rank(document)]


def write_scores(path: Path, *rows: tuple[str, str, int, float]) -> Path:
    names = ("query_id", "doc_name", "page", "score")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_scores_are_read_from_json_lines(tmp_path: Path) -> None:
    path = write_scores(
        tmp_path / "s.jsonl",
        ("q", "a.pdf", 3, 0.5),
        ("q", "a", 1, 2.5),
        ("q", "a.pdf", 0, 0.5),
        ("q", "a.pdf", 2, 9),
    )
    assert rank_with_scores(path, make_question("q")) == [[(1, 2.5), (0, 0.5), (3, 0.5)]]  # page 2 is unreadable


def test_scores_are_read_from_a_trec_run(tmp_path: Path) -> None:
    path = tmp_path / "colqwen.trec"
    path.write_text("a.pdf/0 Q0 a.pdf#3 2 11.5 colqwen\n\na.pdf/0 Q0 a.pdf#0 1 12.25 colqwen\n")
    assert rank_with_scores(path, make_question("a.pdf/0")) == [[(0, 12.25), (3, 11.5)]]


def test_trec_run_with_escaped_spaces_is_read(tmp_path: Path) -> None:
    path = tmp_path / "colqwen.run"
    path.write_text("my%20q Q0 a.p%64f#3 1 11.5 colqwen\n")
    assert rank_with_scores(path, make_question("my q")) == [[(3, 11.5)]]


def test_scores_of_unknown_questions_are_recorded(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.jsonl", ("q", "a.pdf", 1, 1), ("other", "z.pdf", 700, 1))
    skipped: list[Skipped] = []
    assert rank_with_scores(path, make_question("q"), skipped=skipped) == [[(1, 1.0)]]
    assert [(s.reason, s.detail) for s in skipped] == [
        ("scores of questions not in the corpus", "1 questions, the first is other")
    ]


def test_question_without_scores_raises(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.jsonl", ("q", "a.pdf", 1, 1))
    with pytest.raises(
        InputError, match=r"s.jsonl: has no scores for 1 of 2 questions, the first is 'r'; docs/data_formats.md"
    ):
        rank_with_scores(path, make_question("q"), make_question("r"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("q", "a.pdf", 4, 1.0), r"scores page 4 for q, but a.pdf has 4 pages"),
        (("q", "b.pdf", 0, 1.0), r"line 2: scores a page of 'b.pdf' for q, a question on 'a.pdf'"),
        (("q", "a.pdf", 1, 2.0), r"line 2: a second score of page a.pdf#1 for q"),
        (("q", "a.pdf", -1, 1.0), r"line 2: field page: .*greater than or equal to 0"),
        (("q", "a.pdf", 0, float("nan")), r"line 2: field score: .*finite"),
    ],
)
def test_invalid_scores_raise(tmp_path: Path, row: tuple[str, str, int, float], message: str) -> None:
    path = write_scores(tmp_path / "s.jsonl", ("q", "a.pdf", 1, 1), row)
    with pytest.raises(InputError, match=message):
        rank_with_scores(path, make_question("q"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 a.pdf#1 1 2.0", "line 1: expected `qid Q0 docid rank score tag`, found 5 fields"),
        ("my doc/0 Q0 a.pdf#1 1 2.0 run", "names with spaces need JSON Lines"),
        ("q Q0 a.pdf 1 2.0 run", "line 1: docid must be <doc_name>#<page>, found 'a.pdf'"),
        ("q Q0 a.pdf#1 1 high run", "line 1: field score"),
    ],
)
def test_invalid_trec_lines_raise(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "s.run").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        rank_with_scores(tmp_path / "s.run", make_question("q"))


def test_missing_files_and_unknown_suffixes_raise(tmp_path: Path) -> None:
    for name in ("s.jsonl", "s.trec"):
        with pytest.raises(InputError, match="no such file"):
            rank_with_scores(tmp_path / name, make_question("q"))
    with pytest.raises(
        InputError, match=r"s.csv: the name must end in .jsonl .* in .trec, .run, .txt .* or in .json"
    ):
        rank_with_scores(tmp_path / "s.csv", make_question("q"))


def test_retriever_file_is_required_for_scores_and_rejected_otherwise() -> None:
    with pytest.raises(ValidationError, match=r"needs retriever.file="):
        Retriever(name="scores")
    with pytest.raises(ValidationError, match=r"retriever\.file is only for retriever=scores"):
        Retriever(name="bm25", file=Path("s.jsonl"))
