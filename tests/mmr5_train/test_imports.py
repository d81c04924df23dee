"""Importing these modules in a new process must not load torch. `lint-imports` checks the static import rules."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "module",
    [
        "mmr5_train.evaluation.scoring",
        "mmr5_train.select",
        "mmr5_train.serving.server",
        "mmr5_train.tables",
        "data_construction.candidates",
    ],
)
def test_no_torch_is_loaded(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
