"""The scripts that reproduce MM-R5's checkpoints and tables, at a small size."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mmr5_train.common.files import read_manifest, read_records
from mmr5_train.ranking.records import Ranking, RankingTask

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.launch
def test_script_reproduces_three_checkpoints_and_compares_them_with_the_paper(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")}
    env |= {"HUB_PORT": str(port), "NO_PROXY": "127.0.0.1"}
    command = ["scripts/reproduce_mm_r5.sh", "--tiny", str(tmp_path / "out")]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, f"{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    output = process.stdout
    assert output.count("files, verified, in") == 2
    assert output.count("memory per GPU at the longest prompt") == 2
    assert "sft: already in" in output  # SFT runs once for both recipes
    for stage in ("shared/sft", "mm_r5/grpo", "rl_only/grpo"):
        assert read_manifest(tmp_path / "out" / stage)["counts"]["processes"] == 2
    table = (tmp_path / "out/compare/table.md").read_text()
    for recipe, published in (("mm_r5", "0.6951"), ("sft_only", "0.6673"), ("rl_only", "0.6586")):
        assert f"published | 1,658 | {published} |" in table
        assert f"**{recipe}** | measured | 8 |" in table
    for model in ("shared/sft", "mm_r5/grpo", "rl_only/grpo"):
        card = ModelCard.load(tmp_path / "out" / model / "model/README.md")
        assert card.data.base_model == "tiny"
        assert card.data.eval_results
    assert (tmp_path / "out/compare/compare.html").is_file()


@pytest.mark.long
def test_script_fills_the_published_tables(tmp_path):
    command = ["scripts/reproduce_tables.sh", "--tiny", str(tmp_path / "out")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, f"{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    table = (tmp_path / "out/tables/tables.md").read_text()
    questions = len(read_records(tmp_path / "out/BM25/candidates/heldout.jsonl", RankingTask))
    for row in ("BM25", "BM25 + MM-R5", "BM25 + SFT_only", "BM25 run", "BM25 run + MM-R5"):
        assert f"**{row}** | measured | {questions} |" in table
    for published in ("ColQwen + MM-R5", "CLIP", "GME + MM-R5"):
        assert f"| {published} | published | 1,658 |" in table
    first, second = (
        tmp_path / f"out/{name}/evaluation/rankings/first_stage.jsonl" for name in ("BM25", "BM25 run")
    )
    orders = [
        [ranking.ranked_pages(ranking.greedy) for ranking in read_records(path, Ranking)]
        for path in (first, second)
    ]
    assert orders[0] == orders[1], "reading the run file as scores gives the same order"
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert again.stdout.count("\n> ") == 1, "only the table is written again"
