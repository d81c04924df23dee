"""Tests of the wheel: installs it into a fresh environment, and runs its commands in an empty folder.

A .pth file in the fresh environment lists the site-packages of the running environment, so nothing is downloaded.
The checkout is not importable, although it may be installed in editable mode: Python ignores .pth files in folders
that a .pth file lists. `make test-wheel` installs the wheel with its dependencies and runs the demo.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import httpx
import pytest

from mmr5_train.common.cli import MODULES
from mmr5_train.common.files import read_manifest

ROOT = Path(__file__).resolve().parents[1]


def build(target, source, out):
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder in an unrelated git repository."""
    repository = tmp_path_factory.mktemp("repository")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "init", "--quiet"], cwd=repository, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "x"], cwd=repository, check=True)
    (repository / "empty").mkdir()
    return repository / "empty"


@pytest.fixture(scope="module")
def start(wheel, folder):
    """A function that starts a program of the fresh environment in the empty folder."""
    venv = folder.parent / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": venv, "platbase": venv}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", venv, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(program, *arguments):
        command = [venv / "bin" / program, *arguments]
        return subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return call


@pytest.fixture(scope="module")
def run(start):
    """A function that runs a program like `start` and returns its output. It fails if the program fails."""

    def call(program, *arguments):
        process = start(program, *arguments)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0, err[-3000:]
        return out

    return call


def test_wheel_contains_all_tracked_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {
        "mmr5_train": "mmr5_train",
        "data_construction": "data_construction",
        "configs": "mmr5_train/configs",
    }
    for source, target in folders.items():
        tracked = subprocess.run(["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {target + path.removeprefix(source) for path in tracked.stdout.split()} <= names
    assert {name.partition("/")[0] for name in names} == {
        "mmr5_train", "data_construction", "mmr5_train-0.1.0.dist-info"
    }  # fmt: skip


def test_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    rebuilt = build("wheel", source, tmp_path / "rebuilt")
    assert zipfile.ZipFile(rebuilt).namelist() == zipfile.ZipFile(wheel).namelist()


def test_checkout_is_not_importable(run, folder):
    code = "import data_construction as d, mmr5_train.common.config as c; print(d.__file__, c.__file__, c.CONFIGS)"
    paths = run("python", "-c", code).split()
    assert all(path.startswith(f"{folder.parent}/.venv/lib/") for path in paths)


def test_each_command_shows_its_help(run):
    help_text = run("mmr5", "--help")
    assert all(f"\n  {command} " in help_text for command in MODULES)
    code = """
from mmr5_train.common.cli import MODULES, main
for command in MODULES:
    try:
        main([command, "--help"])
    except SystemExit as error:
        assert not error.code, command
"""
    help_texts = run("python", "-c", code)  # in one process: most commands load torch
    assert re.findall(r"^(\w+) is powered by Hydra", help_texts, re.MULTILINE) == [
        module.rpartition(".")[2] if command != "data-report" else "data_report"
        for command, module in MODULES.items()
    ]


def test_stage_writes_its_output(run, folder):
    run("mmr5", "synthetic", "documents=2", "workers=1", "out=corpus")
    manifest = read_manifest(folder / "corpus")
    assert manifest["counts"]["documents"] == 2
    assert manifest["code"] == "0.1.0"  # not the commit of the repository that contains the folder


def test_user_options_are_read(run, folder):
    teacher = folder / "user_configs" / "teacher" / "mine.yaml"
    teacher.parent.mkdir(parents=True)
    teacher.write_text("defaults: [extractive, _self_]\nhelps: 'Mine: {quote}'\n", encoding="utf-8")
    printed_config = run(
        "mmr5", "traces", "--config-dir", "user_configs", "teacher=mine", "--cfg", "job", "--package", "teacher"
    )
    assert "helps: 'Mine: {quote}'" in printed_config


def test_reranker_ranks_pages(run):
    code = """
from PIL import Image
from mmr5_train import Reranker
pages = [Image.new("RGB", (84, 112), color) for color in ("red", "white")]
ranked = Reranker("tiny", max_new_tokens=32).rank("a red bar chart", pages)
print(len(ranked))
"""
    assert run("python", "-c", code).split()[-1] == "2"


def test_server_loads_the_model_and_serves_its_page(start):
    process = start("mmr5", "serve", "checkpoint=tiny", "port=0")
    try:
        line = process.stdout.readline()
        address = re.search(r"http://\S+:\d+", line)
        assert address, process.stderr.read()
        deadline = time.monotonic() + 300
        while (response := httpx.get(f"{address[0]}/health", trust_env=False, timeout=60)).status_code != 200:
            assert time.monotonic() < deadline, response.text
            time.sleep(0.2)
        assert response.json()["status"] == "ready"
        page = httpx.get(address[0], trust_env=False, timeout=60)  # its templates are in the wheel
        assert "<html" in page.text
    finally:
        process.terminate()
        process.communicate(timeout=60)
