"""What two processes do together. One launch runs all checks, in the module two_processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from two_processes import EVALUATION, evaluate_in, select_in

from mmr5_train.common.files import write_records
from mmr5_train.ranking.records import Page

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.launch
def test_two_processes_share_the_questions(page_folder, tasks, guessing_model, tmp_path):
    """Launched as a recipe launches `select` and `evaluate` with a DeepSpeed file."""
    shutil.copytree(page_folder, tmp_path / "data")
    copies = [task.model_copy(update={"query_id": f"{task.query_id}/{i}"}) for i in range(3) for task in tasks]
    write_records(tmp_path / "data/select.jsonl", copies[:9])
    size = {"width": 600, "height": 800}
    pages = [Page(doc_name="doc", page=i, domain="d", image=f"page-{i}.png", **size) for i in range(6)]
    write_records(tmp_path / "data/pages.jsonl", pages)

    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", "configs/accelerate/zero2.yaml", "--multi_gpu"]
    command += ["-m", "two_processes", str(tmp_path), str(guessing_model)]
    path = os.pathsep.join([str(ROOT / "tests/mmr5_train"), str(ROOT)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stdout.count("select: ") == 2
    assert completed.stdout.count("evaluate: first_stage, untrained on 9 questions") == 1

    select_in(tmp_path, "one/selection", str(guessing_model))
    evaluate_in(tmp_path, "one/evaluation")
    files = [f"selection/{name}" for name in ("rollouts.jsonl", "questions.jsonl")]
    files += [f"evaluation/{name}" for name in EVALUATION]
    for name in files:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not (tmp_path / "two/selection/partial").exists()
