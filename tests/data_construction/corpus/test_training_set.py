from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_corpora import image_bytes, train_line, train_page, write_subset

from data_construction.corpus.documents import Document
from data_construction.corpus.training_set import (
    TrainingSet,
    layout_text,
    read_training_annotations,
    read_training_documents,
)
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Skipped


def read(folder: Path, *subsets: str, seed: int = 42, **more: Any) -> tuple[list[Document], list[Skipped]]:
    settings = {"folder": folder, "page_cache": folder / "cache", "subsets": subsets or ("DUDE",)} | more
    corpus = TrainingSet.model_validate(settings)
    skipped: list[Skipped] = []
    return list(
        read_training_documents(corpus, read_training_annotations(corpus, seed, skipped), skipped)
    ), skipped


def pages_of(name: str, n: int) -> list[dict[str, Any]]:
    return [train_page(name, i, f"{name}, page {i}") for i in range(n)]


@pytest.mark.parametrize("struct", [False, True])
def test_reads_pages_and_questions(tmp_path: Path, struct: bool) -> None:
    lines = [train_line("7", "Where?", ("a/b", 1), ("a/b", 2), ("a/b", 1)), train_line("8", "Why?", ("c", 0))]
    write_subset(
        tmp_path, "DUDE", pages_of("a/b", 3) + pages_of("no questions", 2) + pages_of("c", 1), lines, struct
    )
    (a, c), skipped = read(tmp_path)
    assert not skipped
    assert (a.doc_name, a.domain, a.n_pages, c.doc_name) == ("DUDE/a/b", "DUDE", 3, "DUDE/c")
    assert [page.text for page in a.pages] == ["a/b, page 0", "a/b, page 1", "a/b, page 2"]
    assert Path(a.pages[1].image).read_bytes() == train_page("a/b", 1)["image"]
    (question,) = a.questions
    assert (question.query_id, question.domain) == ("DUDE/7", "DUDE")
    assert [str(page) for page in question.positives] == ["DUDE/a/b#1", "DUDE/a/b#2"]


def test_names_of_two_subsets_do_not_collide(tmp_path: Path) -> None:
    for subset in ("DUDE", "SlideVQA"):
        write_subset(tmp_path, subset, pages_of("a", 2), [train_line(0, f"{subset}?", ("a", 0))])
    documents, skipped = read(tmp_path, "DUDE", "SlideVQA")
    assert [document.doc_name for document in documents] == ["DUDE/a", "SlideVQA/a"]
    assert [question.query_id for d in documents for question in d.questions] == ["DUDE/0", "SlideVQA/0"]
    assert not skipped


def test_repeated_lines_and_rows_are_skipped(tmp_path: Path) -> None:
    line = train_line("train_54030", "Where?", ("a", "1"))  # page numbers may be text
    other = train_line("train_54030", "Another question?", ("a", "0"))
    rows = [train_page("a", str(i), f"row {k}") for k, i in enumerate((0, 1, 1))]
    write_subset(tmp_path, "Wiki-ss", rows, [line, line, other])
    (a,), skipped = read(tmp_path, "Wiki-ss")
    assert [page.text for page in a.pages] == ["row 0", "row 1"]
    assert [question.query for question in a.questions] == ["Where?"]
    assert [skip.reason for skip in skipped] == ["duplicate line", "query id already used", "duplicate row"]
    assert "line 3: Wiki-ss/train_54030 is already in line 1, with other content" in skipped[1].detail


