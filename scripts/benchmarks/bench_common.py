"""Code that the benchmarks share: arguments, child processes, a machine description, targets and JSON files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmr5_train.common.files import write_json

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "outputs/bench"

Row = dict[str, Any]


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the docstring of the script as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def machine(threads: int | None = None) -> str:
    """The processor, with the number of threads that the benchmark uses or else of the machine's cores."""
    size = f"{threads} threads" if threads else f"{os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {size}"


def run_for_json(command: Sequence[str], description: str) -> Any:
    """Runs a command whose last output line is JSON, and returns it. On failure, exits with the end of stderr."""
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{description} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def run_with_log(
    command: Sequence[str], log: Path, description: str, env: Mapping[str, str] | None = None
) -> None:
    """Runs a command and writes its output to a file. On failure, exits with the end of the file."""
    with log.open("w") as stream:
        environment = {**os.environ, **(env or {})}
        process = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    if process.returncode:
        raise SystemExit(f"{description} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")


def at_least(name: str, measured: float, bound: float) -> Row:
    return _target(name, measured, f"at least {bound:g}", measured >= bound)


def at_most(name: str, measured: float | None, bound: float) -> Row:
    """A value that is not known (None) does not meet the target."""
    return _target(name, measured, f"at most {bound:g}", measured is not None and measured <= bound)


def equal(name: str, measured: Any, expected: Any) -> Row:
    return _target(name, measured, str(expected), measured == expected)


def _target(name: str, measured: Any, condition: str, met: bool) -> Row:
    return {
        "name": name,
        "measured": round(measured, 4) if isinstance(measured, float) else measured,
        "wanted": condition,
        "met": bool(met),
    }


def write_results(path: Path, results: Mapping[str, Any], targets: Sequence[Row]) -> None:
    """Writes the results as JSON, with the targets in the last field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**results, "targets": list(targets)})


def print_targets(targets: Sequence[Row]) -> None:
    for target in targets:
        verdict = "met" if target["met"] else "NOT MET"
        print(f"target {verdict}: {target['name']}: {target['measured']} (expected {target['wanted']})")
