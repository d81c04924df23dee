"""The container file: what it copies exists, it runs as another user than root, and its command composes."""

import json
import re
from pathlib import Path

from mmr5_train.common.config import compose_stage
from mmr5_train.serving.settings import ServeConfig

ROOT = Path(__file__).resolve().parents[1]
LINES = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()
INSTRUCTIONS = [line.split(None, 1) for line in LINES if line and not line.startswith("#")]


def arguments(name):
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def test_copied_files_exist_and_are_sent_to_the_builder():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    for copy in arguments("COPY"):
        *sources, _target = copy.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore


def test_the_base_can_be_chosen_and_is_pinned():
    assert [name for name, _ in INSTRUCTIONS[:2]] == ["ARG", "FROM"]
    assert arguments("FROM") == ["${BASE}"]
    assert re.fullmatch(r"BASE=\S+:[\w.-]+", arguments("ARG")[0])
    assert "latest" not in arguments("ARG")[0]


def test_the_server_does_not_run_as_root_and_installs_pinned_packages():
    names = [name for name, _ in INSTRUCTIONS]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert arguments("USER") == ["mmr5"]
    [install] = [run for run in arguments("RUN") if "pip install" in run]
    assert "--no-cache-dir" in install
    assert "--constraint constraints.txt" in install


def test_the_command_composes():
    command = json.loads(arguments("ENTRYPOINT")[0])
    assert command[:2] == ["mmr5", "serve"]
    config = compose_stage(ServeConfig, "serve", command[2:])
    assert (config.host, config.checkpoint) == ("0.0.0.0", "/model")
    assert str(config.port) in arguments("EXPOSE")
    [health] = arguments("HEALTHCHECK")
    assert f"127.0.0.1:{config.port}/health" in health
