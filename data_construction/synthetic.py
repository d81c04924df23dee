"""Writes a synthetic corpus in MMDocIR's evaluation format.

    python -m data_construction.synthetic out=outputs/corpus documents=40

Writes `MMDocIR_annotations.jsonl` and `MMDocIR_pages.parquet`, as published with MMDocIR: `vlm_text` holds the
description of a page, `ocr_text` the words on it. corpus/synthetic_documents.py describes the documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from data_construction.corpus.synthetic_documents import MAX_SECTION, SyntheticDocument, make_document, page_rows
from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import atomic_write, open_output, write_manifest


class SyntheticStage(StageConfig):
    """`python -m data_construction.synthetic` (configs/synthetic.yaml)."""

    documents: int = Field(gt=0, description="number of documents; about nine catalogue questions each")
    users: bool = Field(
        default=False,
        description="also write users' questions: for each catalogue question one of type users, in a wording for "
        "training, and one of type users_unseen, in a wording for evaluation only",
    )
    section_pages: int | None = Field(
        default=None,
        ge=4,
        le=MAX_SECTION,
        description="pages of each of the two sections; null: 4 to 6",
    )
    workers: int = Field(default=2, gt=0, description="processes that draw pages")


def _draw_documents(documents: list[SyntheticDocument], workers: int) -> Iterator[list[dict[str, Any]]]:
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(page_rows, documents, chunksize=4)


def main(config: SyntheticStage) -> None:
    out = open_output(config.out, config.overwrite)
    documents = [
        make_document(index, config.seed, users=config.users, section_pages=config.section_pages)
        for index in range(config.documents)
    ]
    first_row = 0
    with atomic_write(out / "MMDocIR_annotations.jsonl") as annotations:
        for document in documents:
            line = {
                "doc_name": f"{document.doc_name}.pdf",
                "domain": document.domain,
                "page_indices": [first_row, first_row + len(document.pages) - 1],
                "layout_indices": [0, 0],
                "questions": document.questions,
            }
            annotations.write(json.dumps(line) + "\n")
            first_row += len(document.pages)
    columns = ("doc_name", "domain", "passage_id", "image_path", "ocr_text", "vlm_text")
    schema = pa.schema([(name, pa.string()) for name in columns] + [("image_binary", pa.binary())])
    tables = tqdm(_draw_documents(documents, config.workers), total=len(documents), desc="draw", unit="doc")
    with atomic_write(out / "MMDocIR_pages.parquet", "wb") as stream, pq.ParquetWriter(stream, schema) as writer:
        for rows in tables:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    counts = {
        "documents": len(documents),
        "pages": first_row,
        "questions": sum(len(document.questions) for document in documents),
    }
    write_manifest(out, stage="synthetic", config=config.model_dump(mode="json"), counts=counts)
    print("corpus: {documents} documents, {pages} pages, {questions} questions".format(**counts), f"in {out}")


if __name__ == "__main__":
    run_stage(main, SyntheticStage, "synthetic")
