"""Batch endpoints: every answer is stored, none is lost or paid for twice, whatever the server does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_server import BatchServer
from bench_data import stored_texts
from sample_tasks import file_bytes, make_config, make_data

from data_construction.teacher import batches
from data_construction.teacher.store import AnswerStore
from data_construction.traces import TracesStage, main
from mmr5_train.common.config import CONFIGS
from mmr5_train.common.files import InputError, read_manifest, read_records
from mmr5_train.ranking.records import Trace

BATCH = (
    "teacher=openai",
    "teacher.model=m",
    "teacher.batch=true",
    "teacher.batch_poll=0.05",
    "teacher.max_wait=1",
)
MakeServer = Callable[..., BatchServer]


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeServer]:
    """Starts a batch server, and sets the environment variables to it."""
    servers = []

    def start(delay: float = 0.2, faults: float = 0.0, seed: int = 0) -> BatchServer:
        server = BatchServer(0, delay, faults, seed)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        return server

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr(batches, "IDLE_SECONDS", 0.2)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def batch_config(data: Path, out: Path, *overrides: str) -> TracesStage:
    return make_config(data, out, *BATCH, *overrides)


def online_bytes(data: Path, out: Path, *overrides: str) -> dict[str, bytes]:
    """What the stage writes without batches."""
    main(make_config(data, out, "teacher=openai", "teacher.model=m", *overrides))
    return traces_bytes(out)


def traces_bytes(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in file_bytes(out).items() if name in ("traces.jsonl", "skipped.jsonl")}


def test_a_batch_gives_the_traces_of_single_requests(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server()
    data = make_data(tmp_path / "data", questions=6)
    main(batch_config(data, tmp_path / "out", "refine=true"))
    # The first request is sent by itself; then the pages' notes are one batch, and the refinements another.
    assert server.counts == {"online": 1, "batches": 2}
    assert server.answers.total() == 6 * 5
    assert max(server.answers.values()) == 1
    assert read_manifest(tmp_path / "out")["counts"]["teacher"]["answers"] == 30
    assert traces_bytes(tmp_path / "out") == online_bytes(data, tmp_path / "online", "refine=true")


@pytest.mark.parametrize("limit", ["requests", "bytes"])
def test_large_files_are_split(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    server = make_server()
    name, value = ("MAX_REQUESTS", 5) if limit == "requests" else ("MAX_BYTES", 10_000)
    monkeypatch.setattr(batches, name, value)
    data = make_data(tmp_path / "data", questions=6)
    main(batch_config(data, tmp_path / "out"))
    assert len(read_records(tmp_path / "out/traces.jsonl", Trace)) == 6
    assert server.counts["batches"] >= 5
    if limit == "bytes":
        assert max(len(data) for data in server.files.values() if b'"url": "/v1' in data) <= 10_000


@pytest.mark.parametrize("seed", range(3))
def test_faults_of_the_server_lose_nothing(make_server: MakeServer, tmp_path: Path, seed: int) -> None:
    server = make_server(faults=0.3, seed=seed)
    data = make_data(tmp_path / "data", questions=8)
    main(batch_config(data, tmp_path / "out", "refine=true", "teacher.attempts=20"))
    assert sum(server.counts[kind] for kind in ("error", "missing", "empty")) >= 3
    paid, unclear = server.answers.total(), server.counts["reset_after"]
    server.fault_rate = 0
    assert traces_bytes(tmp_path / "out") == online_bytes(data, tmp_path / "online", "refine=true")
    # A single request whose reply is lost is paid for again, but no batch is.
    assert 8 * 5 <= paid <= 8 * 5 + unclear
    assert len({b["metadata"]["mmr5"] for b in server.batches.values()}) == len(server.batches)


def test_a_batch_that_the_server_refuses_ends_the_run(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server()
    server.refused = "Enqueued token limit reached"
    data = make_data(tmp_path / "data")
    with pytest.raises(InputError, match=r"refuses the batch batch-0 \(Enqueued token limit reached\)"):
        main(batch_config(data, tmp_path / "out"))
    server.refused = None
    main(batch_config(data, tmp_path / "out"))
    assert max(server.answers.values()) == 1


def test_a_refused_first_request_does_not_hold_up_the_others(make_server: MakeServer, tmp_path: Path) -> None:
    make_server().moderates_first = True
    main(batch_config(make_data(tmp_path / "data", questions=4), tmp_path / "out"))
    assert len(read_records(tmp_path / "out/traces.jsonl", Trace)) == 3


def test_a_server_without_batch_endpoints_is_an_error(make_server: MakeServer, tmp_path: Path) -> None:
    make_server().has_batches = False
    config = batch_config(make_data(tmp_path / "data"), tmp_path / "out")
    with pytest.raises(
        InputError, match=r"teacher\.batch=true needs a server with the endpoints /files and /batches"
    ):
        main(config)


def test_batches_of_another_server_are_an_error(make_server: MakeServer, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    store = AnswerStore(tmp_path / "out.answers.sqlite")
    store.begin_batch(batches.StoredBatch("token", "http://other:1/v1", "batch-1", {"key": 5}), "m")
    store.close()
    make_server()
    config = batch_config(data, tmp_path / "out")
    with pytest.raises(InputError, match="1 requests wait in a batch on http://other:1/v1, but OPENAI_BASE_URL"):
        main(config)


def test_a_budget_counts_half_the_price(make_server: MakeServer, tmp_path: Path) -> None:
    prices = "+teacher.prices={m:{input:2,output:8}}"
    config = batch_config(make_data(tmp_path / "data"), tmp_path / "out", prices)
    assert config.teacher.price is not None  # type: ignore[union-attr]
    assert config.teacher.price.dollars(1e6, 1e6) == 5  # type: ignore[union-attr]


def start_stage(data: Path, out: Path) -> subprocess.Popen[bytes]:
    code = "from data_construction.teacher import batches; batches.IDLE_SECONDS = 0.2; "
    code += "from data_construction.traces import TracesStage, main; "
    code += "from mmr5_train.common.config import run_stage; run_stage(main, TracesStage, 'traces')"
    command = [sys.executable, "-c", code, f"data='{data}'", f"out='{out}'", *BATCH, "refine=true"]
    return subprocess.Popen(command, cwd=CONFIGS.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_killed_run_continues_with_its_batches(make_server: MakeServer, tmp_path: Path) -> None:
    """Kills at random moments: while the files are written, sent, created and answered.

    A kill can lose the answer to a single request that is on its way. No stored answer may be requested again, and
    no answer may come in two batches.
    """
    server = make_server(delay=1.0)
    data = make_data(tmp_path / "data", questions=12)
    rng, sent_when_stored, killed = random.Random(0), dict[str, int](), 0
    for moment in ("file", "batch", "random", "answer"):
        stage = start_stage(data, tmp_path / "out")
        counted: Any = {"file": server.files, "batch": server.batches, "answer": server.answers}.get(moment)
        if counted is None:
            time.sleep(2 + rng.random())
        else:
            before, end = len(counted), time.monotonic() + 30
            while len(counted) <= before and stage.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
        stage.kill()
        killed += stage.wait() == -signal.SIGKILL
        stored = stored_texts(tmp_path / "out.answers.sqlite")
        sent_when_stored = {text: server.answers[text] for text in stored} | sent_when_stored
    assert killed >= 3
    if not json.loads((tmp_path / "out" / "manifest.json").read_text())[
        "finished"
    ]:  # a fast machine may finish it
        stage = start_stage(data, tmp_path / "out")
        _, stderr = stage.communicate(timeout=120)
        assert stage.returncode == 0, stderr[-2000:]
    assert max(server.batched.values()) == 1
    assert {text: server.answers[text] for text in sent_when_stored} == sent_when_stored
    assert len(server.answers) == 12 * 5
    os.environ["OPENAI_BASE_URL"] = server.base_url
    assert traces_bytes(tmp_path / "out") == online_bytes(data, tmp_path / "online", "refine=true")
