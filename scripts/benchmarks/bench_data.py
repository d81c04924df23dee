"""Benchmarks of data construction: teacher calls per second, restarts after kills, and large training sets.

    python scripts/benchmarks/bench_data.py  # or: make bench-data; all kinds of rows
    python scripts/benchmarks/bench_data.py --rows throughput  # one kind
    python scripts/benchmarks/bench_data.py --rows faults --questions 60 --kills 3

- *throughput*: the traces stage calls a local server that answers after 200 ms, with page images of about one
  megapixel and 32 concurrent calls, so the upper bound is 160 calls per second. It is compared with a simple
  script on the same server: 10 threads that each process the pages of a question one after the other, the openai
  client, and every page encoded for each call. Both times cover everything from reading the task file to the last
  answer, except imports.
- *faults*: 30 % of the server's replies are faults (429 with Retry-After, 500, connection reset, no reply,
  truncated JSON, empty text). The traces stage is killed with SIGKILL at random moments and restarted with the
  same command. At the end, it must have written `questions` traces with the same bytes as a run without faults and
  kills. `paid_twice` must be 0: a request whose answer was already in the store at a kill must not be sent again.
  The server may have sent more answers than the store needed: answers in transit at a kill (`lost_on_the_wire`),
  and answers after the stage's timeout (`given_up`; 0 unless another program occupies the processor for
  `--timeout` seconds).
- *batches*: the same with `teacher.batch=true` and a server with batch endpoints (batch_server.py). 30 % of its
  replies and 30 % of the lines of a batch are faults. `paid_twice` counts answers that came in two batches.
- *corpora*: reads a training set and builds candidates from it (bench_corpora.py), at two sizes.

Writes outputs/bench/data.json. To add a kind of row, write a function from the arguments to rows, and add it to
ROWS.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from bench_common import (
    OUTPUT,
    ROOT,
    Row,
    argument_parser,
    at_least,
    at_most,
    equal,
    machine,
    print_targets,
    write_results,
)
from PIL import Image, ImageDraw
from tqdm import tqdm

from mmr5_train.common.files import write_records
from mmr5_train.ranking.records import Candidate, Page, PageId, RankingTask

DELAY, CONCURRENCY, PLAIN_THREADS, PAGES = 0.2, 32, 10, 5
MEGAPIXEL, SMALL = (880, 1136), (120, 160)  # sizes of page images in pixels
MAX_PEAK_MIB = 1.5e9 / 2**20
FAULTS_SETTINGS = ("refine=true", f"teacher.concurrency={CONCURRENCY}", "teacher.max_wait=2")


def throughput(args: argparse.Namespace) -> list[Row]:
    """Measures the traces stage and the simple script, one after the other, on one server."""
    from data_construction.traces import TracesStage, main
    from mmr5_train.common.config import compose_stage

    with tempfile.TemporaryDirectory() as folder, chat_server("--delay", str(DELAY)):
        data = make_tasks(Path(folder), args.calls // PAGES, MEGAPIXEL)
        command = traces_command(data, Path(folder) / "out", f"teacher.concurrency={CONCURRENCY}")
        config = compose_stage(TracesStage, "traces", command)
        stage = time_work(lambda: main(config))
        plain_calls = min(args.calls, 800)
        plain = time_work(lambda: plain_traces(data, plain_calls // PAGES))
        sizes = [path.stat().st_size for path in data.parent.glob("images/*")]
    kilobytes, ideal = sum(sizes) / len(sizes) / 1000, CONCURRENCY / DELAY
    rows: list[Row] = []
    for method, calls, (seconds, cpu) in (("stage", args.calls, stage), ("plain", plain_calls, plain)):
        rate = calls / seconds
        rows.append(
            {"kind": "throughput", "way": method, "calls": calls, "page_kilobytes": kilobytes, "seconds": seconds,
             "calls_per_s": rate, "share_of_ideal": rate / ideal, "cpu_ms_a_call": 1000 * cpu / calls}
        )  # fmt: skip
    rows[0]["times_plain"] = rows[0]["calls_per_s"] / rows[1]["calls_per_s"]
    return rows


def plain_traces(data: Path, questions: int) -> None:
    """Gets the notes as a simple script would: the same prompts and the same server, without the stage."""
    import openai

    from data_construction.teacher.vision import OpenAIConfig
    from data_construction.traces import TracesStage
    from mmr5_train.common.config import compose_stage
    from mmr5_train.common.files import read_records

    teacher = compose_stage(TracesStage, "traces", traces_command(data, data.parent / "plain")).teacher
    assert isinstance(teacher, OpenAIConfig)
    client = openai.OpenAI(max_retries=3)

    def explain(task: RankingTask) -> list[str | None]:
        notes = []
        for page in task.candidates:
            stream = io.BytesIO()
            with Image.open(data.parent / page.image) as image:
                image.convert("RGB").save(stream, "JPEG", quality=90)
            url = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
            image_part: Any = {"type": "image_url", "image_url": {"url": url}}
            text_part: Any = {
                "type": "text",
                "text": teacher.explain_text(task.query, page.id in task.positives, 40),
            }
            messages: Any = [
                {"role": "system", "content": teacher.system},
                {"role": "user", "content": [image_part, text_part]},
            ]
            reply = client.chat.completions.create(model="m", messages=messages, max_completion_tokens=1024)
            notes.append(reply.choices[0].message.content)
        return notes

    with ThreadPoolExecutor(PLAIN_THREADS) as threads:
        for notes in threads.map(explain, read_records(data, RankingTask)[:questions]):
            assert all(notes)


def faults(args: argparse.Namespace) -> list[Row]:
    """Compares a run with faults and kills to a run without them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = undisturbed_run(folder, args.questions)
        with chat_server("--delay", str(args.delay), "--faults", "0.3") as base_url:
            settings = (*FAULTS_SETTINGS, f"teacher.timeout={args.timeout}", "teacher.attempts=12")
            command = traces_command(data, folder / "out", *settings)
            started = time.monotonic()
            stored_counts, lost = kill_repeatedly(command, folder, base_url, args)
            run_to_the_end(command)
            seconds, counts = time.monotonic() - started, query_server(base_url, "counts")
            sent = query_server(base_url, "answers")
        paid_twice = sum(sent[text] - count for text, count in stored_counts.items())
        repeated = counts["answered"] - counts["distinct"]
        return [
            {"kind": "faults", **compare_traces(folder, args.questions),
             "kills": args.kills, "requests": counts["requests"], "answered": counts["answered"],
             "stored": len(stored_texts(folder / "out.answers.sqlite")), "lost_on_the_wire": lost,
             "given_up": repeated - lost - paid_twice, "paid_twice": paid_twice, "seconds": seconds,
             "faults": {key: counts[key] for key in counts if key not in ("requests", "answered", "distinct")}}
        ]  # fmt: skip


