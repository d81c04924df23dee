"""OCR of pages without text, with the models that come with RapidOCR."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from candidates_runs import run_candidates
from PIL import Image, ImageDraw, ImageFont
from sample_corpora import line, question, write_lines

from data_construction.corpus.ocr import Ocr, add_text
from mmr5_train.common.files import read_manifest, read_records
from mmr5_train.ranking.records import Page, RankingTask

TEXTS = ("Annual revenue of pumps", "Water use fell sharply", "Training of staff")


def scan(text: str) -> Image.Image:
    """A page image with the text drawn on it."""
    image = Image.new("RGB", (900, 300), "white")
    ImageDraw.Draw(image).text((40, 100), text, fill="black", font=ImageFont.load_default(60))
    return image


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A PDF that has only images, and questions about it."""
    folder = tmp_path / "scans"
    (folder / "documents").mkdir(parents=True)
    first, *others = (scan(text) for text in TEXTS)
    first.save(folder / "documents/scan.pdf", save_all=True, append_images=others)
    asked = ("Where is the revenue?", "How did water use change?", "Which page is about training?")
    write_lines(folder, line("scan.pdf", 3, *(question(text, [i]) for i, text in enumerate(asked))))
    return folder


def run(folder: Path, name: str, **more: object) -> Path:
    corpus = {
        "format": "mmdocir", "folder": folder, "pages": "documents", "descriptions": False,
        "page_cache": folder / "cache", "max_side": 900,
    }  # fmt: skip
    return run_candidates(folder, name, corpus=corpus, **more)


def recall(out: Path) -> float:
    return float(json.loads((out / "first_stage.json").read_text())["micro"]["recall@1"])


def test_scans_are_found_after_ocr(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(scans, "plain")
    assert recall(plain) == pytest.approx(1 / 3), "pages stay in page order"
    assert "documents without text: 1 (scan.pdf); BM25 can't search them" in capsys.readouterr().err
    assert read_manifest(plain)["counts"]["documents_without_text"] == ["scan.pdf"]
    assert {page.text_source for page in read_records(plain / "pages.jsonl", Page, unique="id")} == {None}

    out = run(scans, "ocr", ocr={"workers": 1})
    pages = read_records(out / "pages.jsonl", Page, unique="id")
    assert [page.text_source for page in pages] == ["ocr"] * 3
    assert "revenue" in pages[0].text
    assert recall(out) == 1
    counts = read_manifest(out)["counts"]
    assert (counts["pages_by_ocr"], counts["pages_without_text"]) == (3, 0)
    assert "without text: 1" not in capsys.readouterr().err
    first, *_ = read_records(out / "heldout.jsonl", RankingTask)
    assert first.candidates[0].page == 0
    texts = sorted((scans / "cache/ocr").glob("*.txt"))
    assert len(texts) == 3

    for path in texts:  # a second run reads the cache
        path.write_text("cached text")
    again = run(scans, "again", ocr={"workers": 1})
    assert {page.text for page in read_records(again / "pages.jsonl", Page, unique="id")} == {"cached text"}


def test_documents_with_text_start_no_engine(orchard: Path) -> None:
    out = run_candidates(orchard, ocr={"language": "no such language"})
    assert {page.text_source for page in read_records(out / "pages.jsonl", Page, unique="id")} == {"corpus"}
    assert list(add_text([], Ocr(), orchard)) == []
