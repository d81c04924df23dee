"""The server under load, and under malformed requests.

    python scripts/benchmarks/bench_serve.py --checkpoint outputs/demo/distill/model    # or: make bench-serve

Starts `mmr5_train.serve` as a separate process. First, `--clients` clients send requests for `--seconds` seconds,
each as soon as its last request is answered. This measures throughput, latency, and the server's memory (resident
set) over time. Then it sends `--malformed` malformed requests, in turn of each kind in malformed_requests.py.
The server must reject each with a status from 400 to 499 and a message that names what is wrong. Finally, the
server must still answer a valid request. Writes outputs/bench/serve.json; exits with 1 if a response was wrong.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from bench_common import OUTPUT, ROOT, Row, argument_parser, at_least, at_most, equal, print_targets, write_results
from malformed_requests import JSON, Malformed, data_url, malformed_requests, rejection_problem, to_bytes

from data_construction.corpus.drawing import draw_page
from data_construction.corpus.synthetic_documents import make_document

PAGES = 5  # of a valid request
REQUEST_BODIES = 20  # different valid requests
MEMORY_SAMPLES = 12
MEMORY_GROWTH = 0.1  # "memory stays flat": maximal growth in the second half of the load


def send_malformed(base_url: str, count: int, malformed: list[Malformed]) -> dict[str, Any]:
    """Sends `count` malformed requests. `wrong` lists the responses that were not the expected rejection."""
    statuses: Counter[int] = Counter()
    problems = []
    with httpx.Client(base_url=base_url, timeout=60, trust_env=False) as client:
        for request in itertools.islice(itertools.cycle(malformed), count):
            response = client.request(request.method, request.path, content=request.body, headers=request.headers)
            statuses[response.status_code] += 1
            if (problem := rejection_problem(request, response)) is not None:
                problems.append(f"{request.name}: {problem}")
    return {
        "requests": count,
        "kinds": len(malformed),
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        "wrong": problems,
    }


def valid_request(index: int = 0, pages: int = PAGES) -> dict[str, Any]:
    """A question about the first pages of a synthetic document, with a seed that no corpus of the demo uses."""
    document = make_document(index, seed=999)
    images = [draw_page(page) for page in document.pages[:pages]]
    documents = [data_url(to_bytes(image, "JPEG"), "image/jpeg") for image in images]
    return {"query": document.questions[0]["Q"], "documents": documents}


def send_valid(base_url: str) -> httpx.Response:
    return httpx.post(f"{base_url}/v1/rerank", json=valid_request(), timeout=300, trust_env=False)


async def run_load(base_url: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Runs `clients` concurrent clients for `seconds`. Latencies are in seconds, memory in MiB."""
    bodies = itertools.cycle([json.dumps(valid_request(i)).encode() for i in range(REQUEST_BODIES)])
    latencies: list[float] = []
    failures: Counter[int] = Counter()
    memory: list[dict[str, float]] = []
    start = time.perf_counter()

    async def send_requests(client: httpx.AsyncClient) -> None:
        while time.perf_counter() - start < seconds:
            started = time.perf_counter()
            response = await client.post("/v1/rerank", content=next(bodies), headers=JSON)
            if response.status_code == 200:
                latencies.append(time.perf_counter() - started)
            else:
                failures[response.status_code] += 1

    async def sample_memory() -> None:
        while True:
            memory.append({"s": round(time.perf_counter() - start, 1), "mib": resident_mib(pid)})
            await asyncio.sleep(seconds / MEMORY_SAMPLES)

    connections = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=base_url, timeout=300, limits=connections, trust_env=False) as client:
        sampler = asyncio.create_task(sample_memory())
        await asyncio.gather(*(send_requests(client) for _ in range(clients)))
        sampler.cancel()
    duration = time.perf_counter() - start
    cuts = statistics.quantiles(latencies, n=100, method="inclusive") if len(latencies) > 1 else latencies * 99
    return {
        "clients": clients,
        "seconds": round(duration, 1),
        "pages_a_request": PAGES,
        "answered": len(latencies),
        "failed": {str(status): n for status, n in sorted(failures.items())},
        "requests_a_second": round(len(latencies) / duration, 2),
        "p50_s": round(cuts[49], 3),
        "p99_s": round(cuts[98], 3),
        "memory": memory,
    }


def resident_mib(pid: int) -> float:
    return round(psutil.Process(pid).memory_info().rss / 2**20, 1)


@contextmanager
def started_server(checkpoint: str, *overrides: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Starts a server, waits until it is ready, and yields its base URL and process."""
    command = [sys.executable, "-m", "mmr5_train.serve", f"checkpoint={checkpoint}", "port=0", *overrides]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if " at http" not in line:
            raise RuntimeError(f"the server did not start (exit code {server.wait()})")
        base_url = line.rsplit(" at ", 1)[1].strip()
        while httpx.get(f"{base_url}/health", trust_env=False).status_code != 200:
            if server.poll() is not None:
                raise RuntimeError(f"the server exited while it loaded the model (exit code {server.returncode})")
            time.sleep(0.2)
        yield base_url, server
    finally:
        server.terminate()
        server.wait(60)


def measure(checkpoint: str, clients: int, seconds: float, malformed: int, overrides: list[str]) -> dict[str, Any]:
    """Starts a server, then runs the load, the malformed requests and one valid request."""
    path = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    with started_server(path, *overrides) as (base_url, server):
        send_valid(base_url).raise_for_status()
        load = asyncio.run(run_load(base_url, server.pid, clients, seconds))
        rejections = send_malformed(base_url, malformed, malformed_requests())
        return {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "server": overrides,
            "load": load,
            "malformed": rejections,
            "good_request_afterwards": send_valid(base_url).status_code,
            "memory_at_the_end_mib": resident_mib(server.pid),
        }


def targets(result: dict[str, Any]) -> list[Row]:
    load, malformed = result["load"], result["malformed"]
    samples = [sample["mib"] for sample in load["memory"]]
    growth = samples[-1] / samples[len(samples) // 2] - 1
    return [
        equal("valid requests that failed under load", sum(load["failed"].values()), 0),
        at_most("growth of the server's memory in the second half of the load", growth, MEMORY_GROWTH),
        at_least("kinds of malformed requests", malformed["kinds"], 15),
        equal("malformed requests with a wrong response", len(malformed["wrong"]), 0),
        equal("status of a valid request afterwards", result["good_request_afterwards"], 200),
    ]


def has_wrong_response(result: dict[str, Any]) -> bool:
    problems = result["malformed"]["wrong"] or result["load"]["failed"]
    return bool(problems) or result["good_request_afterwards"] != 200


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", default="outputs/demo/distill/model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--malformed", type=int, default=1000, help="number of malformed requests")
    parser.add_argument("--out", type=Path, default=OUTPUT / "serve.json")
    parser.add_argument("overrides", nargs="*", help="settings of the server, such as batch_size=16")
    args = parser.parse_args()
    result = measure(args.checkpoint, args.clients, args.seconds, args.malformed, args.overrides)
    write_results(args.out, result, targets(result))
    print(json.dumps(result, indent=2))
    print_targets(targets(result))
    if has_wrong_response(result):
        sys.exit("bench_serve: the server gave a wrong response; see above")


if __name__ == "__main__":
    main()
