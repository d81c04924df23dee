"""Runs of the candidates stage with small settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sample_corpora import line, question, write_lines, write_pdf

from data_construction.candidates import CandidatesStage, main
from mmr5_train.common.config import validate

ALL_HELDOUT = {"train": 0, "select": 0, "heldout": 1}
ALL_TRAIN = {"train": 1, "select": 0, "heldout": 0}
WORDS = ("apples", "pears", "plums", "grapes", "figs", "dates", "limes")


def run_candidates(folder: Path, name: str = "data", pages: str = "documents", **more: Any) -> Path:
    corpus = {
        "format": "mmdocir",
        "folder": folder,
        "pages": pages,
        "descriptions": False,
        "page_cache": folder / "cache",
        "max_side": 64,
    }
    settings = {"retriever": {"name": "bm25"}, "candidates": 3, "split": ALL_HELDOUT, "corpus": corpus} | more
    out = folder / name
    main(validate(CandidatesStage, {"out": out, **settings}))
    return out


def write_orchard(folder: Path) -> Path:
    """Two PDFs: one of seven pages, each about its own fruit; one of two pages."""
    write_lines(
        folder,
        line("fruit.pdf", 7, *(question(f"Where are the {word}?", [i]) for i, word in enumerate(WORDS))),
        line("small.pdf", 2, question("Where are the pears?", [0, 1]), question("Where are the nuts?", [1])),
    )
    write_pdf(folder / "documents/fruit.pdf", [f"A page about {word}" for word in WORDS])
    write_pdf(folder / "documents/small.pdf", ["pears", "walnuts"])
    return folder
