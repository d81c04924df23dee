"""SharedPrefixGRPOTrainer and TRL's GRPOTrainer give the same losses at every step, for the same seed and data."""

import json
import os
import subprocess
import sys

import pytest
import torch
from side_by_side import ROOT, make_trainer
from trl import GRPOConfig, GRPOTrainer

from mmr5_train.common.files import write_records
from mmr5_train.models.loading import load_model
from mmr5_train.models.shared_prefix import takes_image_features
from mmr5_train.training.shared_grpo import SharedPrefixGRPOTrainer, unsupported

STEPS = 20
SETTINGS = {
    "lora_with_kl": {"beta": 0.04},
    "lora_mu_2_clipped": {"beta": 0.04, "num_iterations": 2, "epsilon": 0.002},
    "lora_accumulation": {
        "beta": 0.04,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "loss_type": "grpo",
    },
    "lora_groups_from_single_rows": {
        "beta": 0.04,
        "num_iterations": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "loss_type": "grpo",
    },
    "lora_checkpointing": {"gradient_checkpointing": True, "temperature": 0.8},
    "lora_cut_off_masked": {
        "mask_truncated_completions": True,
        "loss_type": "dr_grpo",
        "max_completion_length": 58,
    },
    "full": {"lora": False, "learning_rate": 3e-5},
    "full_with_kl_and_trained_tower": {"lora": False, "beta": 0.04, "freeze_vision": False, "learning_rate": 3e-5},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "lora_groups_from_single_rows" else pytest.mark.long)
        for name in SETTINGS
    ],
)
def test_twenty_steps_equal_those_of_trl(name, tiny, prompt, processor, tasks, page_folder, tmp_path):
    histories = []
    for trainer_class in (GRPOTrainer, SharedPrefixGRPOTrainer):
        trainer = make_trainer(
            trainer_class, tiny, prompt, processor, tasks, page_folder, tmp_path, SETTINGS[name]
        )
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
    stock, shared = histories
    assert len(stock) == len(shared) == STEPS
    compared = {"loss", "grad_norm", "reward", "completions/mean_length"}
    if SETTINGS[name].get("gradient_accumulation_steps", 1) == 1:
        compared |= {"entropy", "kl"}  # otherwise a mean over micro-batches, which hold other rows
    for step, (trl, shared_entry) in enumerate(zip(stock, shared, strict=True), start=1):
        assert shared_entry.keys() == trl.keys()
        for key in compared & trl.keys():
            assert shared_entry[key] == pytest.approx(trl[key], abs=1e-3), f"{key} at step {step}"
    # The weights changed. Otherwise equal steps would prove nothing.
    assert max(entry["grad_norm"] for entry in stock) > 1e-3
    assert len({round(entry["entropy"], 4) for entry in stock}) > STEPS // 2


def deepspeed(stage):
    return {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
    }


GROUPS = {"beta": 0.04, "num_iterations": 2, "max_steps": 4}
# The published batch: on each of two ranks, a step has two of the four completions of one prompt.
PUBLISHED = GROUPS | {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "loss_type": "grpo",
}
LAUNCHERS = {
    "MULTI_CPU 2": (["accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"], {}),
    "DEEPSPEED 1": (["torch.distributed.run", "--nproc_per_node", "1"], deepspeed(3)),
    "DEEPSPEED 2": (["torch.distributed.run", "--nproc_per_node", "2"], deepspeed(2)),
}


