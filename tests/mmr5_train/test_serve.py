"""The command: a real server process around the tiny model, what it refuses to start with, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import bench_serve
import httpx
import pytest

from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError
from mmr5_train.serving import server
from mmr5_train.serving.server import listen, read_key
from mmr5_train.serving.settings import API_KEY, Limits, ServeConfig

ROOT = Path(__file__).resolve().parents[2]


def serve(*overrides, **environment):
    command = [sys.executable, "-m", "mmr5_train.serve", "port=0", *overrides]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def test_the_config_file_holds_the_defaults():
    config = compose_stage(ServeConfig, "serve", ["checkpoint=tiny"])
    assert config == ServeConfig(checkpoint="tiny")
    assert compose_stage(ServeConfig, "serve", ["checkpoint=x", "limits.pages=7"]).limits == Limits(pages=7)
    assert compose_stage(ServeConfig, "serve", ["checkpoint=x", "prompt=default"]).prompt is not None
    with pytest.raises(InputError, match=r"limits\.page: no such field; did you mean pages"):
        compose_stage(ServeConfig, "serve", ["checkpoint=x", "+limits.page=7"])
    with pytest.raises(InputError, match="nowhere is no folder"):
        compose_stage(ServeConfig, "serve", ["checkpoint=x", "folder=nowhere"])


def test_a_checkpoint_that_is_none_ends_the_server(monkeypatch, capfd):
    def load():
        raise InputError("outputs/typo: no such checkpoint folder")

    monkeypatch.setattr(server, "signal", Mock())  # the handlers of the test run stay
    with pytest.raises(InputError, match="no such checkpoint folder"):
        server.run(ServeConfig(checkpoint="outputs/typo", port=0), load)
    said = capfd.readouterr()
    assert said.out.startswith("serve: outputs/typo at http://127.0.0.1:")
    assert "Traceback" not in said.err


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port: 127\.0\.0\.1:{port} can't be listened at .* another port=…"):
            listen(ServeConfig(checkpoint="x", port=port))
    with pytest.raises(InputError, match=r"host: 192\.0\.2\.1:8000"):
        listen(ServeConfig(checkpoint="x", host="192.0.2.1"))


@pytest.mark.parametrize("key", ["", "  ", "two words", "schlüssel"])
def test_a_key_that_is_none_is_not_taken(monkeypatch, key):
    monkeypatch.setenv(API_KEY, key)
    with pytest.raises(InputError) as refused:
        read_key()
    assert not key.strip() or key not in str(refused.value)


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    ended = serve("checkpoint=tiny", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.returncode == 2
    assert ended.stderr.strip() == "error: serve needs uvicorn: in the checkout, pip install '.[serve]'"


def test_a_trained_checkpoint_is_served_and_stops_when_told(guessing_model, page_folder):
    options = ("name=guesser", f"folder={page_folder}", "max_new_tokens=24")
    with bench_serve.started_server(str(guessing_model), *options) as (url, process):
        body = bench_serve.good_request(pages=2) | {"model": "guesser", "return_reasoning": True}
        body["documents"].append({"image": "page-0.png"})
        answered = httpx.post(f"{url}/v1/rerank", json=body, timeout=60, trust_env=False)
        assert answered.status_code == 200, answered.text
        ranked = answered.json()
        assert sorted(result["index"] for result in ranked["results"]) == [0, 1, 2]
        assert ranked["reasoning"].strip() == "so it shows"
        assert ranked["usage"]["total_tokens"] > 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout.read() == "serve: stopped\n"
