from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_corpora import image_bytes, line, page_row, question, write_lines, write_parquet, write_pdf

from data_construction.corpus.annotations import EvaluationSet, read_evaluation_annotations
from data_construction.corpus.documents import Document
from data_construction.corpus.mmdocir import read_evaluation_documents
from mmr5_train.common.files import InputError
from mmr5_train.ranking.records import Skipped

PARQUET = "MMDocIR_pages.parquet"


def read(folder: Path, pages: str = PARQUET, **more: Any) -> tuple[list[Document], list[Skipped]]:
    settings = {"descriptions": False, "page_cache": folder / "cache", "max_side": 100} | more
    corpus = EvaluationSet(folder=folder, pages=pages, **settings)
    skipped: list[Skipped] = []
    return list(read_evaluation_documents(corpus, read_evaluation_annotations(corpus, skipped), skipped)), skipped


def texts(document: Document) -> list[str]:
    return [page.text for page in document.pages]


# Page parquet.


def test_reads_pages_from_parquet(tmp_path: Path) -> None:
    write_lines(
        tmp_path, line("a.pdf", 2, question("Q?", [1])), line("b.pdf", 3, question("R?", [0]), first_row=2)
    )
    rows = [page_row("a", i, f"a{i}") for i in range(2)] + [page_row("b", i, f"b{i}") for i in range(3)]
    write_parquet(tmp_path / PARQUET, rows)
    (a, b), skipped = read(tmp_path)
    assert not skipped
    assert (a.doc_name, a.n_pages, texts(a)) == ("a.pdf", 2, ["a0", "a1"])
    assert texts(b) == ["b0", "b1", "b2"]
    assert [page.page for page in b.pages] == [0, 1, 2]
    assert {page.description for page in a.pages} == {""}  # vlm_text is not used by default
    assert Path(a.pages[0].image).read_bytes() == rows[0]["image_binary"]
    assert (a.pages[0].width, a.pages[0].height) == (60, 80)
    assert [q.query_id for q in b.questions] == ["b.pdf/0"]


def test_descriptions_are_read_if_configured(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 1, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row("a", 0, vlm_text="a red bar chart")])
    (a,), _ = read(tmp_path, descriptions=True)
    assert a.pages[0].description == "a red bar chart"


def test_documents_are_in_the_order_of_the_annotations(tmp_path: Path) -> None:
    """The order does not depend on the order of rows, rows of other documents, or the size of row groups."""
    write_lines(tmp_path, line("b", 2, question("Q?", [0])), line("a", 2, question("R?", [0])))
    rows = [
        page_row("a", 1, "a1"),
        page_row("x", 0),
        page_row("b", 1, "b1"),
        page_row("a", 0, "a0"),
        page_row("b", 0),
    ]
    for rows_per_group in (1, 2, 10):
        write_parquet(tmp_path / PARQUET, rows, rows_per_group)
        documents, skipped = read(tmp_path)
        assert [document.doc_name for document in documents] == ["b", "a"]
        assert texts(documents[1]) == ["a0", "a1"]
        assert not skipped


def test_unneeded_row_groups_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path, line("b", 2, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row(name, i) for name in "abc" for i in range(2)], rows_per_group=2)
    groups_read: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: Any, **more: Any) -> Any:
        groups_read.extend(more["row_groups"])
        return original(self, *args, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    read(tmp_path)
    assert groups_read == [1]


@pytest.mark.parametrize("ids", [["0", "1", "2"], ["1", "2", "3"], ["p-a", "p-b", "p-c"]])
def test_page_numbers_are_read_from_passage_ids(tmp_path: Path, ids: list[str]) -> None:
    """Ids count from 0 or from 1. If they are not numbers, the row number relative to page_indices is used."""
    write_lines(tmp_path, line("a", 3, question("Q?", [0]), first_row=1))
    rows = [page_row("x", 0)] + [page_row("a", name, text) for name, text in zip(ids, "rst", strict=True)]
    write_parquet(tmp_path / PARQUET, rows)
    (a,), skipped = read(tmp_path)
    assert [(page.page, page.text) for page in a.pages] == [(0, "r"), (1, "s"), (2, "t")]
    assert not skipped


def test_passage_id_takes_precedence_over_row_order(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 2, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row("a", 1, "second"), page_row("a", 0, "first")])
    (a,), _ = read(tmp_path)
    assert texts(a) == ["first", "second"]


