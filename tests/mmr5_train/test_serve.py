"""The serve command: its config, startup errors, and a real server process with the tiny model."""

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


def run_serve(*overrides, **environment):
    command = [sys.executable, "-m", "mmr5_train.serve", "port=0", *overrides]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def test_config_file_matches_the_defaults():
    config = compose_stage(ServeConfig, "serve", ["checkpoint=tiny"])
    assert config == ServeConfig(checkpoint="tiny")
    assert compose_stage(ServeConfig, "serve", ["checkpoint=x", "limits.pages=7"]).limits == Limits(pages=7)
    assert compose_stage(ServeConfig, "serve", ["checkpoint=x", "prompt=default"]).prompt is not None
    with pytest.raises(InputError, match=r"limits\.page: no such field; did you mean pages"):
        compose_stage(ServeConfig, "serve", ["checkpoint=x", "+limits.page=7"])
    with pytest.raises(InputError, match="nowhere is not a folder"):
        compose_stage(ServeConfig, "serve", ["checkpoint=x", "folder=nowhere"])


def test_server_exits_if_the_checkpoint_cannot_be_loaded(monkeypatch, capfd):
    def load():
        raise InputError("outputs/typo: no such checkpoint folder")

    monkeypatch.setattr(server, "signal", Mock())  # keep pytest's signal handlers
    with pytest.raises(InputError, match="no such checkpoint folder"):
        server.run(ServeConfig(checkpoint="outputs/typo", port=0), load)
    output = capfd.readouterr()
    assert output.out.startswith("serve: outputs/typo at http://127.0.0.1:")
    assert "Traceback" not in output.err


def test_unusable_address_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port: can't listen at 127\.0\.0\.1:{port} .* another port=…"):
            listen(ServeConfig(checkpoint="x", port=port))
    with pytest.raises(InputError, match=r"host: can't listen at 192\.0\.2\.1:8000"):
        listen(ServeConfig(checkpoint="x", host="192.0.2.1"))


@pytest.mark.parametrize("key", ["", "  ", "two words", "schlüssel"])
def test_unusable_key_is_rejected(monkeypatch, key):
    monkeypatch.setenv(API_KEY, key)
    with pytest.raises(InputError) as error:
        read_key()
    assert not key.strip() or key not in str(error.value)


def test_missing_extra_is_reported(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    process = run_serve("checkpoint=tiny", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert process.returncode == 2
    assert process.stderr.strip() == "error: serve needs uvicorn: in the checkout, pip install '.[serve]'"


def test_serves_a_checkpoint_and_stops_on_sigterm(guessing_model, page_folder):
    options = ("name=guesser", f"folder={page_folder}", "max_new_tokens=24")
    with bench_serve.started_server(str(guessing_model), *options) as (url, process):
        body = bench_serve.valid_request(pages=2) | {"model": "guesser", "return_reasoning": True}
        body["documents"].append({"image": "page-0.png"})
        response = httpx.post(f"{url}/v1/rerank", json=body, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        ranked = response.json()
        assert sorted(result["index"] for result in ranked["results"]) == [0, 1, 2]
        assert ranked["reasoning"].strip() == "so it shows"
        assert ranked["usage"]["total_tokens"] > 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout.read() == "serve: stopped\n"