def batches(args: argparse.Namespace) -> list[Row]:
    """Compares a run with batches, faults and kills to a run without any of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = undisturbed_run(folder, args.questions)
        with chat_server("--delay", "2", "--faults", "0.3", script="batch_server.py") as base_url:
            settings = ("teacher.batch=true", "teacher.batch_poll=0.2", "teacher.attempts=20")
            command = traces_command(data, folder / "out", *FAULTS_SETTINGS, *settings)
            started, rng, kills = time.monotonic(), random.Random(args.seed), 0
            for _ in tqdm(range(args.kills), desc="kills", disable=args.kills < 5):
                if not kill_at(command, folder, after(rng.uniform(1, 10)), may_end=True):
                    break
                kills += 1
            run_to_the_end([*command, "overwrite=true"])
            seconds, counts = time.monotonic() - started, query_server(base_url, "counts")
            batched = query_server(base_url, "batched")
        return [
            {"kind": "batches", **compare_traces(folder, args.questions), "kills": kills,
             "batches": counts["batches"], "answered_in_batches": sum(batched.values()),
             "answered_by_themselves": counts["online"],
             "stored": len(stored_texts(folder / "out.answers.sqlite")),
             "paid_twice": sum(count - 1 for count in batched.values()), "seconds": seconds}
        ]  # fmt: skip


def undisturbed_run(folder: Path, questions: int) -> Path:
    """Makes the tasks and their traces without faults and kills, in `folder`/reference. Returns the task file."""
    data = make_tasks(folder, questions, SMALL)
    with chat_server("--delay", "0.02"):
        run_to_the_end(traces_command(data, folder / "reference", *FAULTS_SETTINGS))
    return data


def compare_traces(folder: Path, questions: int) -> Row:
    """How many traces there are after the kills, and whether they are those of the undisturbed run."""
    traces, reference = ((folder / name / "traces.jsonl").read_bytes() for name in ("out", "reference"))
    return {"questions": questions, "traces": len(traces.splitlines()), "same_bytes": traces == reference}


def after(seconds: float) -> Callable[[], bool]:
    """A function that returns true from `seconds` after now on."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def kill_repeatedly(
    command: list[str], folder: Path, base_url: str, args: argparse.Namespace
) -> tuple[dict[str, int], int]:
    """Starts the stage and kills it, `args.kills` times.

    Returns, for each answer in the store at a kill, how often the server had sent it when it was first seen there,
    and the number of answers that the server sent but that a kill prevented from reaching the store.
    """
    rng = random.Random(args.seed)
    calls = args.questions * (PAGES + 1)
    stored_counts: dict[str, int] = {}
    lost, sent_before = 0, dict[str, int]()
    for kill in tqdm(range(args.kills), desc="kills", disable=args.kills < 5):
        goal = calls * (kill + rng.uniform(0.2, 1)) / (args.kills + 1)
        kill_at(command, folder, lambda goal=goal: query_server(base_url, "counts")["distinct"] >= goal)
        sent, stored = query_server(base_url, "answers"), stored_texts(folder / "out.answers.sqlite")
        lost += sum(count > sent_before.get(text, 0) and text not in stored for text, count in sent.items())
        stored_counts = {text: sent[text] for text in stored} | stored_counts
        sent_before = sent
    return stored_counts, lost


