"""Reads a large training set and builds candidates from it: rows per second and peak memory.

    python scripts/benchmarks/bench_corpora.py --rows 5000       # bench_data.py runs 10,000 and 100,000 rows

Generates a subset in the format of MMDocIR's training set. Each document has 33 pages (the mean of the real set is
32.6). Each page has twelve layouts of ten words, a small JPEG that differs from all others, and one question. Then
it measures each of these in a separate process, and prints {"what", "rows", "seconds", "rows_per_s", "peak_mib"}:

- read: reads every document with its pages, and writes the images into the page cache;
- candidates: runs the complete stage with BM25 and five candidates per question, with the page cache that `read`
  wrote.

A row is a page and its question. Peak memory is that of the process, including Python and its libraries. The
images are tiny, so the times measure the project's own work; copying the 49 GB of real images takes additional
time.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bench_common import argument_parser, run_for_json
from mmdocir_standin import ROWS_PER_GROUP, TRAINING_SCHEMA
from PIL import Image
from tqdm import tqdm

from data_construction import candidates
from data_construction.corpus.reading import read_annotations, read_corpus
from mmr5_train.common.config import compose_stage

SUBSET = "ArxivQA"
PAGES_PER_DOCUMENT = 33
LAYOUTS, WORDS_PER_LAYOUT = 12, 10


def write_training_set(folder: Path, rows: int) -> None:
    """Writes a training set with one subset of `rows` pages and as many questions, one row group at a time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10))) for _ in range(20_000)]
    stream = io.BytesIO()
    Image.effect_noise((48, 64), 40).save(stream, "JPEG")
    image = stream.getvalue()
    questions = folder / "annotations_top1_negative" / f"{SUBSET}_train.jsonl"
    pages = folder / "parquet" / f"{SUBSET}_filter.parquet"
    for path in (questions, pages):
        path.parent.mkdir(parents=True)
    with questions.open("w") as lines, pq.ParquetWriter(pages, TRAINING_SCHEMA) as table:
        for first in range(0, rows, ROWS_PER_GROUP):
            group = [_page_row(row, rng, words, image) for row in range(first, min(first + ROWS_PER_GROUP, rows))]
            table.write_table(pa.Table.from_pylist(group, schema=TRAINING_SCHEMA))
            for number, row in enumerate(group, first):
                lines.write(json.dumps(_question(number, row, rng)) + "\n")


def _page_row(row: int, rng: random.Random, words: list[str], image: bytes) -> dict[str, Any]:
    document, page = divmod(row, PAGES_PER_DOCUMENT)
    texts = [" ".join(rng.choices(words, k=WORDS_PER_LAYOUT)) for _ in range(LAYOUTS)]
    return {
        "file_name": f"{2300 + document // 10000}.{document % 10000:05d}",
        "page": page,
        "domain": "Academic paper",
        "image": image + row.to_bytes(8),  # decoders ignore bytes after a JPEG's end, which make each file unique
        "page_size": [612.0, 792.0],
        "layouts": [{"type": "text", "bbox": [50.0, 50.0, 560.0, 90.0], "text": text} for text in texts],
    }


def _question(number: int, row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    words = rng.sample(rng.choice(row["layouts"])["text"].split(), 5)
    passage = {"doc_name": row["file_name"], "page_id": row["page"]}
    negative = {"doc_name": row["file_name"], "page_id": (row["page"] + 1) % PAGES_PER_DOCUMENT}
    return {
        "query_id": f"train_{number}",
        "query": f"What does the paper say about {' '.join(words)}?",
        "positive_passages": [passage],
        "negative_passages": [negative],
    }


def measure(what: str, folder: Path, rows: int) -> dict[str, Any]:
    """Measures `read` or `candidates` in this process."""
    overrides = ["corpus=mmdocir_train", f"corpus.subsets=[{SUBSET}]", "corpus.questions=null"]
    overrides += [f"corpus.folder={folder}", f"corpus.page_cache={folder}/cache", f"out={folder}/data"]
    config = compose_stage(candidates.CandidatesStage, "candidates", overrides)
    start = time.perf_counter()
    if what == "read":
        pages = _read_all(config)
    else:
        candidates.main(config)
        pages = json.loads((config.out / "manifest.json").read_text())["counts"]["pages"]
    seconds = time.perf_counter() - start
    if pages != rows:
        raise RuntimeError(f"expected {rows} pages, read {pages}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "what": what,
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds),
        "peak_mib": round(peak),
    }


def _read_all(config: candidates.CandidatesStage) -> int:
    """Reads every document. Returns the number of pages."""
    annotations = read_annotations(config.corpus, config.seed, [])
    return sum(len(document.pages) for document in read_corpus(config.corpus, annotations, []))


def run_all(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Both measurements at each size, with a progress bar."""
    with tqdm(total=2 * len(sizes), desc="corpora") as bar:
        for rows in sizes:
            with tempfile.TemporaryDirectory() as name:
                write_training_set(Path(name), rows)
                for what in ("read", "candidates"):
                    command = [sys.executable, __file__, "--one", what, "--folder", name, "--rows", str(rows)]
                    row = run_for_json(command, f"bench_corpora: {what} with {rows} rows")
                    bar.update()
                    yield row


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="sizes to measure")
    parser.add_argument("--one", choices=["read", "candidates"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    results = [measure(args.one, args.folder, args.rows[0])] if args.one else run_all(args.rows)
    for row in results:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
