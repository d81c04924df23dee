"""The server under load, and under requests that nobody should send.

    python scripts/benchmarks/bench_serve.py --checkpoint outputs/demo/distill/model

Starts `mmr5_train.serve` as a process of its own. First `--clients` clients ask for `--seconds`, each its next
question when the last is answered: throughput, latency, and the server's memory (resident set) over the time. Then
`--malformed` malformed requests, of all the kinds in `malformed_kinds` in turn: each must be refused with a status
from 400 to 499 and a message that names what is wrong. At the end a good request must still be answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

from data_construction.corpus.drawing import draw_page
from data_construction.corpus.synthetic_documents import make_document
from mmr5_train.common.files import write_json

ROOT = Path(__file__).resolve().parents[2]
PAGES = 5  # of a good request
QUESTIONS = 20  # different good requests of the load
JSON = {"Content-Type": "application/json"}
MEMORY_SAMPLES = 12


@dataclass(frozen=True)
class Malformed:
    """A request that must be refused with `status`, in words that hold `says`."""

    name: str
    status: int
    says: str
    body: bytes
    path: str = "/v1/rerank"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: JSON)


def malformed_kinds(body_mb: float = 32, pages: int = 50, query_chars: int = 2000) -> list[Malformed]:
    """One of each kind, for a server with these limits and without a folder."""
    good = data_url(encoded("PNG"))
    bomb = data_url(b"BM" + bytes(8) + (54).to_bytes(4, "little") + bmp_header(30_000, 30_000))

    def asked(**fields: Any) -> bytes:
        return json.dumps({"query": "Which page?", "documents": [good]} | fields).encode()

    def shows(*documents: Any) -> bytes:
        return asked(documents=list(documents))

    return [
        Malformed("nothing", 400, "not JSON", b""),
        Malformed("no JSON", 400, "not JSON", b"which page shows a bar chart?"),
        Malformed("JSON cut off", 400, "line 1", asked()[:-20]),
        Malformed("no UTF-8", 400, "not UTF-8", asked().replace(b"Which", b"Wh\xff\xfech")),
        Malformed("NaN", 400, "NaN", b'{"query": "?", "documents": [NaN]}'),
        Malformed("Infinity", 400, "Infinity", b'{"query": "?", "documents": ["x"], "top_n": -Infinity}'),
        Malformed("nested deeply", 400, "nested", b'{"documents": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        Malformed("an endless number", 400, "digits", b'{"top_n": ' + b"9" * 100_000 + b"}"),
        Malformed("a list", 422, "JSON object", b"[1, 2]"),
        Malformed("a field nobody knows", 422, "topn", asked(topn=3)),
        Malformed("a field that is no text", 422, "surrogate", asked(**{"\ud800": 1})),
        Malformed("no query", 422, "query", json.dumps({"documents": [good]}).encode()),
        Malformed("an empty query", 422, "query", asked(query=" \n")),
        Malformed("a number as query", 422, "query", asked(query=7)),
        Malformed("half a surrogate pair", 422, "surrogate", asked(query="Which \ud83d page?")),
        Malformed("a query too long", 422, str(query_chars), asked(query="w" * (query_chars + 1))),
        Malformed("no documents", 422, "documents", json.dumps({"query": "?"}).encode()),
        Malformed("an empty list", 422, "documents", shows()),
        Malformed("documents that are no list", 422, "documents", asked(documents="page.png")),
        Malformed("too many pages", 422, str(pages), shows(*[good] * (pages + 1))),
        Malformed("text", 422, "documents[1]: 'Water use", shows(good, "Water use fell in 2019.")),
        Malformed("text in an object", 422, "documents[0]: holds text", shows({"text": "Water use"})),
        Malformed("an object without a picture", 422, "documents[0]", shows({"page": 3})),
        Malformed("a number as document", 422, "documents[1]", shows(good, 3)),
        Malformed("null as picture", 422, "documents[0].image", shows({"image": None})),
        Malformed("a bare image_url", 422, "documents[0].image_url", shows({"image_url": good})),
        Malformed("an http address", 422, "documents[0]: is an address", shows("http://127.0.0.1:22/page.png")),
        Malformed("an ftp address", 422, "not fetched", shows({"image_url": {"url": "ftp://host/page.png"}})),
        Malformed("a file of the server", 422, "documents[0]", shows("file:///etc/passwd")),
        Malformed("a path upwards", 422, "documents[0]", shows({"image": "../../etc/passwd"})),
        Malformed("no base64", 422, "base64", shows("data:image/png;base64,!!!!")),
        Malformed("percent-encoded data", 422, "base64", shows("data:image/png,%89PNG")),
        Malformed("a PDF as document", 422, "/pages", shows("data:application/pdf;base64,JVBERi0=")),
        Malformed("a drawing that is text", 422, "no picture", shows(data_url(b"<svg xmlns='x'/>"))),
        Malformed("an empty picture", 422, "no picture", shows(data_url(b""))),
        *(
            Malformed(f"half a {kind}", 422, "documents[1]", shows(good, data_url(half(encoded(kind)))))
            for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
        ),
        Malformed("a picture that would fill the memory", 422, "megapixels", shows(bomb)),
        Malformed("a page too long", 422, "too long", shows(data_url(encoded("PNG", (2, 900))))),
        Malformed("top_n of none", 422, "top_n", asked(top_n=0)),
        Malformed("top_n as text", 422, "top_n", asked(top_n="3")),
        Malformed("another model", 404, "model", asked(model="rerank-v3.5")),
        Malformed("a body too large", 413, f"{body_mb:g} MB", b" " * int(body_mb * 1e6 + 1)),
        Malformed("another content type", 415, "Content-Type", asked(), headers={"Content-Type": "text/plain"}),
        Malformed("no content type", 415, "Content-Type", asked(), headers={}),
        Malformed("a compressed body", 415, "Content-Encoding", asked(),
                  headers=JSON | {"Content-Encoding": "gzip"}),
        Malformed("another method", 405, "POST", b"", method="GET"),
        Malformed("another path", 404, "no such path", asked(), path="/v1/rerankk/../%00"),
        Malformed("no PDF", 422, "no PDF", b"hello", "/pages", headers={"Content-Type": "application/pdf"}),
        Malformed("half a PDF", 422, "PDF", b"%PDF-1.7\n1 0 obj <<", "/pages",
                  headers={"Content-Type": "application/pdf"}),
    ]  # fmt: skip


def encoded(kind: str, size: tuple[int, int] = (90, 120), color: str = "red") -> bytes:
    """A picture with some content: one plain colour would still be whole when cut in half."""
    image = Image.effect_noise(size, 60).convert("RGB")
    image.paste(color, (0, 0, size[0], size[1] // 2))
    return saved(image, kind)


def saved(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def bmp_header(width: int, height: int) -> bytes:
    header = [(40, 4), (width, 4), (height, 4), (1, 2), (24, 2), (0, 4), (0, 4), (0, 4), (0, 4), (0, 4), (0, 4)]
    return b"".join(value.to_bytes(size, "little") for value, size in header)


def data_url(picture: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def send_malformed(base_url: str, count: int, kinds: list[Malformed]) -> dict[str, Any]:
    """Sends the kinds in turn. `wrong` lists what was not refused as it must be."""
    statuses: Counter[int] = Counter()
    wrong = []
    with httpx.Client(base_url=base_url, timeout=60, trust_env=False) as client:
        for number in range(count):
            kind = kinds[number % len(kinds)]
            response = client.request(kind.method, kind.path, content=kind.body, headers=kind.headers)
            statuses[response.status_code] += 1
            if (problem := fault(kind, response)) is not None:
                wrong.append(f"{kind.name}: {problem}")
    return {
        "requests": count,
        "kinds": len(kinds),
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        "wrong": wrong,
    }


def fault(kind: Malformed, response: httpx.Response) -> str | None:
    """What is wrong with the answer to a malformed request, if anything."""
    if response.status_code != kind.status:
        return f"status {response.status_code}, not {kind.status}: {response.text[:200]}"
    try:
        error = response.json()["error"]
        message, fields = error["message"], set(error)
    except (ValueError, KeyError, TypeError):
        return f"no error as JSON: {response.text[:200]}"
    if fields != {"message", "type", "param", "code"} or kind.says not in message:
        return f"does not say {kind.says!r}: {error}"
    return None


def good_request(index: int = 0, pages: int = PAGES) -> dict[str, Any]:
    """A question about the first pages of synthetic document number `index`, which no corpus of the demo holds."""
    document = make_document(index, seed=999)
    drawn = [draw_page(page) for page in document.pages[:pages]]
    pictures = [data_url(saved(page, "JPEG"), "image/jpeg") for page in drawn]
    return {"query": document.questions[0]["Q"], "documents": pictures}


def ask_once(base_url: str) -> httpx.Response:
    return httpx.post(f"{base_url}/v1/rerank", json=good_request(), timeout=300, trust_env=False)


async def load(base_url: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """`clients` at once for `seconds`. Latencies in seconds, memory in MiB."""
    bodies = itertools.cycle([json.dumps(good_request(i)).encode() for i in range(QUESTIONS)])
    latencies: list[float] = []
    failures: Counter[int] = Counter()
    memory: list[dict[str, float]] = []
    process = psutil.Process(pid)
    start = time.perf_counter()

    async def one_client(client: httpx.AsyncClient) -> None:
        while time.perf_counter() - start < seconds:
            sent = time.perf_counter()
            response = await client.post("/v1/rerank", content=next(bodies), headers=JSON)
            if response.status_code == 200:
                latencies.append(time.perf_counter() - sent)
            else:
                failures[response.status_code] += 1

    async def watch() -> None:
        while True:
            memory.append(
                {"s": round(time.perf_counter() - start, 1), "mib": round(process.memory_info().rss / 2**20, 1)}
            )
            await asyncio.sleep(seconds / MEMORY_SAMPLES)

    connections = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=base_url, timeout=300, limits=connections, trust_env=False) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one_client(client) for _ in range(clients)))
        watching.cancel()
    took = time.perf_counter() - start
    cuts = statistics.quantiles(latencies, n=100, method="inclusive") if len(latencies) > 1 else latencies * 99
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "pages_a_request": PAGES,
        "answered": len(latencies),
        "failed": {str(status): n for status, n in sorted(failures.items())},
        "requests_a_second": round(len(latencies) / took, 2),
        "p50_s": round(cuts[49], 3),
        "p99_s": round(cuts[98], 3),
        "memory": memory,
    }


@contextmanager
def started_server(checkpoint: str, *overrides: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(base URL, process) of a server that is ready; it is told to stop at the end."""
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
                raise RuntimeError(f"the server ended while it loaded (exit code {server.returncode})")
            time.sleep(0.2)
        yield base_url, server
    finally:
        server.terminate()
        server.wait(60)