def test_corrupt_page_images_are_skipped(tmp_path: Path) -> None:
    write_lines(
        tmp_path, line("a", 3, question("unreadable", [1]), question("readable", [2]), question("half", [1, 2]))
    )
    rows = [page_row("a", 0), page_row("a", 1, image=b"\xff\xd8 broken"), page_row("a", 2)]
    write_parquet(tmp_path / PARQUET, rows)
    for _ in range(2):  # the second time from the cache
        (a,), skipped = read(tmp_path)
        assert [page.page for page in a.pages] == [0, 2]
        assert [q.query_id for q in a.questions] == ["a/1"]
        assert [(s.query_id, s.reason) for s in skipped] == [
            (None, "page can't be shown"),
            ("a/0", "relevant page can't be shown"),
            ("a/2", "relevant page can't be shown"),
        ]
        assert skipped[0].file == str(tmp_path / PARQUET)
        assert "page 1 of a: its bytes are not an image" in skipped[0].detail


def test_missing_repeated_and_extra_rows_are_skipped(tmp_path: Path) -> None:
    write_lines(
        tmp_path,
        line("absent", 2, question("Q?", [0])),
        line("gap", 3, question("Q?", [1]), question("R?", [2])),
        line("twice", 1, question("Q?", [0])),
        line("long", 1, question("Q?", [0])),
    )
    rows = [page_row("gap", 0), page_row("gap", 2), page_row("twice", 0, "first"), page_row("twice", 0, "second")]
    write_parquet(tmp_path / PARQUET, [*rows, page_row("long", 0), page_row("long", 4)])
    documents, skipped = read(tmp_path)
    assert [document.doc_name for document in documents] == ["gap", "twice"]
    assert texts(documents[1]) == ["first"]
    assert [q.query_id for q in documents[0].questions] == ["gap/1"]
    assert [s.detail for s in skipped if s.query_id is None] == [
        "absent: the parquet has no row for it",
        "row 3 repeats row 2: page 0 of twice",
        "long: row 5 is not one of its 1 pages",
        "page 1 of gap: the parquet has no row for it",
    ]
    assert {s.query_id for s in skipped if s.reason == "document can't be read"} == {None, "absent/0", "long/0"}


def test_question_with_page_beyond_the_document_is_skipped(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 2, question("Q?", [0, 2]), question("R?", [1])))
    write_parquet(tmp_path / PARQUET, [page_row("a", i) for i in range(2)])
    (a,), skipped = read(tmp_path)
    assert [q.query_id for q in a.questions] == ["a/1"]
    assert skipped == [
        Skipped(query_id="a/0", reason="page beyond the document", detail="page_id [2] of a document with 2 pages")
    ]


def test_unusable_parquet_raises(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 1, question("Q?", [0])))
    with pytest.raises(InputError, match=r"MMDocIR_pages.parquet: no such file or folder; set corpus.pages="):
        read(tmp_path)
    (tmp_path / PARQUET).write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="not a readable parquet file"):
        read(tmp_path)
    rows = pa.Table.from_pylist([page_row("a", 0)])
    pq.write_table(rows.drop_columns(["ocr_text", "vlm_text"]), tmp_path / PARQUET)
    with pytest.raises(InputError, match="has no column ocr_text; found doc_name, domain, passage_id"):
        read(tmp_path)
    with pytest.raises(InputError, match="has no column ocr_text, vlm_text"):
        read(tmp_path, descriptions=True)
    paths = rows.set_column(rows.schema.get_field_index("image_binary"), "image_binary", [["a.jpg"]])
    pq.write_table(paths, tmp_path / PARQUET)
    with pytest.raises(InputError, match="column image_binary must contain bytes, found string"):
        read(tmp_path)


def test_corrupt_row_group_raises(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 4, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row("a", i) for i in range(4)])
    data = bytearray((tmp_path / PARQUET).read_bytes())
    start = data.index(image_bytes("rgb(0, 200, 1)")[:20])
    data[start - 60 : start - 1] = b"\xff" * 59  # the page header of the first image column chunk
    (tmp_path / PARQUET).write_bytes(data)
    with pytest.raises(InputError, match=r"MMDocIR_pages.parquet: corrupt near row \d+"):
        read(tmp_path)


# PDFs.


