"""Fixtures for tests that read corpora. sample_corpora.py writes small corpora."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pypdfium2
import pytest
from candidates_runs import write_orchard


@pytest.fixture
def slice_folder() -> Path:
    """The slice of MMDocIR with real PDFs."""
    default = Path(__file__).resolve().parents[3] / "shared" / "mmdocir"
    folder = Path(os.environ.get("MMDOCIR_SLICE", default))
    if not (folder / "MMDocIR_annotations.jsonl").is_file():
        pytest.skip(f"no slice of MMDocIR at {folder}; set MMDOCIR_SLICE to its folder")
    return folder


@pytest.fixture
def no_render(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After it is called, the test fails if a page is rendered or an image is encoded."""

    def forbid() -> None:
        def fail(*_: Any, **__: Any) -> None:
            pytest.fail("a page was rendered again")

        monkeypatch.setattr(pypdfium2.PdfPage, "render", fail)
        monkeypatch.setattr("data_construction.corpus.page_cache._jpeg", fail)

    return forbid


@pytest.fixture
def orchard(tmp_path: Path) -> Path:
    return write_orchard(tmp_path / "orchard")
