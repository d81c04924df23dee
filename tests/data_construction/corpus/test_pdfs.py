"""PDFs are rendered by several processes, and documents come in the order of the annotations."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sample_corpora import write_pdf

from data_construction.corpus.documents import Annotation
from data_construction.corpus.page_cache import PageCache
from data_construction.corpus.pdfs import Renderers, read_pdf_documents
from mmr5_train.ranking.records import Skipped


@pytest.fixture
def annotations(tmp_path: Path) -> list[Annotation]:
    """Nine PDFs; the first ones are the longest."""
    sizes = range(9, 0, -1)
    for size in sizes:
        write_pdf(tmp_path / f"doc{size}.pdf", [f"document {size}, page {i}" for i in range(size)])
    return [Annotation(f"doc{size}.pdf", "d", ()) for size in sizes]


@pytest.mark.parametrize("workers", [1, 3])
def test_documents_keep_their_order(tmp_path: Path, annotations: list[Annotation], workers: int) -> None:
    (tmp_path / "doc5.pdf").write_text("broken")
    outside = Annotation("../doc4.pdf", "d", ())
    skipped: list[Skipped] = []
    cache = PageCache(tmp_path / f"cache-{workers}", 50, None)
    documents = list(read_pdf_documents(tmp_path, cache, [*annotations, outside], skipped, workers))
    assert [document.n_pages for document in documents] == [9, 8, 7, 6, 4, 3, 2, 1]
    for document in documents:
        assert [page.text for page in document.pages] == [
            f"document {document.n_pages}, page {i}" for i in range(document.n_pages)
        ]
    assert [Path(skip.file or "").name for skip in skipped] == ["doc5.pdf", "doc4.pdf"]
    assert "plain file name" in skipped[1].detail


def test_few_documents_are_rendered_ahead(tmp_path: Path, annotations: list[Annotation]) -> None:
    taken = itertools.count()
    requests = (
        (annotation, tmp_path, None) for annotation in itertools.chain(annotations * 3) if next(taken) >= 0
    )
    renderers = Renderers(2)
    results = renderers.render_all(requests)
    next(results)
    assert next(taken) <= 2 * 2 + 2
    assert len(list(results)) == 26
    renderers.close()


def test_an_unfinished_reader_ends_its_processes(
    tmp_path: Path, annotations: list[Annotation], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    def start(*args: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(popen(*args, **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    cache = PageCache(tmp_path / "cache", 50, None)
    documents = read_pdf_documents(tmp_path, cache, annotations, [], workers=2)
    next(documents)
    documents.close()  # type: ignore[attr-defined]
    assert started
    assert all(process.poll() is not None for process in started)
