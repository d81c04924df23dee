"""Answers of a paid teacher: none is lost, none is paid for twice, and the cost stays within the budget."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sample_tasks import file_bytes, make_config, make_data, skipped
from servers import Reply, ScriptedServer, completion

from data_construction.teacher.store import Answer, AnswerStore
from data_construction.traces import TracesStage, main
from mmr5_train.common.config import CONFIGS
from mmr5_train.common.files import InputError, read_manifest, read_records
from mmr5_train.ranking.records import Trace

ROOT = CONFIGS.parent
OPENAI = ("teacher=openai", "teacher.model=m", "teacher.attempts=2")


def openai_config(data: Path, out: Path, *overrides: str) -> TracesStage:
    return make_config(data, out, *OPENAI, *overrides)


def start_stage(data: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    """Starts the stage in a new process."""
    command = [sys.executable, "-m", "data_construction.traces", f"data='{data}'", f"out='{out}'", *OPENAI]
    return subprocess.Popen(
        [*command, *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, and so the tests, with SIGINT ignored, which child processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def answer_with_usage(body: dict[str, Any]) -> Reply:
    """An answer that depends only on the request, with token usage."""
    text = body["messages"][1]["content"][-1]["text"]
    if "Notes, a page a line" in text:
        named = text.partition("why ")[2].partition(" can help")[0]
        reply = completion(f"{named} can help.")
    else:
        reply = completion(f"A chart.\nVerdict: {'helps' if 'is of use' in text else 'does not help'}")
    reply.body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 20}
    return reply


def request_counts(server: ScriptedServer) -> Counter[str]:
    return Counter(json.dumps(request) for request in server.requests)


def test_resumed_run_writes_the_same_bytes(scripted_server: ScriptedServer, tmp_path: Path):
    data, out = make_data(tmp_path / "data", questions=5), tmp_path / "out"
    config = openai_config(data, out, "refine=true", "teacher.concurrency=2")
    refused = Reply(401, {"error": {"message": "expired: sk-secret-0123456789"}})
    scripted_server.script = lambda number, body: answer_with_usage(body) if number < 11 else refused
    with pytest.raises(
        InputError, match=r"refuses the key(.|\n)*stored in .*out\.answers\.sqlite; run the same"
    ) as caught:
        main(config)
    assert "sk-secret" not in str(caught.value)
    assert not (out / "traces.jsonl").exists()
    with pytest.raises(InputError, match="did not finish"):
        read_manifest(out)

    first_requests = scripted_server.requests[:11]
    scripted_server.requests = []
    scripted_server.script = lambda number, body: answer_with_usage(body)
    main(config)
    assert len(scripted_server.requests) == 5 * 5 - len(first_requests)
    assert not request_counts(scripted_server) & Counter(json.dumps(request) for request in first_requests)
    completed = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(read_records(out / "traces.jsonl", Trace)) == 5

    shutil.rmtree(out)
    (tmp_path / "out.answers.sqlite").unlink()
    main(config)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == completed
    assert read_manifest(out)["counts"]["teacher"] == {
        "answers": 25,
        "prompt_tokens": 25_000,
        "completion_tokens": 500,
    }


def test_rerun_of_a_finished_run_sends_no_requests(scripted_server: ScriptedServer, tmp_path: Path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    scripted_server.script = lambda number, body: answer_with_usage(body)
    main(openai_config(data, out))
    first = file_bytes(out)
    with pytest.raises(InputError, match="is not empty"):
        main(openai_config(data, out))
    main(openai_config(data, out, "overwrite=true"))
    assert file_bytes(out) == first
    main(openai_config(data, tmp_path / "refined", "refine=true", f"answers='{tmp_path / 'out.answers.sqlite'}'"))
    assert len(scripted_server.requests) == 12 + 3  # the notes are stored, three refinements are not
    assert max(request_counts(scripted_server).values()) == 1


def test_store_with_other_settings_raises(scripted_server: ScriptedServer, tmp_path: Path):
    data, out = make_data(tmp_path / "data", questions=1), tmp_path / "out"
    scripted_server.script = lambda number, body: answer_with_usage(body)
    main(openai_config(data, out))
    other = ("teacher.temperature=1", f"answers='{tmp_path / 'out.answers.sqlite'}'")
    with pytest.raises(InputError, match=r"contains 4 answers .*\n  temperature: 0.0 in the store, 1.0 now\n"):
        main(openai_config(data, tmp_path / "other", *other))
    assert len(scripted_server.requests) == 4
    main(openai_config(data, tmp_path / "other", *other, "overwrite=true"))
    assert len(scripted_server.requests) == 8
    main(openai_config(data, out, "overwrite=true"))
    assert len(scripted_server.requests) == 8


def test_stored_answers_to_prompts_without_a_verdict_line_are_not_used(
    scripted_server: ScriptedServer, tmp_path: Path
):
    """Earlier versions asked for a note that closes with its verdict."""
    data = make_data(tmp_path / "data", questions=1)
    store = AnswerStore(tmp_path / "old.sqlite")
    values = make_config(data, tmp_path / "out", *OPENAI).teacher.model_dump()
    earlier = {name: values[name] for name in ("model", "max_tokens", "temperature", "max_pixels", "system")}
    store.register_settings({**earlier, "can_help": 'Why? Close with "so it helps."', "max_words": 40}, False)
    store.put("key", "m", Answer("A chart, so it helps.", "stop", 1, 1))
    store.close()
    scripted_server.script = lambda number, body: answer_with_usage(body)
    answers = f"answers='{tmp_path / 'old.sqlite'}'"
    with pytest.raises(
        InputError, match=r"contains 1 answers (.|\n)*\n  verdict: null in the store, \"Then state"
    ):
        main(openai_config(data, tmp_path / "out", answers))
    main(openai_config(data, tmp_path / "out", answers, "overwrite=true"))
    assert len(scripted_server.requests) == 4


def test_resume_after_kill_at_random_moments(tmp_path: Path):
    """A small run of `make bench-data`."""
    command = [sys.executable, ROOT / "scripts/benchmarks/bench_data.py", "--rows", "faults", "--questions", "24"]
    out = tmp_path / "bench.json"
    completed = subprocess.run(
        [*command, "--kills", "3", "--delay", "0.02", "--timeout", "2", "--out", out],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["traces"] == row["questions"] == 24
    assert row["same_bytes"]
    assert row["paid_twice"] == 0
    assert row["stored"] == 24 * 6
    assert sum(row["faults"].values()) > 10


def test_two_processes_share_a_store(scripted_server: ScriptedServer, tmp_path: Path):
    data = make_data(tmp_path / "data", questions=6)
    scripted_server.script = lambda number, body: answer_with_usage(body)._replace(delay=0.1)
    store = f"answers='{tmp_path / 'shared.sqlite'}'"
    runs = [start_stage(data, tmp_path / name, store, "teacher.concurrency=3") for name in "ab"]
    for run in runs:
        _, stderr = run.communicate(timeout=120)
        assert run.returncode == 0, stderr
    assert len(scripted_server.requests) == 24
    assert max(request_counts(scripted_server).values()) == 1
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


def test_interrupt_waits_for_calls_in_flight(scripted_server: ScriptedServer, tmp_path: Path):
    data, out = make_data(tmp_path / "data", questions=6), tmp_path / "out"
    scripted_server.script = lambda number, body: answer_with_usage(body)._replace(delay=1.0)
    run = start_stage(data, out, "teacher.concurrency=4")
    while len(scripted_server.requests) < 4:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    printed, stderr = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "run the same command again to continue" in printed
    assert "Traceback" not in stderr
    assert AnswerStore(tmp_path / "out.answers.sqlite").count() == len(scripted_server.requests) == 4


def test_budget_stops_the_run_and_a_higher_one_resumes_it(scripted_server: ScriptedServer, tmp_path: Path):
    data, out = make_data(tmp_path / "data", questions=5), tmp_path / "out"
    scripted_server.script = lambda number, body: answer_with_usage(body)._replace(delay=0.02)
    priced = ("+teacher.prices={m:{input:10,output:100,pixels_per_token:1}}", "teacher.max_tokens=100")
    with pytest.raises(
        InputError, match=r"teacher.max_cost_usd=0.1 is reached: .*raise the limit(.|\n)*stored in"
    ):
        main(openai_config(data, out, *priced, "teacher.max_cost_usd=0.1"))
    answers = len(scripted_server.requests)
    assert 4 <= answers <= 8  # an answer costs $0.012; more is reserved for each call
    assert AnswerStore(tmp_path / "out.answers.sqlite").count() == answers
    main(openai_config(data, out, *priced, "teacher.max_cost_usd=1"))
    assert len(scripted_server.requests) == 20


def test_budget_without_price_raises(scripted_server: ScriptedServer, tmp_path: Path):
    data = make_data(tmp_path / "data", questions=1)
    with pytest.raises(InputError, match=r"teacher.prices has no 'm': add its price"):
        main(openai_config(data, tmp_path / "out", "teacher.max_cost_usd=1"))
    assert scripted_server.requests == []


def test_dry_run_needs_no_key_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data = make_data(tmp_path / "data", questions=5)
    prices = "+teacher.prices={m:{input:2,output:8,pixels_per_token:100}}"
    main(openai_config(data, tmp_path / "out", "dry_run=true", "refine=true", prices))
    printed = capsys.readouterr().out
    assert "dry run: 5 of 5 questions" in printed
    lines = dict(line.split("  ", 1) for line in printed.splitlines()[1:])
    values = {name: line.strip() for name, line in lines.items()}
    assert values["calls"] == "25"
    assert values["image tokens"].startswith("240 (")  # 20 pages of 30 × 40 pixels
    output = 20 * (60 + 6) + 5 * 120  # a verdict has 6 tokens
    assert values["output tokens"] == f"{output:,}"
    tokens = 240 + int(values["text tokens"].replace(",", ""))
    assert values["cost"].startswith(f"${(tokens * 2 + output * 8) / 1e6:.2f} at")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_note_that_fails_a_check_is_requested_again(scripted_server: ScriptedServer, tmp_path: Path):
    def fail_first_check(number: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][1]["content"][-1]["text"]
        verdict = "helps" if "is of use" in text else "does not help"
        if "document 0?" in text and "Your last reply" not in text:
            return completion(f"As image 9 says.\nVerdict: {verdict}")
        if "document 1?" in text:
            return completion(f"A chart, as the ground truth says.\nVerdict: {verdict}")
        return answer_with_usage(body)

    scripted_server.script = fail_first_check
    data = make_data(tmp_path / "data", questions=3)
    main(openai_config(data, tmp_path / "once"))
    assert {skip.reason for skip in skipped(tmp_path / "once")} == {"check moved_ids", "check no_label_words"}
    scripted_server.requests = []
    store = f"answers='{tmp_path / 'once.answers.sqlite'}'"
    main(openai_config(data, tmp_path / "twice", store, "second_try=true"))
    again = [request["messages"][1]["content"][-1]["text"] for request in scripted_server.requests]
    assert len(again) == 8  # four notes each of two questions; the first tries are in the store
    assert sum("Your last reply called an image by a number" in text for text in again) == 4
    assert [skip.query_id for skip in skipped(tmp_path / "twice")] == ["q1"]
    assert read_manifest(tmp_path / "twice")["counts"]["teacher"]["second_try"] == 8
