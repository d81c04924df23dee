"""The comparison of reasoning and direct models: equal training costs, and the table."""

import json
from argparse import Namespace

import bench_reasoning
import numpy as np
import pytest

from mmr5_train.compare import Run

HISTORY = {
    "sft": [{"num_tokens": 1000.0, "step": 25}, {"num_tokens": 2000.0, "step": 50}, {"train_loss": 0.1}],
    # 40 steps of 96 completions: prompts of 180 tokens, completions of 60
    "grpo": [{"num_tokens": 40 * 96 * 240.0, "step": 40, "completions/mean_length": 60.0}],
}  # fmt: skip


def recipe(folder, seconds):
    stages = {}
    for stage, history in HISTORY.items():
        out = folder / stage
        out.mkdir(parents=True)
        (out / "log_history.json").write_text(json.dumps(history))
        trainer = {"per_device_train_batch_size": 48, "gradient_accumulation_steps": 2}
        (out / "manifest.json").write_text(json.dumps({"config": {"trainer": trainer}}))
        stages[stage] = {"out": str(out), "seconds": seconds}
    (folder / "recipe.json").write_text(json.dumps({"stages": stages}))
    return folder


def test_a_shared_prompt_counts_once_for_its_completions(tmp_path):
    costs = bench_reasoning.training_cost(recipe(tmp_path / "a", 30.0))
    assert costs["sft"] == {"seconds": 30.0, "tokens": 2000.0, "steps": 50}
    assert costs["grpo"]["tokens"] == pytest.approx(40 * 96 * (60 + 180 / 6))


def test_the_direct_model_gets_more_steps_if_its_steps_cost_less():
    reasoning = {"sft": {"seconds": 40, "tokens": 900}, "grpo": {"seconds": 300, "tokens": 80}}
    direct = {"sft": {"seconds": 20, "tokens": 600}, "grpo": {"seconds": 100, "tokens": 40}}
    assert bench_reasoning.equal_steps(reasoning, direct, "seconds") == {"sft": 100, "grpo": 120}
    assert bench_reasoning.equal_steps(reasoning, direct, "tokens") == {"sft": 75, "grpo": 80}


def run(name, seed, recall):
    values = {figure: np.array(recall) for figure in bench_reasoning.FIGURES}
    types = [("catalogue",), ("users",), ("users_unseen",)] * 2
    ids = [str(i) for i in range(6)]
    return Run(
        name=name, seed=seed, query_ids=ids, domains=["d"] * 6, types=types, values=values, data="", seconds=0.02
    )


def test_the_table_pairs_each_model_with_the_reasoning_model():
    runs = [
        run(name, seed, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0] if name == "reasoning" else [0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
        for name in bench_reasoning.MODELS
        for seed in (10, 11)
    ]
    rows = bench_reasoning.table_rows(runs, 5)
    assert len(rows) == 15
    direct = {row["questions"]: row["difference"]["mean"] for row in rows if row["model"] == "direct"}
    assert direct == {"catalogue": -0.5, "users": 0.5, "users_unseen": 0.0}
    lines = bench_reasoning.markdown(rows).splitlines()
    assert lines[2] == "| 5 | catalogue | reasoning | 1.000 | – | 1.000 | 1.000 | 20 |"
    assert lines[3].startswith("| 5 | catalogue | direct | 0.500 | -0.500 [")


def test_a_missing_run_does_not_meet_its_target():
    args = Namespace(seeds=[10, 11, 12], candidates=[5])
    jobs = [{"seed": seed, "candidates": 5} for seed in (12, 10, 11)]
    assert all(target["met"] for target in bench_reasoning.targets(jobs, args))
    assert [target["met"] for target in bench_reasoning.targets(jobs[:2], args)] == [False, True]
