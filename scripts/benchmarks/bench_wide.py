"""Many pages in one pass: part of bench_rerank.py, which runs it on a distilled model and on the stand-in.

    python scripts/benchmarks/bench_wide.py --checkpoint outputs/demo/distill/model  # only this part
    python scripts/benchmarks/bench_wide.py                                          # the shipped model

Measured on a checkpoint, medians of three runs that take turns:

- 20 different pages: `logits` in one pass, in windows of nine pages (with Qwen's tokenizer, the ids of so many
  begin with different tokens), and the plain loop of bench_rerank.py.
- 50 different pages in one pass: seconds, and the growth of the process's peak memory.
- The scores of 20 pages, compared to a separate pass for each page id in float64.
- Ten questions on one document of 20 pages: `rank_many`, which opens and reads each page once, and ten calls
  without the page cache.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import OUTPUT, Row, argument_parser, at_least, at_most, print_targets, write_results

from data_construction.corpus.drawing import draw_page
from data_construction.corpus.synthetic_documents import make_document
from mmr5_train import Reranker
from mmr5_train.models.inputs import encode
from mmr5_train.models.page_scores import id_branches
from mmr5_train.models.pages import load_page

QUERY = "Which page shows a red bar chart about water use in {}?"
REPEATS = 3
WIDE, WIDEST = 20, 50  # pages
QUESTIONS = 10  # on one document
TOKENS_PER_PAGE = 24  # of the reasoning of the shipped model


def write_pages(folder: Path, count: int) -> list[Path]:
    """Page images of synthetic documents, all different."""
    contents = (page for index in range(count) for page in make_document(index, 0).pages)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        draw_page(next(contents)).save(path)
    return paths


def in_turns(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Way → the median of its seconds, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(REPEATS + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def plain(reranker: Reranker, paths: list[Path]) -> None:
    """The plain loop: opens the pages and calls `generate` of transformers."""
    backend: Any = reranker.backend
    images = [load_page(path, backend.limits) for path in paths]
    inputs = encode(backend.processor, backend.prompt, [QUERY.format(2001)], [images])
    with torch.no_grad():
        backend.model.generate(**inputs, max_new_tokens=TOKENS_PER_PAGE * len(paths), do_sample=False)


def largest_error(reranker: Reranker, paths: list[Path]) -> float:
    """Of the scores, compared to a separate pass in float64 for each id, normalized over the ids."""
    backend: Any = reranker.backend
    images, query = [load_page(path, backend.limits) for path in paths], QUERY.format(2001)
    [[answer]] = backend.generate([query], [images], mode="logits")
    inputs = encode(backend.processor, backend.prompt, [query], [images])
    ids, types = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids")
    del inputs["attention_mask"]
    branches = id_branches(backend.processor.tokenizer, len(paths))
    totals = []
    for tokens in branches.tokens:
        row = torch.cat([ids, torch.tensor([[*branches.opening, *tokens]])], dim=1)
        row_types = torch.cat([types, torch.zeros(1, row.shape[1] - ids.shape[1], dtype=types.dtype)], dim=1)
        with torch.no_grad():
            kept = len(tokens) + 1
            outputs = backend.model(input_ids=row, mm_token_type_ids=row_types, logits_to_keep=kept, **inputs)
        log_probs = outputs.logits[0].double().log_softmax(-1)
        totals.append(sum(log_probs[k, token] for k, token in enumerate(tokens)))
    expected = torch.stack(totals).softmax(0)
    found = dict(zip(answer.order, answer.scores, strict=True))
    return max(abs(found[i] - float(value)) for i, value in enumerate(expected, 1))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(checkpoint: str, **options: Any) -> Row:
    """All figures of a checkpoint; `options` are those of `Reranker`."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        paths = write_pages(Path(name), WIDEST)
        one_pass = Reranker(checkpoint, mode="logits", page_cache=0, **options)
        windows = Reranker(checkpoint, mode="logits", window=9, page_cache=0, **options)
        limit = {"max_new_tokens": TOKENS_PER_PAGE * WIDE}
        seconds = in_turns(
            {
                "one_pass": lambda: one_pass.rank(QUERY.format(2001), paths[:WIDE]),
                "windows": lambda: windows.rank(QUERY.format(2001), paths[:WIDE]),
                "plain_loop": lambda: plain(one_pass, paths[:WIDE]),
            }
        )
        row: Row = {"checkpoint": checkpoint, "pages_20": seconds}
        row["times_the_windows"] = seconds["windows"] / seconds["one_pass"]
        row["times_the_plain_loop"] = seconds["plain_loop"] / seconds["one_pass"]
        row["windows"] = len(windows.rank(QUERY.format(2001), paths[:WIDE]).answers)
        row["largest_error"] = largest_error(one_pass, paths[:WIDE])
        before = peak_mib()
        row["pages_50"] = in_turns({"one_pass": lambda: one_pass.rank(QUERY.format(2001), paths)})
        row["pages_50"]["peak_growth_mib"] = peak_mib() - before
        queries = [QUERY.format(2001 + i) for i in range(QUESTIONS)]
        for mode in ("logits", "reason"):
            apart = Reranker(checkpoint, mode=mode, page_cache=0, **options, **limit)
            together = Reranker(checkpoint, mode=mode, batch_size=10, **options, **limit)

            def one_by_one(apart: Reranker = apart) -> None:
                for query in queries:
                    apart.rank(query, paths[:WIDE])

            def at_once(together: Reranker = together) -> None:
                together.rank_many(queries, [paths[:WIDE]] * len(queries))

            seconds = in_turns({"one_by_one": one_by_one, "at_once": at_once})
            row[f"ten_questions_{mode}"] = seconds | {"times": seconds["one_by_one"] / seconds["at_once"]}
    return row


def targets(row: Row, name: str) -> list[Row]:
    return [
        at_least(f"{name}: 20 pages, one pass over four windows", row["times_the_windows"], 3),
        at_least(f"{name}: 20 pages, one pass over the plain loop", row["times_the_plain_loop"], 20),
        at_most(f"{name}: largest error of a score of 20 pages", row["largest_error"], 1e-5),
        at_least(f"{name}: ten questions on 20 pages, reason", row["ten_questions_reason"]["times"], 3),
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--out", type=Path, default=OUTPUT / "wide.json")
    args = parser.parse_args()
    row = measure(args.checkpoint)
    write_results(args.out, row, targets(row, Path(args.checkpoint).name))
    print(json.dumps(row, indent=2))
    print_targets(targets(row, Path(args.checkpoint).name))


if __name__ == "__main__":
    main()
