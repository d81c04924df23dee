"""The two constraints files hold versions that the project's requirements allow."""

import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "extra": "vllm"}


def pins(name):
    """Package → its version for Python 3.11 on Linux."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    parsed = [Requirement(line) for line in lines]
    return {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in parsed
        if pin.marker is None or pin.marker.evaluate(ENVIRONMENT)
    }


def project_requirements(*extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in project["dependencies"] + optional]


@pytest.mark.parametrize(
    ("name", "extras"), [("constraints.txt", ["serve", "quantize"]), ("constraints-vllm.txt", ["vllm"])]
)
def test_every_requirement_has_a_version_that_it_allows(name, extras):
    pinned = pins(name)
    requirements = project_requirements(*extras)
    if "vllm" in extras:  # what TRL requires of vLLM, besides
        requirements += [
            requirement
            for requirement in map(Requirement, requires("trl") or [])
            if requirement.name == "vllm" and requirement.marker and requirement.marker.evaluate(ENVIRONMENT)
        ]
        assert requirements[-1].name == "vllm"
    unmet = [
        f"{requirement}: found {pinned.get(canonicalize_name(requirement.name))}"
        for requirement in requirements
        if not requirement.specifier.contains(
            pinned.get(canonicalize_name(requirement.name), "0"), prereleases=True
        )
    ]
    assert unmet == []


@pytest.mark.long
def test_the_extra_vllm_resolves_to_its_constraints(tmp_path):
    """Asks the package index, so it is skipped without one."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_31", "--extra", "vllm"]
    command += ["--constraint", "constraints-vllm.txt", "-o", str(tmp_path / "resolved.txt"), "pyproject.toml"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode and "No solution found" not in run.stderr:
        pytest.skip(f"the package index can't be read: {run.stderr[:200]}")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "resolved.txt").read_text() == (ROOT / "constraints-vllm.txt").read_text()
