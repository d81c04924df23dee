"""The first stage: recall within a document and over a collection, OCR of scans, BM25 over a million pages.

    python scripts/benchmarks/bench_retrieval.py --slice FOLDER    # make bench-corpora: outputs/bench/corpora.json
    python scripts/benchmarks/bench_retrieval.py --parts million --pages 100000

- *scopes*: BM25 on real documents and questions in MMDocIR's format (FOLDER, by default the environment variable
  MMDOCIR_SLICE), with candidates from the question's document and from all documents.
- *ocr*: the same with text from OCR for pages without any: recall on the questions about documents without a text
  layer, before and after, and pages per second.
- *million*: an index of synthetic page texts of 120 words: seconds, size on disk, peak memory of the process, and
  the time of a query.

Each part runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench_common import (
    OUTPUT,
    Row,
    argument_parser,
    at_least,
    at_most,
    machine,
    print_targets,
    run_for_json,
    write_results,
)

KS = (1, 3, 5, 10, 20)
WITHIN_DOCUMENT = {
    "recall@1": 0.2825,
    "recall@3": 0.4684,
    "recall@5": 0.5669,
    "recall@10": 0.6813,
    "recall@20": 0.9218,
}
"""BM25 on the slice by MMDocIR's own metric code, micro averages."""
WORDS_PER_PAGE, VOCABULARY, QUERIES = 120, 20_000, 200
MAX_QUERY_SECONDS = 0.25


def run_candidates(folder: Path, out: Path, *overrides: str) -> Path:
    """All questions of the slice as held-out questions, with 20 candidates each."""
    from data_construction import candidates
    from mmr5_train.common.config import compose_stage

    fixed = [
        "corpus=mmdocir_pdf", f"corpus.folder={folder}", f"corpus.page_cache={out.parent}/pages",
        "corpus.max_side=1024", "split={train:0,select:0,heldout:1}", "candidates=20", f"out={out}",
        "overwrite=true",
    ]  # fmt: skip
    candidates.main(compose_stage(candidates.CandidatesStage, "candidates", [*fixed, *overrides]))
    return out


def scopes(folder: Path, out: Path, pages: int) -> Row:
    run_candidates(folder, out / "corpus", "retriever.scope=corpus")
    results = json.loads((out / "corpus/first_stage.json").read_text())
    return {
        "questions": results["questions"],
        "corpus": results["micro"],
        "document": results["within_document"]["micro"],
    }


def ocr(folder: Path, out: Path, pages: int) -> Row:
    plain = run_candidates(folder, out / "plain")
    start = time.perf_counter()
    read = run_candidates(folder, out / "ocr", "ocr={}")
    seconds = time.perf_counter() - start
    counts = json.loads((read / "manifest.json").read_text())["counts"]
    documents = set(json.loads((plain / "manifest.json").read_text())["counts"]["documents_without_text"])
    return {
        "documents": len(documents),
        "pages": counts["pages_by_ocr"],
        "seconds": seconds,
        "pages_per_s": counts["pages_by_ocr"] / seconds,
        "before": document_recall(plain, documents),
        "after": document_recall(read, documents),
    }


def document_recall(data: Path, documents: set[str]) -> dict[str, float]:
    """Mean recall of the candidates over the questions about these documents."""
    from mmr5_train.common.files import read_records
    from mmr5_train.ranking.metrics import recall_at_k
    from mmr5_train.ranking.records import RankingTask

    tasks = [t for t in read_records(data / "heldout.jsonl", RankingTask) if t.positives[0].doc_name in documents]
    recalls = {
        f"recall@{k}": [recall_at_k([c.id for c in t.candidates], t.positives, k) for t in tasks] for k in KS
    }
    return {"questions": len(tasks), **{name: fmean(values) for name, values in recalls.items()}}


def million(folder: Path, out: Path, pages: int) -> Row:
    from data_construction.first_stage.corpus_scope import CorpusIndex, best

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10))) for _ in range(VOCABULARY)]
    texts = [" ".join(rng.choices(words, k=WORDS_PER_PAGE)) for _ in range(pages)]
    golds = rng.sample(range(pages), min(QUERIES, pages))
    queries = [" ".join(rng.sample(texts[gold].split(), 5)) for gold in golds]
    memory_before = peak_mib()
    start = time.perf_counter()
    index = CorpusIndex(texts, out)
    build = time.perf_counter() - start
    del texts
    times, found = [], 0
    scores = index.scores(queries)
    for gold in golds:
        start = time.perf_counter()
        found += best(next(scores), 20)[0] == gold
        times.append(time.perf_counter() - start)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "pages": pages,
        "build_seconds": build,
        "disk_mib": size / 2**20,
        "texts_mib": memory_before,
        "peak_mib": peak_mib(),
        "query_ms": 1000 * median(times[1:]),
        "gold_first": found / len(golds),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


PARTS = {"scopes": scopes, "ocr": ocr, "million": million}


def targets(result: dict[str, Any]) -> list[Row]:
    rows = []
    if "scopes" in result:
        within = result["scopes"]["document"]
        rows += [
            at_least(f"BM25 within the document, {name}", round(within[name], 4), value)
            for name, value in WITHIN_DOCUMENT.items()
        ]
    if "ocr" in result:
        before, after = result["ocr"]["before"], result["ocr"]["after"]
        gain = after["recall@1"] - before["recall@1"]
        rows.append(at_least("recall@1 on documents without text, gain by OCR", gain, 0.05))
    if "million" in result:
        name = f"seconds of a query over {result['million']['pages']:,} pages"
        rows.append(at_most(name, result["million"]["query_ms"] / 1000, MAX_QUERY_SECONDS))
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    default = os.environ.get("MMDOCIR_SLICE")
    parser.add_argument("--slice", type=Path, default=Path(default) if default else None)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--pages", type=int, default=1_000_000, help="of the part million")
    parser.add_argument("--only", choices=list(PARTS), help="run one part in this process and print its row")
    parser.add_argument("--out", type=Path, default=OUTPUT / "corpora.json")
    args = parser.parse_args()
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PARTS[args.only](args.slice, Path(folder), args.pages)))
        return
    if args.slice is None and set(args.parts) != {"million"}:
        parser.error("give --slice FOLDER, or set MMDOCIR_SLICE")
    result: dict[str, Any] = {"machine": machine()}
    for part in args.parts:
        command = [sys.executable, __file__, "--only", part, "--pages", str(args.pages)]
        result[part] = run_for_json([*command, *(["--slice", str(args.slice)] if args.slice else [])], part)
        print(json.dumps({part: result[part]}, indent=2), flush=True)
    write_results(args.out, result, targets(result))
    print_targets(targets(result))


if __name__ == "__main__":
    main()