def corpora(args: argparse.Namespace) -> list[Row]:
    """Measures the training-set reader and the candidates stage, with a tenth of the pages and with all pages."""
    from bench_corpora import run_all

    return [{"kind": "corpora", **row} for row in run_all([args.pages // 10, args.pages])]


ROWS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "throughput": throughput,
    "faults": faults,
    "batches": batches,
    "corpora": corpora,
}


def targets(rows: list[Row]) -> list[Row]:
    """The targets of the kinds of rows that were measured."""
    results = []
    for row in rows:
        if row["kind"] == "throughput" and row["way"] == "stage":
            results.append(at_least("share of the ideal call rate", row["share_of_ideal"], 0.85))
        if row["kind"] in ("faults", "batches"):
            kind = row["kind"]
            results.append(equal(f"{kind}: traces after the kills", row["traces"], row["questions"]))
            results.append(equal(f"{kind}: same bytes as an undisturbed run", row["same_bytes"], True))
            results.append(equal(f"{kind}: stored answers that were requested again", row["paid_twice"], 0))
    corpora_rows = [row for row in rows if row["kind"] == "corpora"]
    for what in ("read", "candidates"):
        sizes = [row for row in corpora_rows if row["what"] == what]
        if sizes:
            small, large = sizes
            name = f"{what}, {large['rows']} rows"
            results.append(at_most(f"{name}: peak memory in MiB", large["peak_mib"], MAX_PEAK_MIB))
            slowdown = large["seconds"] / small["seconds"] / (large["rows"] / small["rows"])
            results.append(at_most(f"{name}: seconds per row, relative to a tenth of the rows", slowdown, 1.2))
    return results


def make_tasks(folder: Path, questions: int, size: tuple[int, int]) -> Path:
    """Writes train.jsonl, pages.jsonl and JPEG pages full of text: ten pages per document, five per question."""
    rng = random.Random(0)
    (folder / "images").mkdir()
    documents = max(1, min(20, questions // 10))
    pages = []
    for d in range(documents):
        for number in range(10):
            image = Image.new("RGB", size, "white")
            draw = ImageDraw.Draw(image)
            for y in range(20, size[1] - 20, 24):
                draw.text((20, y), "".join(rng.choices("etaoin shrdlu 0123456789", k=size[0] // 9)), fill="black")
            file = f"images/{d}-{number}.jpg"
            image.save(folder / file, quality=90)
            pages.append(
                Page(doc_name=f"d{d}", page=number, domain="x", image=file, width=size[0], height=size[1])
            )
    tasks = []
    for q in range(questions):
        shown = rng.sample([page for page in pages if page.doc_name == f"d{q % documents}"], PAGES)
        candidates = tuple(
            Candidate(doc_name=page.doc_name, page=page.page, image=page.image, score=-k)
            for k, page in enumerate(shown)
        )
        gold = (PageId(doc_name=shown[0].doc_name, page=shown[0].page),)
        query = f"What is the sum of row {q}?"
        tasks.append(RankingTask(query_id=f"q{q}", query=query, domain="x", candidates=candidates, positives=gold))
    write_records(folder / "train.jsonl", tasks)
    write_records(folder / "pages.jsonl", pages)
    return folder / "train.jsonl"


def traces_command(data: Path, out: Path, *overrides: str) -> list[str]:
    return [f"data='{data}'", f"out='{out}'", "teacher=openai", "teacher.model=m", *overrides]


@contextmanager
def chat_server(*options: str, script: str = "chat_server.py") -> Iterator[str]:
    """Runs a server as a separate process, and sets the environment variables of the openai client to it."""
    command = [sys.executable, str(ROOT / "scripts/benchmarks" / script), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}
        yield url
    finally:
        server.kill()
        server.wait()


def query_server(base_url: str, what: str) -> dict[str, int]:
    """Gets the server's `counts` or `answers`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without a proxy
    with opener.open(f"{base_url}/{what}", timeout=20) as reply:
        return json.load(reply)


def stored_texts(store: Path) -> set[str]:
    """The non-empty answers in a store."""
    with closing(sqlite3.connect(store, timeout=30)) as connection:
        return {text for (text,) in connection.execute("SELECT text FROM answers WHERE text != ''")}


def stage_command(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "data_construction.traces", *command]


def kill_at(command: list[str], folder: Path, reached: Callable[[], bool], may_end: bool = False) -> bool:
    """Starts the stage and kills it as soon as `reached()` is true. Returns whether it was still running."""
    log = folder / "log.txt"
    with log.open("ab") as stream:
        stage = subprocess.Popen(stage_command(command), cwd=ROOT, stdout=stream, stderr=stream)
    while stage.poll() is None and not reached():
        time.sleep(0.01)
    if stage.poll() == 0 and may_end:
        return False
    if stage.poll() is not None:
        raise SystemExit(f"bench-data: the stage ended before it was killed:\n{log.read_text()[-2000:]}")
    stage.kill()
    stage.wait()
    return True


def run_to_the_end(command: list[str]) -> None:
    process = subprocess.run(stage_command(command), cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"bench-data: the stage failed:\n{process.stderr[-3000:]}")


def time_work(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock seconds, and seconds of this process's CPU time."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="kinds of rows")
    parser.add_argument("--calls", type=int, default=3200, help="throughput: calls that the stage makes")
    parser.add_argument("--questions", type=int, default=2000, help="faults: questions with five pages each")
    parser.add_argument("--kills", type=int, default=20, help="faults: number of SIGKILLs")
    parser.add_argument("--delay", type=float, default=0.05, help="faults: seconds before a reply")
    parser.add_argument("--timeout", type=float, default=10, help="faults: timeout of a call in seconds")
    parser.add_argument("--pages", type=int, default=100_000, help="corpora: pages, with one question each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUTPUT / "data.json")
    args = parser.parse_args()
    rows: list[Row] = []
    for kind in args.rows:
        for row in ROWS[kind](args):
            rows.append(row)
            print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}))
        write_results(args.out, {"rows": rows, "machine": machine()}, targets(rows))
    print_targets(targets(rows))
    print(f"bench-data: {len(rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