@pytest.mark.launch
@pytest.mark.parametrize(
    ("launch", "settings"),
    [("MULTI_CPU 2", [GROUPS, PUBLISHED]), ("DEEPSPEED 1", [GROUPS]), ("DEEPSPEED 2", [PUBLISHED])],
    ids=["ddp", "zero3", "zero2"],
)
def test_losses_are_the_same_under_a_launcher(launch, settings, tasks, page_folder, tmp_path):
    """Two processes with DDP and with ZeRO-2, and one process with ZeRO-3."""
    write_records(page_folder / "questions.jsonl", tasks)
    launcher, environment = LAUNCHERS[launch]
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    if "DEEPSPEED" in launch:
        settings = [values | {"use_cpu": False, "ddp_backend": "gloo"} for values in settings]
    command = [sys.executable, "-m", *launcher, "tests/mmr5_train/side_by_side.py"]
    command += [str(page_folder), str(tmp_path), json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    histories = json.loads((tmp_path / "histories.json").read_text())
    assert histories["launched"] == launch
    assert len(histories["stock"]) == len(histories["shared"]) == len(settings)
    for stock, shared in zip(histories["stock"], histories["shared"], strict=True):
        assert len(stock) == len(shared) == 4
        for step, (trl, shared_entry) in enumerate(zip(stock, shared, strict=True), start=1):
            for key in trl.keys() & {"loss", "grad_norm", "reward", "kl", "entropy"}:
                assert shared_entry[key] == pytest.approx(trl[key], abs=1e-3), f"{key} at step {step}"
        assert max(entry["grad_norm"] for entry in stock) > 1e-3


@pytest.mark.parametrize(
    ("batch", "accumulation", "steps_per_generation", "passes", "completions"),
    [
        (8, 1, 1, 1, 8),  # two groups in a micro-batch
        (1, 8, 8, 2, 4),  # a group is four micro-batches: one pass for each of two groups
        (2, 2, 4, 1, 4),  # a step is one of two groups of the rollout batch
        (1, 2, 4, 1, 2),  # a step is half of the group
        (2, 6, 6, 3, 4),  # three groups
    ],
)
def test_a_step_reads_each_prompt_once(
    batch, accumulation, steps_per_generation, passes, completions,
    tiny, prompt, processor, tasks, page_folder, tmp_path,
):  # fmt: skip
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": steps_per_generation,
        "max_steps": 1,
    }
    trainer = make_trainer(
        SharedPrefixGRPOTrainer, tiny, prompt, processor, tasks, page_folder, tmp_path, settings
    )
    groups = []

    def count(_, args, kwargs):
        if torch.is_grad_enabled():
            groups.append([len(group.filled) for group in kwargs["shared_prefix"].args[0]])

    trainer.model.get_base_model().model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert len(groups) == passes
    assert all(sum(sizes) == completions and len(sizes) == max(1, completions // 4) for sizes in groups)


def test_each_page_passes_the_vision_tower_once_per_rollout(tiny, prompt, processor, tasks, page_folder, tmp_path):
    """The rollout and the old, reference and policy passes of two iterations share one call of the tower.

    If the model's forward does not accept image features, each pass calls the tower, with each page once.
    """
    images = {}
    for trainer_class in (GRPOTrainer, SharedPrefixGRPOTrainer):
        settings = {"beta": 0.04, "num_iterations": 2, "max_steps": 4}
        trainer = make_trainer(trainer_class, tiny, prompt, processor, tasks, page_folder, tmp_path, settings)
        pages_per_call = []
        tower = trainer.model.get_base_model().model.visual
        tower.register_forward_pre_hook(
            lambda _, args, kwargs, pages_per_call=pages_per_call: pages_per_call.append(len(kwargs["grid_thw"])),
            with_kwargs=True,
        )
        trainer.train()
        images[trainer_class] = pages_per_call
    # 2 prompts of 3 pages, 4 completions each, 2 rollouts; TRL: rollout, old, reference and 2 policy passes.
    calls = 1 if takes_image_features(trainer.model.get_base_model()) else 5
    assert images[SharedPrefixGRPOTrainer] == [6] * 2 * calls
    assert images[GRPOTrainer] == [24] * 10


def test_evaluation_gives_the_same_reward_and_loss(tiny, prompt, processor, tasks, page_folder, tmp_path):
    results = []
    for trainer_class in (GRPOTrainer, SharedPrefixGRPOTrainer):
        settings = {"max_steps": 1, "per_device_eval_batch_size": 8, "num_generations_eval": 2}
        trainer = make_trainer(trainer_class, tiny, prompt, processor, tasks, page_folder, tmp_path, settings)
        torch.manual_seed(5)
        results.append(trainer.evaluate(trainer.train_dataset))
    assert results[1]["eval_reward"] == pytest.approx(results[0]["eval_reward"], abs=1e-4)
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], abs=1e-4)


def test_a_rank_without_two_completions_of_a_prompt_shares_nothing(tiny, tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, num_generations=3, use_cpu=True, bf16=False
    )
    assert unsupported(load_model(tiny), args) is None
    args.num_generations = 4  # TRL accepts it on four ranks
    assert "no two completions of a prompt are next to each other" in unsupported(load_model(tiny), args)


def test_prompts_are_bound_only_while_their_batch_is_scored(tiny, prompt, processor, tasks, page_folder, tmp_path):
    trainer = make_trainer(
        SharedPrefixGRPOTrainer, tiny, prompt, processor, tasks, page_folder, tmp_path, {"max_steps": 1}
    )
    trainer.train()
    [batch] = trainer._buffered_inputs
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    with pytest.raises(RuntimeError, match="expected 8 bound prompts, one per row, found 0"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
    with (
        trainer._bind_prompts(batch["shared_prompts"][::-1]),
        pytest.raises(RuntimeError, match="row 0: its prompt differs from the bound prompt"),
    ):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
    with (
        trainer._bind_prompts(batch["shared_prompts"]),
        pytest.raises(RuntimeError, match="the prompts of another batch are bound"),
    ):
        trainer._compute_loss(trainer.model, batch)
    assert trainer._compute_loss(trainer.model, batch).isfinite()
