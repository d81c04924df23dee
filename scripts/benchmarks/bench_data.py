"""What the data stages do under load.

    python scripts/benchmarks/bench_data.py  # make bench-data: every kind of row
    python scripts/benchmarks/bench_data.py --rows throughput  # one kind
    python scripts/benchmarks/bench_data.py --rows faults --questions 60 --kills 3

- *throughput*: traces from a server on this machine that answers after 200 ms, page pictures of about a megapixel,
  32 calls at once, so that no client can do better than 160 calls a second. Beside it the plain way on the same
  server: 10 threads, in each one page of a question after the other, the openai client, each page encoded anew.
  Both times hold everything from the task file to the answers, imports excepted.
- *faults*: the traces stage, 30 of 100 calls going wrong (429 with Retry-After, 500, reset connection, no answer,
  cut-off JSON, empty text), while it is killed with SIGKILL at random moments and started anew with the same
  command. `traces` of `questions` must be there in the end, their bytes the same as those of a run without faults
  and kills, and `paid_twice` 0: no request was sent again whose answer was in the store at a kill. The server gave
  more answers: those on the wire at a kill (`lost_on_the_wire`), and those that came when the stage had given the
  call up (`given_up`; none, unless something else takes the processor for as long as `--timeout`).
- *corpora*: rows of a training set read, and made into candidates (bench_corpora.py), at two sizes.

Another kind of row: a function of the arguments that returns rows, and its name in ROWS.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
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

from PIL import Image, ImageDraw
from tqdm import tqdm

from mmr5_train.common.files import write_json, write_records
from mmr5_train.ranking.records import Candidate, Page, PageId, RankingTask

ROOT = Path(__file__).resolve().parents[2]
DELAY, CONCURRENCY, PLAIN_THREADS, PAGES = 0.2, 32, 10, 5
MEGAPIXEL, SMALL = (880, 1136), (120, 160)

Row = dict[str, Any]


def throughput(args: argparse.Namespace) -> list[Row]:
    """The traces stage and the plain way, in turn, on one server."""
    from data_construction.traces import TracesStage, main
    from mmr5_train.common.config import compose_stage

    with tempfile.TemporaryDirectory() as folder, chat_server("--delay", str(DELAY)):
        data = make_tasks(Path(folder), args.calls // PAGES, MEGAPIXEL)
        command = traces_command(data, Path(folder) / "out", f"teacher.concurrency={CONCURRENCY}")
        config = compose_stage(TracesStage, "traces", command)
        stage = measured(lambda: main(config))
        plain_calls = min(args.calls, 800)
        plain = measured(lambda: plain_traces(data, plain_calls // PAGES))
        sizes = [path.stat().st_size for path in data.parent.glob("images/*")]
    kilobytes, ideal = sum(sizes) / len(sizes) / 1000, CONCURRENCY / DELAY
    rows: list[Row] = []
    for way, calls, (seconds, cpu) in (("stage", args.calls, stage), ("plain", plain_calls, plain)):
        rate = calls / seconds
        rows.append(
            {"kind": "throughput", "way": way, "calls": calls, "page_kilobytes": kilobytes, "seconds": seconds,
             "calls_per_s": rate, "share_of_ideal": rate / ideal, "cpu_ms_a_call": 1000 * cpu / calls}
        )  # fmt: skip
    rows[0]["times_plain"] = rows[0]["calls_per_s"] / rows[1]["calls_per_s"]
    return rows


def plain_traces(data: Path, questions: int) -> None:
    """Notes as a short script would get them: the same words to the same server."""
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
            picture: Any = {"type": "image_url", "image_url": {"url": url}}
            asked: Any = {"type": "text", "text": teacher.explain_text(task.query, page.id in task.positives, 40)}
            messages: Any = [
                {"role": "system", "content": teacher.system},
                {"role": "user", "content": [picture, asked]},
            ]
            reply = client.chat.completions.create(model="m", messages=messages, max_completion_tokens=1024)
            notes.append(reply.choices[0].message.content)
        return notes

    with ThreadPoolExecutor(PLAIN_THREADS) as threads:
        for notes in threads.map(explain, read_records(data, RankingTask)[:questions]):
            assert all(notes)


def faults(args: argparse.Namespace) -> list[Row]:
    """A run that is killed again and again while the server makes trouble, and one that nothing befalls."""
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_tasks(folder, args.questions, SMALL)
        with chat_server("--delay", "0.02"):
            run_to_the_end(traces_command(data, folder / "calm", *CALM))
        with chat_server("--delay", str(args.delay), "--faults", "0.3") as base_url:
            command = traces_command(
                data, folder / "out", *CALM, f"teacher.timeout={args.timeout}", "teacher.attempts=12"
            )
            store, lost, before = folder / "out.answers.sqlite", 0, dict[str, int]()
            safe: dict[str, int] = {}  # how often an answer had been given when it was first seen in the store
            started = time.monotonic()
            for kill in tqdm(range(args.kills), desc="kills", disable=args.kills < 5):
                goal = args.questions * (PAGES + 1) * (kill + rng.uniform(0.2, 1)) / (args.kills + 1)
                kill_at(command, folder, lambda goal=goal: ask(base_url, "counts")["distinct"] >= goal)
                given, kept = ask(base_url, "answers"), stored(store)
                lost += sum(count > before.get(text, 0) and text not in kept for text, count in given.items())
                safe = {text: given[text] for text in kept} | safe
                before = given
            run_to_the_end(command)
            seconds, seen = time.monotonic() - started, ask(base_url, "counts")
            given = ask(base_url, "answers")
        paid_twice = sum(given[text] - count for text, count in safe.items())
        same = (folder / "out/traces.jsonl").read_bytes() == (folder / "calm/traces.jsonl").read_bytes()
        found = sum(1 for _ in (folder / "out/traces.jsonl").open())
        made = {key: seen[key] for key in seen if key not in ("requests", "answered", "distinct")}
        repeated = seen["answered"] - seen["distinct"]
        return [
            {"kind": "faults", "questions": args.questions, "traces": found, "same_bytes": same,
             "kills": args.kills, "requests": seen["requests"], "answered": seen["answered"],
             "stored": len(stored(store)), "lost_on_the_wire": lost,
             "given_up": repeated - lost - paid_twice, "paid_twice": paid_twice, "seconds": seconds,
             "faults": made}
        ]  # fmt: skip


def corpora(args: argparse.Namespace) -> list[Row]:
    """The training-set reader and the candidates stage at two sizes: does ten times as much cost ten times?"""
    from bench_corpora import run_all

    return [{"kind": "corpora", **row} for row in run_all([args.pages // 10, args.pages])]


ROWS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "throughput": throughput,
    "faults": faults,
    "corpora": corpora,
}
CALM = ("refine=true", f"teacher.concurrency={CONCURRENCY}", "teacher.max_wait=2")


def make_tasks(folder: Path, questions: int, size: tuple[int, int]) -> Path:
    """train.jsonl, pages.jsonl and JPEG pages full of lines, ten a document; five pages a question."""
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
def chat_server(*options: str) -> Iterator[str]:
    """scripts/benchmarks/chat_server.py in a process of its own; the environment points to it."""
    command = [sys.executable, str(ROOT / "scripts/benchmarks/chat_server.py"), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}
        yield url
    finally:
        server.kill()
        server.wait()


def ask(base_url: str, what: str) -> dict[str, int]:
    """The server's `counts` or `answers`."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{base_url}/{what}", timeout=20) as reply:
        return json.load(reply)


