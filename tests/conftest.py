"""Shared fixtures: the tiny model, some pages and records, test checkpoints, and HTTP servers."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, settings
from PIL import Image
from servers import RECITED, THOUGHT, OpenAIServer, ScriptedServer

from mmr5_train.common.files import write_records
from mmr5_train.models.loading import TINY, ModelConfig, load_processor
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Candidate, PageId, RankingTask, Trace

ROOT = Path(__file__).resolve().parents[1]

# Property-based tests use the same examples in each run and do not fail on a slow machine.
settings.register_profile("project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

SLOW_FILES = (
    "test_shared_grpo.py",
    "test_recipe.py",
    "test_wheel.py",
    "test_sft.py",
    "test_checkpoints.py",
    "test_callbacks.py",
    "test_resume.py",
    "test_bench_gpu.py",
    "test_bench_grpo.py",
    "test_check_docs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slow files first, so that the two test processes finish at about the same time."""
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((ROOT / "configs/model/tiny.yaml").read_text()))


@pytest.fixture(scope="session")
def prompt() -> Prompt:
    return Prompt.model_validate(yaml.safe_load((ROOT / "configs/prompt/default.yaml").read_text()))


@pytest.fixture(scope="session")
def processor(tiny: ModelConfig) -> Any:
    return load_processor(tiny)


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Any:
    """The real tokenizer of Qwen2.5. Skips the test if its files are missing."""
    from standin import tokenizer_folder
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer_folder())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2.5-VL with the real tokenizer. Skips the test if the tokenizer files are missing."""
    return _standin(tmp_path_factory.mktemp("standin"), "qwen2_5_vl")


@pytest.fixture(scope="session")
def qwen3_standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3-VL with the real tokenizer, in which `<think>` and `</think>` are single tokens."""
    return _standin(tmp_path_factory.mktemp("qwen3-standin"), "qwen3_vl")


def _standin(folder: Path, family: Literal["qwen2_5_vl", "qwen3_vl"]) -> Path:
    from standin import write_standin

    try:
        return write_standin(folder, family)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def page_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six pages of different colors: page-0.png … page-5.png."""
    folder = tmp_path_factory.mktemp("pages")
    for i, color in enumerate(("red", "green", "blue", "orange", "purple", "grey")):
        Image.new("RGB", (600, 800), color).save(folder / f"page-{i}.png")
    return folder


@pytest.fixture(scope="session")
def tasks() -> list[RankingTask]:
    """Four questions with three candidates each. Their images are in `page_folder`."""
    tasks = []
    for k, content in enumerate(("red bar chart", "green table", "blue pie chart", "grey line chart")):
        pages = [(k + i) % 6 for i in range(3)]
        candidates = [
            Candidate(doc_name="doc", page=p, image=f"page-{p}.png", score=-i) for i, p in enumerate(pages)
        ]
        tasks.append(
            RankingTask(
                query_id=f"doc/{k}",
                query=f"Which page shows a {content} about water use?",
                domain="Guidebook",
                candidates=tuple(candidates),
                positives=(PageId(doc_name="doc", page=k),),
            )
        )
    return tasks


@pytest.fixture
def questions(tasks, page_folder):
    """The path of questions.jsonl, a file of `tasks` in the page folder."""
    write_records(page_folder / "questions.jsonl", tasks)
    return page_folder / "questions.jsonl"


@pytest.fixture
def traces(tasks, page_folder):
    """The path of traces.jsonl in the page folder, with one trace per task."""
    records = []
    for task in tasks:
        shown = task.in_prompt_order("shuffled").shown
        relevant = next(i for i, page in enumerate(shown, 1) if page.id in task.positives)
        notes = [format_note("a page", i == relevant) for i in range(1, 4)]
        answer = [relevant, *(i for i in (1, 2, 3) if i != relevant)]
        records.append(
            Trace(
                query_id=task.query_id,
                query=task.query,
                domain=task.domain,
                shown=shown,
                notes=notes,
                think=join_notes(notes),
                answer=answer,
                positive_ids=[relevant],
            )
        )
    write_records(page_folder / "traces.jsonl", records)
    return page_folder / "traces.jsonl"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@pytest.fixture(scope="session")
def openai_server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[OpenAIServer]:
    """A running `transformers serve`. If a test fails, the end of its log is printed."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    failed_before = request.session.testsfailed
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
        yield OpenAIServer(f"http://127.0.0.1:{port}/v1", str(TINY))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        if request.session.testsfailed > failed_before:
            print(f"\nend of the log of transformers serve:\n{log.read_text()[-4000:]}")


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, timeout: float = 300) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with direct.open(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"transformers serve is not ready (exit code {server.poll()}):\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def reciting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that generates "<think>THOUGHT</think>RECITED" for every prompt."""
    return write_reciting_model(tmp_path_factory.mktemp("reciting"), [f"<think>{THOUGHT}</think>{RECITED}"])


@pytest.fixture(scope="session")
def guessing_model(tmp_path_factory: pytest.TempPathFactory, prompt: Prompt) -> Path:
    """A checkpoint with the files that sft writes. It answers page 1, 2 or 3, each with the same probability."""
    from mmr5_train.models.loading import SETTINGS, RerankerSettings

    folder = tmp_path_factory.mktemp("guessing")
    write_reciting_model(folder, [f"<think>{THOUGHT}</think><answer>[{i}]</answer>" for i in (1, 2, 3)])
    settings = RerankerSettings(min_pixels=784, max_pixels=9500, dtype="float32", think=True, prompt=prompt)
    (folder / SETTINGS).write_text(settings.model_dump_json())
    return folder


def write_reciting_model(folder: Path, replies: list[str]) -> Path:
    """Writes a checkpoint that generates one of `replies`, each with the same probability.

    It has the tiny model's architecture, tokenizer and template, with handmade weights: the layers add nothing,
    so the next token depends only on the last one, and a reply is a chain of tokens. Therefore no token may
    occur twice in a reply.
    """
    import torch
    from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(TINY)
    config = AutoConfig.from_pretrained(TINY)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = Qwen2_5_VLForConditionalGeneration(config)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
    )
    start = len(processor.tokenizer(prompt)["input_ids"]) - 1
    followers: dict[int, set[int]] = {}
    for reply in replies:
        chain = processor.tokenizer(f"{prompt}{reply}<|im_end|>")["input_ids"][start:]
        assert len(set(chain[:-1])) == len(chain) - 1, (
            f"a token occurs twice in {processor.tokenizer.tokenize(reply)}"
        )
        for last, following in itertools.pairwise(chain):
            followers.setdefault(last, set()).add(following)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        tokens, head = model.get_input_embeddings().weight.zero_(), model.get_output_embeddings().weight.zero_()
        for k, (last, following) in enumerate(followers.items()):
            tokens[last, k], head[list(following), k] = 1, 50
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def scripted_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """An OpenAI-compatible server with scripted replies and faults. The environment variables point to it."""
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