def test_unusable_questions_and_pages_are_skipped(tmp_path: Path) -> None:
    lines = [
        train_line(0, "Good?", ("a", 3)),
        train_line(1, "Its page is broken?", ("a", 70)),
        train_line(2, "No such document?", ("absent", 0)),
        train_line(3, "No such page?", ("a", 100)),
        train_line(4, "Two documents?", ("a", 0), ("b", 0)),
        train_line(5, "No page?"),
        train_line(6, "", ("a", 0)),
    ]
    rows = pages_of("a", 100)
    rows[70]["image"] = image_bytes()[:200]  # cut off
    write_subset(tmp_path, "DUDE", rows, lines)
    (a,), skipped = read(tmp_path)
    assert [question.query_id for question in a.questions] == ["DUDE/0"]
    assert len(a.pages) == 99
    assert [(skip.query_id, skip.reason) for skip in skipped] == [
        ("DUDE/4", "relevant pages in several documents"),
        (None, "question can't be understood"),
        (None, "question can't be understood"),
        (None, "document can't be read"),
        ("DUDE/2", "document can't be read"),
        (None, "page can't be shown"),
        ("DUDE/1", "relevant page can't be shown"),
        ("DUDE/3", "page beyond the document"),
    ]
    details = [skip.detail for skip in skipped]
    assert "line 6: field positive_passages" in details[1]
    assert "line 7: field query" in details[2]
    assert "DUDE/absent: the parquet has no row for it" in details[3]
    assert "page 70 of DUDE/a: " in details[5]
    assert "(row 70)" in details[5]


def test_rows_of_documents_may_be_interleaved(tmp_path: Path) -> None:
    """Documents are yielded in the order in which their last rows are read."""
    rows = [train_page("a", 0), train_page("b", 1), train_page("b", 0), train_page("a", 1)]
    write_subset(tmp_path, "DUDE", rows, [train_line(0, "A?", ("a", 0)), train_line(1, "B?", ("b", 0))])
    documents, _ = read(tmp_path)
    assert [document.doc_name for document in documents] == ["DUDE/b", "DUDE/a"]
    assert [[page.page for page in document.pages] for document in documents] == [[0, 1], [0, 1]]


def test_questions_per_subset_are_sampled(tmp_path: Path) -> None:
    lines = [train_line(k, f"Question {k}?", (f"d{k}", 0)) for k in range(30)]
    rows = [train_page(f"d{k}", 0) for k in range(30)]
    for subset in ("DUDE", "Wiki-ss"):
        write_subset(tmp_path, subset, rows, lines)
    samples = []
    for seed in (42, 42, 1):
        documents, skipped = read(tmp_path, "DUDE", "Wiki-ss", seed=seed, questions=10)
        samples.append([question.query_id for document in documents for question in document.questions])
        assert not skipped
    assert samples[0] == samples[1] != samples[2]
    assert [sum(name.startswith(subset) for name in samples[0]) for subset in ("DUDE", "Wiki-ss")] == [10, 10]
    assert len(read(tmp_path, "DUDE", questions=40)[0]) == 30


@pytest.mark.parametrize("column", ["file_name", "page", "image", "layouts"])
def test_missing_parquet_column_raises(tmp_path: Path, column: str) -> None:
    write_subset(tmp_path, "DUDE", pages_of("a", 1), [train_line(0, "Where?", ("a", 0))])
    path = tmp_path / "parquet/DUDE_filter.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(InputError, match=rf"DUDE_filter.parquet: has no column {column}; found .*page_size"):
        read(tmp_path)


def test_image_column_of_wrong_type_raises(tmp_path: Path) -> None:
    write_subset(tmp_path, "DUDE", pages_of("a", 1), [train_line(0, "Where?", ("a", 0))])
    path = tmp_path / "parquet/DUDE_filter.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("image")
    pq.write_table(table.set_column(at, "image", pa.array([{"path": "a.jpg"}])), path)
    with pytest.raises(InputError, match=r"column image must contain bytes, found struct"):
        read(tmp_path)


def test_missing_files_raise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no such folder; .*corpus.folder="):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match=r"DUDE_train.jsonl: no such file"):
        read(tmp_path)
    write_subset(tmp_path, "DUDE", pages_of("a", 1), [train_line(0, "Where?", ("a", 0))])
    (tmp_path / "parquet/DUDE_filter.parquet").unlink()
    with pytest.raises(InputError, match=r"DUDE_filter.parquet: no such file"):
        read(tmp_path)


def test_layout_text_joins_texts_and_ignores_invalid_values() -> None:
    layouts = [{"text": "one", "bbox": [0, 1]}, {"text": None, "ocr_text": "two"}, {"text": " "}]
    assert layout_text(layouts) == layout_text(json.dumps(layouts)) == "one\ntwo"
    for value in (None, [], "not JSON", "__import__('os')", [[0, 0, 1, 1]], 3):
        assert layout_text(value) == ""