def stored(store: Path) -> set[str]:
    """The texts in a store that are not empty."""
    with closing(sqlite3.connect(store, timeout=30)) as connection:
        return {text for (text,) in connection.execute("SELECT text FROM answers WHERE text != ''")}


def stage_command(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "data_construction.traces", *command]


def kill_at(command: list[str], folder: Path, reached: Callable[[], bool]) -> None:
    """Runs the stage and kills it once enough is answered: the goal is random, and so is the moment."""
    with (folder / "log.txt").open("ab") as log:
        stage = subprocess.Popen(stage_command(command), cwd=ROOT, stdout=log, stderr=log)
    while stage.poll() is None and not reached():
        time.sleep(0.01)
    if stage.poll() is not None:
        raise SystemExit(
            f"bench-data: the stage ended before it was killed:\n{(folder / 'log.txt').read_text()[-2000:]}"
        )
    stage.kill()
    stage.wait()


def run_to_the_end(command: list[str]) -> None:
    ended = subprocess.run(stage_command(command), cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"bench-data: the stage failed:\n{ended.stderr[-3000:]}")


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU time."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--calls", type=int, default=3200, help="throughput: calls of the stage")
    parser.add_argument("--questions", type=int, default=2000, help="faults: questions, five pages each")
    parser.add_argument("--kills", type=int, default=20, help="faults: SIGKILLs")
    parser.add_argument("--delay", type=float, default=0.05, help="faults: seconds before a reply")
    parser.add_argument("--timeout", type=float, default=10, help="faults: seconds until a call is given up")
    parser.add_argument("--pages", type=int, default=100_000, help="corpora: pages, and as many questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/data.json")
    args = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    rows: list[Row] = []
    for kind in args.rows:
        for row in ROWS[kind](args):
            rows.append(row)
            print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"rows": rows, "machine": machine})
    print(f"bench-data: {len(rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
