from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sample_corpora import write_pdf

from data_construction.corpus.pdf_folder import PdfFolder, read_page_numbers, read_pdf_folder_annotations
from data_construction.corpus.reading import read_annotations, read_corpus
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Question, Skipped


def read_questions(folder: Path, name: str, text: str | bytes) -> tuple[list[Question], list[Skipped]]:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    skipped: list[Skipped] = []
    corpus = PdfFolder(folder=folder, questions=path, page_cache=folder / "cache")
    return [
        q for annotation in read_pdf_folder_annotations(corpus, skipped) for q in annotation.questions
    ], skipped


def pages(question: Question) -> list[int]:
    return [page.page for page in question.positives]


def test_page_numbers_are_converted_to_zero_based(tmp_path: Path) -> None:
    text = 'question,document,pages\nHow many days?,handbook.pdf,5\n"Which sites, and why?",report,"12, 1; 3 3"\n'
    (first, second), skipped = read_questions(tmp_path, "q.csv", text)
    assert (first.query_id, first.query, first.domain) == ("handbook.pdf/2", "How many days?", "documents")
    assert pages(first) == [4]
    assert (second.doc_name, second.query, pages(second)) == ("report.pdf", "Which sites, and why?", [11, 0, 2])
    assert not skipped


def test_questions_are_read_from_json_lines(tmp_path: Path) -> None:
    rows = [
        {"question": "A?", "document": "a.pdf", "pages": [5, 6], "domain": "Law"},
        {"question": "B?", "document": "a.pdf", "pages": 1},
        {"question": "C?", "document": "b.pdf", "pages": "2"},
    ]
    questions, _ = read_questions(tmp_path, "q.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert [(q.query_id, pages(q), q.domain) for q in questions] == [
        ("a.pdf/1", [4, 5], "Law"),
        ("a.pdf/2", [0], "Law"),  # a document has one domain
        ("b.pdf/3", [1], "documents"),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_variants_of_spreadsheets_are_read(tmp_path: Path, separator: str) -> None:
    """A byte order mark, other separators, Windows line ends, other columns in any order, empty cells."""
    header = separator.join(["pages", "note", " document ", "question", "domain"])
    row = separator.join(["3", "mine", "a.pdf", "Ärger?", ""])
    (question,), skipped = read_questions(tmp_path, "q.csv", f"\ufeff{header}\r\n{row}\r\n")
    assert (question.query, pages(question), question.domain) == ("Ärger?", [2], "documents")
    assert not skipped


def test_wrong_csv_header_raises(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"q.csv: the first line must name the columns question, document, pages .*found Q, file"
    ):
        read_questions(tmp_path, "q.csv", "Q,file\nWhere?,a.pdf\n")
    with pytest.raises(InputError, match="found nothing"):
        read_questions(tmp_path, "q.csv", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Where?,a.pdf,0", "line 3: field pages: .*pages count from 1 here, found 0"),
        ("Where?,a.pdf,four", "line 3: field pages: .*expected page numbers such as 5, .* found 'four'"),
        ("Where?,a.pdf,5-3", "line 3: field pages: .*found '5-3'"),
        ("Where?,a.pdf,3-99999", "line 3: field pages: .*found '3-99999'"),
        ("Where?,a.pdf,3.5", "line 3: field pages: .*found '3.5'"),
        ("Where?,a.pdf,-3", "line 3: field pages: .*found '-3'"),
        ("Where?,a.pdf,", "line 3: field pages: .*at least 1"),
        (",a.pdf,4", "line 3: field question: "),
        ("Where?,a.pdf,12, 13", "line 3: .*more fields than the header"),
        ("Where?", "line 3: field document: "),
    ],
)
def test_invalid_rows_are_skipped(tmp_path: Path, row: str, message: str) -> None:
    questions, (skip,) = read_questions(tmp_path, "q.csv", f"question,document,pages\nGood?,a.pdf,1\n{row}\n")
    assert [question.query for question in questions] == ["Good?"]
    assert skip.reason == "question can't be understood"
    assert skip.file == str(tmp_path / "q.csv")
    assert re.search(message, skip.detail)


