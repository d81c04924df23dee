"""GRPO with the shipped model: logged metrics, banned vision tokens, determinism and error messages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmr5_train import grpo
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest, read_records, write_records
from mmr5_train.models.loading import SETTINGS, TINY, read_settings, vision_token_ids
from mmr5_train.ranking.answer import Defect
from mmr5_train.ranking.records import RankingTask, Skipped
from mmr5_train.ranking.rewards import NAMES, score_group

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "trainer.per_device_train_batch_size=8",
    "trainer.num_generations=4",
    "trainer.max_steps=2",
    "trainer.max_completion_length=16",
]


def run(questions, out, *overrides):
    config = compose_stage(grpo.GrpoStage, "grpo", [f"data={questions}", f"out={out}", *SHORT, *overrides])
    grpo.main(config)
    return json.loads((out / "log_history.json").read_text())


def test_logs_each_reward_and_each_defect(questions, tmp_path):
    history = run(questions, tmp_path / "out", "trainer.log_completions=true")
    steps = [entry for entry in history if "reward" in entry]
    assert len(steps) == 2
    for entry in steps:
        for name in ("reranking", "permutation"):
            assert 0 <= entry[f"rewards/{name}/mean"] <= 1
        assert entry["reward"] == pytest.approx(
            entry["rewards/reranking/mean"] + entry["rewards/permutation/mean"], abs=1e-4
        )
        # An answer does not fit into 16 tokens, so every completion is cut off, or ends early without one.
        assert entry[f"defects/{Defect.cut_off}"] == pytest.approx(entry["completions/clipped_ratio"])
        assert entry[f"defects/{Defect.cut_off}"] > 0.5
        assert entry[f"defects/{Defect.no_answer}"] == 1
        assert {"entropy", "kl", "completions/mean_length", "frac_reward_zero_std"} <= set(entry)
        assert entry["answers/true_verdicts"] == entry["answers/follow_verdicts"] == 0
    assert list((tmp_path / "out/completions").glob("*.parquet"))


def test_model_without_verdicts(questions, tmp_path, capsys):
    """A reward for verdicts is refused before training; with another reward no verdicts are logged."""
    model = shutil.copytree(TINY, tmp_path / "refined")
    settings = json.loads((model / SETTINGS).read_text()) | {"verdicts": False}
    (model / SETTINGS).write_text(json.dumps(settings))
    for overrides in ([f"model.path={model}"], ["think=false", "override_checkpoint=true"]):
        with pytest.raises(InputError, match=r"reward=true_reasoning: .* trained on answers without verdicts"):
            run(questions, tmp_path / "out", "reward=true_reasoning", *overrides)
    assert not (tmp_path / "out").exists()
    history = run(questions, tmp_path / "out", f"model.path={model}", "trainer.max_steps=1")
    assert not {key for entry in history for key in entry if "verdicts" in key}
    assert "grpo: the model writes no verdicts on pages" in capsys.readouterr().out
    assert read_settings(tmp_path / "out/model").verdicts is False, "GRPO does not change what the answers contain"


def test_verdict_metrics_of_one_answer():
    think = "Image 1: a map, so it helps.\nImage 2: a list, so it does not help.\nImage 3: irrelevant."
    text = f"<think>{think}</think><answer>[1, 2, 3]</answer>"
    for verdicts in (True, None):
        metrics = grpo.answer_metrics(text, 3, [1], cut_off=False, think=True, verdicts=verdicts, shuffled=True)
        assert metrics["answers/true_verdicts"] == pytest.approx(2 / 3)
        assert metrics["answers/follow_verdicts"] == 1
    free = text.replace(", so it", ", which")
    metrics = grpo.answer_metrics(free, 3, [1], cut_off=False, think=True, verdicts=True, shuffled=True)
    assert [metrics[name] for name in grpo.VERDICT_METRICS] == [0, 0]


def test_data_that_does_not_fill_a_batch_is_rejected(questions, tmp_path):
    with pytest.raises(InputError, match="1 examples do not fill one batch, so no step was taken"):
        run(questions, tmp_path / "out", "limit=1")
    assert not (tmp_path / "out/model").exists()


def test_vision_tokens_cannot_be_sampled(questions, tmp_path, processor):
    """Even a head that gives all probability to vision tokens does not sample one."""
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    model.config.tie_word_embeddings = False
    model.config.text_config.tie_word_embeddings = False
    head = torch.zeros_like(model.lm_head.weight)
    head[vision_token_ids(processor)] = 50 * model.model.language_model.norm.weight.sign()
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(tmp_path / "broken")
    processor.save_pretrained(tmp_path / "broken")
    history = run(questions, tmp_path / "out", f"model.path={tmp_path}/broken", "trainer.log_completions=true")
    assert any("reward" in entry for entry in history)
    import pandas as pd

    tables = [pd.read_parquet(path) for path in (tmp_path / "out/completions").glob("*.parquet")]
    texts = "".join(str(text) for table in tables for text in table["completion"])
    assert "<|image_pad|>" not in texts


def test_the_same_seed_gives_the_same_rewards_and_the_tower_stays_frozen(questions, tmp_path):
    keys = ("reward", "loss", "entropy", "kl")
    first, second = run(questions, tmp_path / "a"), run(questions, tmp_path / "b")
    assert [[e.get(k) for k in keys] for e in first] == [[e.get(k) for k in keys] for e in second]
    before = AutoModelForImageTextToText.from_pretrained(TINY).model.visual.state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "a/model").model.visual.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reward_functions_return_the_rewards_of_the_registry(tasks):
    texts = ["<think>a</think><answer>[2, 1, 3]</answer>", "<answer>[1, 1, 9]</answer>", "nothing"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"pages": [3] * 3, "positives": [[2], [1, 3], [1]], "query_id": ["a", "b", "c"]}
    columns["reference"] = [[2, 1, 3], [1, 3, 2], [1, 2, 3]]
    for name in NAMES:
        reward = grpo.reward_function(name, think=True)
        assert reward.__name__ == name
        assert reward(completions, **columns) == [
            score_group(name, [text], 3, columns["positives"][i], columns["reference"][i])[0]
            for i, text in enumerate(texts)
        ]


def test_a_group_reward_gets_the_completions_of_each_prompt():
    texts = [f"<think>a</think><answer>{ids}</answer>" for ids in ([1, 2], [2, 1], [2, 1], [1, 2])]
    reward = grpo.reward_function("fidelity", think=True)
    values = reward(
        [[{"role": "assistant", "content": text}] for text in texts],
        query_id=["a", "b", "a", "b"], pages=[2] * 4, positives=[[1]] * 4, reference=[[1, 2]] * 4,
    )  # fmt: skip
    expected = score_group("fidelity", [texts[0], texts[2]], 2, [1], [1, 2])
    assert [values[0], values[2]] == expected
    assert values[0] > values[2]
    assert [values[3], values[1]] == expected


def test_questions_that_leave_no_space_for_a_completion_are_left_out(questions, tmp_path, capsys):
    tasks = read_records(questions, RankingTask)
    tasks[1] = tasks[1].model_copy(update={"query": "water " * 600})
    path = questions.with_name("one_long.jsonl")
    write_records(path, tasks)
    with pytest.raises(
        InputError, match=rf"1 of 4 examples .*\(max_prompt_length\).* {tasks[1].query_id}: .* lower"
    ):
        run(path, tmp_path / "out", "max_prompt_length=500")
    run(path, tmp_path / "out", "max_prompt_length=500", "max_too_long=0.3")
    assert [skipped.query_id for skipped in read_records(tmp_path / "out/skipped.jsonl", Skipped)] == [
        tasks[1].query_id
    ]
    assert read_manifest(tmp_path / "out")["counts"]["tasks"] == 3
    assert "grpo: 1 of 4 examples have more than 500 tokens" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"the model's context of 32,768 less trainer\.max_completion_length 32,700"
    ):
        run(questions, tmp_path / "no_space", "trainer.max_completion_length=32700")
