"""Reads the text of pages that have none, such as scans, with optical character recognition (OCR).

    python -m data_construction.candidates … ocr={}          # pip install '.[ocr]'

The engine is RapidOCR, whose models (PP-OCRv6: Chinese, Japanese, English and 46 other languages in Latin script)
come with its package. Pages are read in processes without keys and tokens. The text is cached by the content of
the page image, so a second run reads no page again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from data_construction.corpus.documents import Document
from mmr5_train.common.environment import drop_secrets
from mmr5_train.common.files import InputError, atomic_write
from mmr5_train.ranking.records import Page

_engine: Any = None  # of a worker process


class Ocr(BaseModel):
    """Section `ocr` of configs/candidates.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    language: str = Field(
        default="ch",
        description="RapidOCR's name of the recognition model; the default reads Chinese, Japanese, English and "
        "other languages in Latin script; others, such as korean or cyrillic, are downloaded",
    )
    min_confidence: float = Field(default=0.5, ge=0, le=1, description="of a line; others are left out")
    workers: int | None = Field(default=None, gt=0, description="processes; null: one per core")


def add_text(documents: Iterable[Document], options: Ocr, cache: Path) -> Iterator[Document]:
    """The documents, with text for the pages without any. `cache` is the folder of the texts.

    Raises `InputError` if RapidOCR is not installed.
    """
    try:
        import rapidocr  # noqa: F401
    except ImportError:
        raise InputError("ocr needs RapidOCR: in the checkout, pip install '.[ocr]'") from None
    return _add_text(documents, options, cache)


def _add_text(documents: Iterable[Document], options: Ocr, cache: Path) -> Iterator[Document]:
    workers = options.workers or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads of the parent
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(options.language,)) as pool:
        for document in documents:
            scans = [page for page in document.pages if not page.text.strip()]
            if not scans:
                yield document
                continue
            tasks = [(page.image, options.min_confidence, cache, _settings(options)) for page in scans]
            read = tqdm(
                pool.map(_read_page, tasks), total=len(scans), desc=f"OCR {document.doc_name}", unit="page"
            )
            try:
                texts = dict(zip((page.page for page in scans), read, strict=True))
            except BrokenProcessPool:
                raise InputError(
                    f"ocr: a process of the engine ended while it read {document.doc_name}; check ocr.language, "
                    "and that there is memory for ocr.workers processes"
                ) from None
            pages = tuple(_with_text(page, texts.get(page.page, "")) for page in document.pages)
            yield dataclasses.replace(document, pages=pages)


def _with_text(page: Page, text: str) -> Page:
    return page.model_copy(update={"text": text, "text_source": "ocr"}) if text else page


def _settings(options: Ocr) -> str:
    """What a cached text depends on, besides the image."""
    import rapidocr

    return json.dumps([getattr(rapidocr, "__version__", ""), options.language, options.min_confidence])


def _start(language: str) -> None:
    """Prepares a worker process: no secrets, one thread, the engine loaded."""
    global _engine
    drop_secrets()
    from rapidocr import RapidOCR

    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    _engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Rec.lang_type": language,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def _read_page(task: tuple[str, float, Path, str]) -> str:
    """The text of a page image, one line per line of the page, from the cache or by OCR."""
    image, min_confidence, cache, settings = task
    data = Path(image).read_bytes()
    digest = hashlib.sha256(settings.encode() + data).hexdigest()
    path = cache / f"{digest[:32]}.txt"
    if path.exists():
        return path.read_text(encoding="utf-8")
    result = _engine(data)
    lines = zip(result.txts or (), result.scores or (), strict=True)
    text = "\n".join(line for line, confidence in lines if confidence >= min_confidence)
    with atomic_write(path, sync=False) as stream:
        stream.write(text)
    return text
