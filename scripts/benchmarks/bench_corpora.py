"""Training-set rows through the reader and through the candidates stage: rows a second and peak memory.

    python scripts/benchmarks/bench_corpora.py --rows 5000       # bench_data.py runs it at 10,000 and 100,000

Writes a subset in the format of MMDocIR's training set, made up: documents of 33 pages (its mean is 32.6), each
page with twelve layouts of ten words and a small JPEG of its own, and a question a page. Then measures each of the
following in a process of its own, and prints {"what", "rows", "seconds", "rows_per_s", "peak_mib"}:

- read: every document with its pages, pictures into the page cache;
- candidates: the whole stage with BM25, five candidates a question, on the cache that `read` filled.

A row is a page and its question. Peak memory is that of the process, Python and libraries included. The pictures
are tiny, so times are those of the project's own work: add what copying 49 GB takes.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from data_construction import candidates
from data_construction.corpus.reading import read_annotations, read_corpus
from mmr5_train.common.config import compose_stage

SUBSET = "ArxivQA"
PAGES_A_DOCUMENT = 33
LAYOUTS, WORDS_A_LAYOUT = 12, 10
ROWS_A_GROUP = 1000
LAYOUT = pa.struct([("type", pa.string()), ("bbox", pa.list_(pa.float64())), ("text", pa.string())])
SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("page", pa.int64()),
        ("domain", pa.string()),
        ("image", pa.binary()),
        ("page_size", pa.list_(pa.float64())),
        ("layouts", pa.list_(LAYOUT)),
    ]
)


def write_training_set(folder: Path, rows: int) -> None:
    """A training set with one subset of `rows` pages and as many questions, written a row group at a time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10))) for _ in range(20_000)]
    stream = io.BytesIO()
    Image.effect_noise((48, 64), 40).save(stream, "JPEG")
    picture = stream.getvalue()
    questions = folder / "annotations_top1_negative" / f"{SUBSET}_train.jsonl"
    pages = folder / "parquet" / f"{SUBSET}_filter.parquet"
    for path in (questions, pages):
        path.parent.mkdir(parents=True)
    with questions.open("w") as lines, pq.ParquetWriter(pages, SCHEMA) as table:
        for first in range(0, rows, ROWS_A_GROUP):
            made = [_row(row, rng, words, picture) for row in range(first, min(first + ROWS_A_GROUP, rows))]
            table.write_table(pa.Table.from_pylist(made, schema=SCHEMA))
            for number, row in enumerate(made, first):
                lines.write(json.dumps(_line(number, row, rng)) + "\n")


def _row(row: int, rng: random.Random, words: list[str], picture: bytes) -> dict[str, Any]:
    document, page = divmod(row, PAGES_A_DOCUMENT)
    texts = [" ".join(rng.choices(words, k=WORDS_A_LAYOUT)) for _ in range(LAYOUTS)]
    return {
        "file_name": f"{2300 + document // 10000}.{document % 10000:05d}",
        "page": page,
        "domain": "Academic paper",
        "image": picture + row.to_bytes(8),  # what follows the end of a JPEG is not read: each its own bytes
        "page_size": [612.0, 792.0],
        "layouts": [{"type": "text", "bbox": [50.0, 50.0, 560.0, 90.0], "text": text} for text in texts],
    }


def _line(number: int, row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    words = rng.sample(rng.choice(row["layouts"])["text"].split(), 5)
    passage = {"doc_name": row["file_name"], "page_id": row["page"]}
    negative = {"doc_name": row["file_name"], "page_id": (row["page"] + 1) % PAGES_A_DOCUMENT}
    return {
        "query_id": f"train_{number}",
        "query": f"What does the paper say about {' '.join(words)}?",
        "positive_passages": [passage],
        "negative_passages": [negative],
    }


def measure(what: str, folder: Path, rows: int) -> dict[str, Any]:
    """One figure, in this process."""
    choices = ["corpus=mmdocir_train", f"corpus.subsets=[{SUBSET}]", "corpus.questions=null"]
    choices += [f"corpus.folder={folder}", f"corpus.page_cache={folder}/cache", f"out={folder}/data"]
    config = compose_stage(candidates.CandidatesStage, "candidates", choices)
    start = time.perf_counter()
    if what == "read":
        found = _read_all(config)
    else:
        candidates.main(config)
        found = json.loads((config.out / "manifest.json").read_text())["counts"]["pages"]
    seconds = time.perf_counter() - start
    if found != rows:
        raise RuntimeError(f"{found} of {rows} pages were read")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "what": what,
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds),
        "peak_mib": round(peak),
    }


def _read_all(config: candidates.CandidatesStage) -> int:
    asked = read_annotations(config.corpus, config.seed, [])
    return sum(len(document.pages) for document in read_corpus(config.corpus, asked, []))


def run_all(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Both figures at each size, with a progress bar."""
    with tqdm(total=2 * len(sizes), desc="corpora") as bar:
        for rows in sizes:
            with tempfile.TemporaryDirectory() as name:
                write_training_set(Path(name), rows)
                for what in ("read", "candidates"):
                    command = [sys.executable, __file__, "--one", what, "--folder", name, "--rows", str(rows)]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    bar.update()
                    yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", choices=["read", "candidates"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    found = [measure(args.one, args.folder, args.rows[0])] if args.one else run_all(args.rows)
    for row in found:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
