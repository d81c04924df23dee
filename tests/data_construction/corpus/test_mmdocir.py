from __future__ import annotations

import shutil
from collections.abc import Callable
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


def test_pages_come_from_the_parquet(tmp_path: Path) -> None:
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
    assert {page.description for page in a.pages} == {""}  # a model's reading is not a known truth
    assert Path(a.pages[0].image).read_bytes() == rows[0]["image_binary"]
    assert (a.pages[0].width, a.pages[0].height) == (60, 80)
    assert [q.query_id for q in b.questions] == ["b.pdf/0"]


def test_descriptions_are_read_where_they_are_exact(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 1, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row("a", 0, vlm_text="a red bar chart")])
    (a,), _ = read(tmp_path, descriptions=True)
    assert a.pages[0].description == "a red bar chart"


def test_documents_keep_the_order_of_the_annotations(tmp_path: Path) -> None:
    """Rows in any order, rows of documents that nobody asks about, and large row groups make no difference."""
    write_lines(tmp_path, line("b", 2, question("Q?", [0])), line("a", 2, question("R?", [0])))
    rows = [
        page_row("a", 1, "a1"),
        page_row("x", 0),
        page_row("b", 1, "b1"),
        page_row("a", 0, "a0"),
        page_row("b", 0),
    ]
    for rows_a_group in (1, 2, 10):
        write_parquet(tmp_path / PARQUET, rows, rows_a_group)
        documents, skipped = read(tmp_path)
        assert [document.doc_name for document in documents] == ["b", "a"]
        assert texts(documents[1]) == ["a0", "a1"]
        assert not skipped


def test_row_groups_of_other_documents_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path, line("b", 2, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row(name, i) for name in "abc" for i in range(2)], rows_a_group=2)
    groups_read: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spied(self: pq.ParquetFile, *args: Any, **more: Any) -> Any:
        groups_read.extend(more["row_groups"])
        return original(self, *args, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spied)
    read(tmp_path)
    assert groups_read == [1]


@pytest.mark.parametrize("ids", [["0", "1", "2"], ["1", "2", "3"], ["p-a", "p-b", "p-c"]])
def test_page_numbers_from_passage_ids(tmp_path: Path, ids: list[str]) -> None:
    """Counted from 0, from 1, or no numbers: then the distance from the first row of page_indices counts."""
    write_lines(tmp_path, line("a", 3, question("Q?", [0]), first_row=1))
    rows = [page_row("x", 0)] + [page_row("a", name, text) for name, text in zip(ids, "rst", strict=True)]
    write_parquet(tmp_path / PARQUET, rows)
    (a,), skipped = read(tmp_path)
    assert [(page.page, page.text) for page in a.pages] == [(0, "r"), (1, "s"), (2, "t")]
    assert not skipped


def test_passage_id_counts_before_row_order(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 2, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row("a", 1, "second"), page_row("a", 0, "first")])
    (a,), _ = read(tmp_path)
    assert texts(a) == ["first", "second"]


def test_a_corrupt_page_image_is_left_out_and_listed(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 3, question("lost", [1]), question("found", [2]), question("half", [1, 2])))
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
        assert "page 1 of a: its image bytes are no image" in skipped[0].detail


def test_rows_that_lack_repeat_or_do_not_fit(tmp_path: Path) -> None:
    write_lines(
        tmp_path,
        line("gone", 2, question("Q?", [0])),
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
        "gone: no row holds a page of it",
        "row 3 repeats row 2: page 0 of twice",
        "long: row 5 is no page of it: it has 1",
        "page 1 of gap: no row holds it",
    ]
    assert {s.query_id for s in skipped if s.reason == "document can't be read"} == {None, "gone/0", "long/0"}


def test_a_page_beyond_the_document(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 2, question("Q?", [0, 2]), question("R?", [1])))
    write_parquet(tmp_path / PARQUET, [page_row("a", i) for i in range(2)])
    (a,), skipped = read(tmp_path)
    assert [q.query_id for q in a.questions] == ["a/1"]
    assert skipped == [
        Skipped(query_id="a/0", reason="page beyond the document", detail="page_id [2] of a document with 2 pages")
    ]


def test_an_unusable_parquet(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 1, question("Q?", [0])))
    with pytest.raises(InputError, match=r"MMDocIR_pages.parquet: no such file or folder; corpus.pages names"):
        read(tmp_path)
    (tmp_path / PARQUET).write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="not a readable parquet file"):
        read(tmp_path)
    rows = pa.Table.from_pylist([page_row("a", 0)])
    pq.write_table(rows.drop_columns(["ocr_text", "vlm_text"]), tmp_path / PARQUET)
    with pytest.raises(InputError, match="lacks the column ocr_text; found doc_name, domain, passage_id"):
        read(tmp_path)
    with pytest.raises(InputError, match="lacks the column ocr_text, vlm_text"):
        read(tmp_path, descriptions=True)
    paths = rows.set_column(rows.schema.get_field_index("image_binary"), "image_binary", [["a.jpg"]])
    pq.write_table(paths, tmp_path / PARQUET)
    with pytest.raises(InputError, match="column image_binary must hold bytes, found string"):
        read(tmp_path)


def test_a_parquet_broken_in_the_middle(tmp_path: Path) -> None:
    write_lines(tmp_path, line("a", 4, question("Q?", [0])))
    write_parquet(tmp_path / PARQUET, [page_row("a", i) for i in range(4)])
    data = bytearray((tmp_path / PARQUET).read_bytes())
    start = data.index(image_bytes("rgb(0, 200, 1)")[:20])
    data[start - 60 : start - 1] = b"\xff" * 59  # the page header of the first image column chunk
    (tmp_path / PARQUET).write_bytes(data)
    with pytest.raises(InputError, match=r"MMDocIR_pages.parquet: broken near row \d+"):
        read(tmp_path)


# PDFs.


def test_pages_come_from_pdfs(tmp_path: Path, no_render: Callable[[], None]) -> None:
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
    no_render()
    assert read(tmp_path, "documents") == (documents, [])


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


def test_pdfs_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
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
    assert "not a PDF that can be opened" in files["corrupt.pdf"]
    assert "not a PDF that can be opened" in files["empty.pdf"]
    assert "has 2 pages, page_indices tell of 5" in files["edition.pdf"]
    assert "plain file name" in files["good.pdf"]
    lost = [s.query_id for s in skipped if s.query_id]
    assert lost == [
        "missing.pdf/0",
        "corrupt.pdf/0",
        "corrupt.pdf/1",
        "empty.pdf/0",
        "edition.pdf/0",
        "../good.pdf/0",
    ]


def test_the_synthetic_corpus_is_read_by_the_same_reader(tmp_path: Path) -> None:
    from data_construction import synthetic

    synthetic.main(synthetic.SyntheticStage(out=tmp_path / "corpus", documents=3, workers=1))
    documents, skipped = read(tmp_path / "corpus", descriptions=True, max_side=1024)
    assert len(documents) == 3
    assert not skipped
    for document in documents:
        assert all(page.text and page.description for page in document.pages)
        assert document.questions