def test_unreadable_files_raise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"q.xlsx: the name of a questions file must end in .csv or .jsonl"):
        read_questions(tmp_path, "q.xlsx", "")
    with pytest.raises(InputError, match=r"q.csv: not UTF-8 text .*save it as UTF-8"):
        read_questions(tmp_path, "q.csv", "question,document,pages\nÄrger?,a.pdf,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"contains no valid question; first: line 2: "):
        read_questions(tmp_path, "q.csv", "question,document,pages\nWhere?,a.pdf,x\n")
    corpus = PdfFolder(folder=tmp_path, questions=tmp_path / "absent.csv", page_cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"absent.csv: no such file; set corpus.questions="):
        read_pdf_folder_annotations(corpus, [])
    with pytest.raises(InputError, match=r"nowhere: no such folder; .*corpus.folder="):
        read_pdf_folder_annotations(corpus.model_copy(update={"folder": tmp_path / "nowhere"}), [])


def test_missing_documents_and_pages_are_skipped(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["figs", "dates"])
    text = "question,document,pages\nGood?,a,2\nBeyond?,a.pdf,7\nAbsent?,b.pdf,1\n"
    (tmp_path / "q.csv").write_text(text)
    corpus = PdfFolder(folder=tmp_path, questions=tmp_path / "q.csv", page_cache=tmp_path / "cache", max_side=64)
    skipped: list[Skipped] = []
    (a,) = read_corpus(corpus, read_annotations(corpus, 42, skipped), skipped)
    assert [question.query for question in a.questions] == ["Good?"]
    assert [page.text for page in a.pages] == ["figs", "dates"]
    assert [(skip.query_id, skip.reason, skip.detail) for skip in skipped] == [
        ("a.pdf/3", "page beyond the document", "page [7] of a document with 2 pages, counted from 1"),
        (None, "document can't be read", "no such file; copy the PDF there"),
        ("b.pdf/4", "document can't be read", str(tmp_path / "b.pdf")),
    ]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []), ("  ", []), ("5", [5]), ("12, 1; 3 3", [12, 1, 3, 3]), ("3-5", [3, 4, 5]), ("3 – 5", [3, 4, 5]),
        ("3 to 5, 9", [3, 4, 5, 9]), ("p. 3", [3]), ("pp. 3-4", [3, 4]), ("Page 7", [7]),
        ("pages 3 and 4", [3, 4]), ("[3, 4]", [3, 4]), ("(3)", [3]), ("3 & 4", [3, 4]),
        ("p3", None), ("3..5", None), ("[3, 4", None),
        ("three", None), ("1e3", None), ("p.", None),
    ],
)  # fmt: skip
def test_page_numbers_as_people_write_them(text: str, numbers: list[int] | None) -> None:
    if numbers is not None:
        assert read_page_numbers(text) == numbers
        return
    with pytest.raises(ValueError, match=re.escape(f"found {text!r}")):
        read_page_numbers(text)


def test_a_repeated_question_is_said_and_its_pages_are_added(tmp_path: Path) -> None:
    text = "question,document,pages\nWhich?,a.pdf,1\nOther?,a.pdf,2\nWhich?,a,3\nWhich?,b.pdf,1\n"
    questions, (repeated,) = read_questions(tmp_path, "q.csv", text)
    assert [(question.query_id, pages(question)) for question in questions] == [
        ("a.pdf/2", [0, 2]), ("a.pdf/3", [1]), ("b.pdf/5", [0]),
    ]  # fmt: skip
    assert repeated.reason == "question repeated"
    assert repeated.detail == "line 4 repeats the question of line 2, which gets its pages [3]"