def measure(checkpoint: str, clients: int, seconds: float, malformed: int, overrides: list[str]) -> dict[str, Any]:
    """A server of its own under load, then under malformed requests, then asked once more."""
    path = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    with started_server(path, *overrides) as (base_url, server):
        ask_once(base_url).raise_for_status()
        loaded = asyncio.run(load(base_url, server.pid, clients, seconds))
        refused = send_malformed(base_url, malformed, malformed_kinds())
        return {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "server": overrides,
            "load": loaded,
            "malformed": refused,
            "good_request_afterwards": ask_once(base_url).status_code,
            "memory_at_the_end_mib": round(psutil.Process(server.pid).memory_info().rss / 2**20, 1),
        }


def unanswered(measured: dict[str, Any]) -> bool:
    """Whether any request was not answered as it must be."""
    wrong = measured["malformed"]["wrong"] or measured["load"]["failed"]
    return bool(wrong) or measured["good_request_afterwards"] != 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="outputs/demo/distill/model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench/serve.json")
    parser.add_argument("overrides", nargs="*", help="of the server, such as batch_size=16")
    args = parser.parse_args()
    result = measure(args.checkpoint, args.clients, args.seconds, args.malformed, args.overrides)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(json.dumps(result, indent=2))
    if unanswered(result):
        sys.exit("bench_serve: a request was not answered as it must be; see above")


if __name__ == "__main__":
    main()
