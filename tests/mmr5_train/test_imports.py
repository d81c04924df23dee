"""Imports point one way: the domain knows nobody, data construction knows no torch, nothing imports a stage."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    f"mmr5_train.{name}" for name in ("sft", "grpo", "select", "distill", "evaluate", "report", "serve", "tables")
}
STAGES |= {f"data_construction.{name}" for name in ("candidates", "traces", "report")}
FILES = sorted([*ROOT.glob("mmr5_train/**/*.py"), *ROOT.glob("data_construction/**/*.py")])


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("mmr5_train", "data_construction")}


@pytest.mark.parametrize("path", sorted(ROOT.glob("mmr5_train/ranking/*.py")), ids=lambda path: path.stem)
def test_the_domain_knows_nobody(path):
    assert not [name for name in ours(imported(path)) if not name.startswith("mmr5_train.ranking")]


def test_nothing_imports_a_stage_but_the_recipe():
    for path in FILES:
        if path.name != "recipe.py":
            assert not imported(path) & STAGES, path


def test_data_construction_knows_no_model():
    allowed = ("data_construction", "mmr5_train.ranking", "mmr5_train.reporting", "mmr5_train.config")
    allowed += ("mmr5_train.pages",)
    for path in ROOT.glob("data_construction/**/*.py"):
        for name in ours(imported(path)):
            assert name.startswith(allowed), path


def test_shared_prefixes_can_be_lifted_out():
    assert not ours(imported(ROOT / "mmr5_train/shared_prefix.py"))
    trainer = ours(imported(ROOT / "mmr5_train/shared_grpo.py"))
    assert all(name.startswith("mmr5_train.shared_prefix") for name in trainer)


@pytest.mark.parametrize(
    "module",
    [
        "mmr5_train.ranking.scoring",
        "mmr5_train.select",
        "mmr5_train.serving.server",
        "mmr5_train.tables",
        "data_construction.candidates",
    ],
)
def test_no_torch_is_loaded(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