def test_reads_pages_from_pdfs(tmp_path: Path) -> None:
    write_lines(
        tmp_path,
        line("a.pdf", 2, question("Q?", [1])),
        line("bare", 1, question("Q?", [0])),
        line("UPPER.PDF", None, question("Q?", [0])),
    )
    write_pdf(tmp_path / "documents/a.pdf", ["alpha", ""])
    write_pdf(tmp_path / "documents/bare.pdf", ["beta"])
    write_pdf(tmp_path / "documents/UPPER.PDF", ["gamma"])
    documents, skipped = read(tmp_path, "documents")
    assert not skipped
    assert [texts(document) for document in documents] == [["alpha", ""], ["beta"], ["gamma"]]
    assert all((page.width, page.height) == (75, 100) for document in documents for page in document.pages)
    files = {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.jpg")}
    assert len(files) == 4
    assert read(tmp_path, "documents") == (documents, [])
    assert {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.jpg")} == files  # not written again


def test_pdfs_are_opened_in_a_process_without_secrets_that_may_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake renderer records its environment, and crashes at its first document only."""
    lines = [line(name, None, question("Q?", [0])) for name in ("bad.pdf", "good.pdf")]
    write_lines(tmp_path, *lines)
    for name in ("bad", "good"):
        write_pdf(tmp_path / f"documents/{name}.pdf", ["alpha"])
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "NEW_PASS"):
        monkeypatch.setenv(name, "hunter2")
    renderer, seen = tmp_path / "renderer", tmp_path / "environment"
    renderer.write_text(
        f"""#!/bin/sh
env >> {seen}
if [ -e {tmp_path}/crashed ]; then exec {sys.executable} "$@"; fi
touch {tmp_path}/crashed
kill -SEGV $$
"""
    )
    renderer.chmod(0o755)
    monkeypatch.setattr("data_construction.corpus.pdf_process.sys.executable", str(renderer))
    documents, skipped = read(tmp_path, "documents")
    assert [document.doc_name for document in documents] == ["good.pdf"]
    assert skipped[0].detail == "its renderer crashed (exit code -11); print it to a new PDF"
    assert "PATH=" in seen.read_text()
    assert "hunter2" not in seen.read_text()


def test_equal_documents_have_equal_hashes(tmp_path: Path) -> None:
    write_lines(tmp_path, *(line(name, None, question("Q?", [0])) for name in ("a", "b", "c")))
    write_pdf(tmp_path / "documents/a.pdf", ["alpha"])
    shutil.copy(tmp_path / "documents/a.pdf", tmp_path / "documents/b.pdf")
    write_pdf(tmp_path / "documents/c.pdf", ["gamma"])
    (a, b, c), _ = read(tmp_path, "documents")
    assert a.sha256 == b.sha256 != c.sha256
    same = image_bytes("red")
    rows = [page_row(name, i, image=same if name != "c" else None) for name in "abc" for i in range(2)]
    write_parquet(tmp_path / PARQUET, rows)
    (a, b, c), _ = read(tmp_path)
    assert a.sha256 == b.sha256 != c.sha256


def test_unusable_pdfs_are_skipped(tmp_path: Path) -> None:
    write_lines(
        tmp_path,
        line("missing.pdf", 2, question("Q?", [0])),
        line("corrupt.pdf", 2, question("Q?", [0]), question("R?", [1])),
        line("empty.pdf", 2, question("Q?", [0])),
        line("edition.pdf", 5, question("Q?", [0])),
        line("../good.pdf", 1, question("Q?", [0])),
        line("good.pdf", 1, question("Q?", [0])),
    )
    write_pdf(tmp_path / "documents/good.pdf", ["alpha"])
    shutil.copy(tmp_path / "documents/good.pdf", tmp_path / "good.pdf")
    write_pdf(tmp_path / "documents/edition.pdf", ["one", "two"])
    (tmp_path / "documents/corrupt.pdf").write_bytes(b"%PDF-1.7 and then nothing")
    (tmp_path / "documents/empty.pdf").write_bytes(b"")
    (document,), skipped = read(tmp_path, "documents")
    assert document.doc_name == "good.pdf"
    files = {Path(s.file or "").name: s.detail for s in skipped if s.query_id is None}
    assert list(files) == ["missing.pdf", "corrupt.pdf", "empty.pdf", "edition.pdf", "good.pdf"]
    assert "no such file" in files["missing.pdf"]
    assert "not a readable PDF" in files["corrupt.pdf"]
    assert "not a readable PDF" in files["empty.pdf"]
    assert "has 2 pages, but page_indices 5" in files["edition.pdf"]
    assert "plain file name" in files["good.pdf"]
    skipped_ids = [s.query_id for s in skipped if s.query_id]
    assert skipped_ids == [
        "missing.pdf/0",
        "corrupt.pdf/0",
        "corrupt.pdf/1",
        "empty.pdf/0",
        "edition.pdf/0",
        "../good.pdf/0",
    ]


def test_reads_the_synthetic_corpus(tmp_path: Path) -> None:
    from data_construction import synthetic

    synthetic.main(synthetic.SyntheticStage(out=tmp_path / "corpus", documents=3, workers=1))
    documents, skipped = read(tmp_path / "corpus", descriptions=True, max_side=1024)
    assert len(documents) == 3
    assert not skipped
    for document in documents:
        assert all(page.text and page.description for page in document.pages)
        assert document.questions
