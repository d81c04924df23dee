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
    "lora_checkpointing": {"gradient_checkpointing": True, "temperature": 0.8},
    "lora_cut_off_masked": {
        "mask_truncated_completions": True,
        "loss_type": "dr_grpo",
        "max_completion_length": 58,
    },
    "full": {"lora": False, "learning_rate": 3e-5},
    "full_with_kl_and_trained_tower": {"lora": False, "beta": 0.04, "freeze_vision": False, "learning_rate": 3e-5},
}


@pytest.mark.parametrize("name", SETTINGS)
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


ZERO_3 = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
LAUNCHERS = {
    "MULTI_CPU 2": (["accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"], {}),
    "DEEPSPEED 1": (["torch.distributed.run", "--nproc_per_node", "1"], ZERO_3),
}


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_losses_are_the_same_under_a_launcher(launch, tasks, page_folder, tmp_path):
    """Two processes with DDP, and one process with DeepSpeed ZeRO-3."""
    write_records(page_folder / "questions.jsonl", tasks)
    launcher, environment = LAUNCHERS[launch]
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    settings = {
        "beta": 0.04,
        "num_iterations": 2,
        "max_steps": 4,
        "use_cpu": "DEEPSPEED" not in launch,
    }
    command = [sys.executable, "-m", *launcher, "tests/mmr5_train/side_by_side.py"]
    command += [str(page_folder), str(tmp_path), json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["launched"] == launch
    assert len(history["stock"]) == len(history["shared"]) == 4
    for step, (trl, shared_entry) in enumerate(zip(history["stock"], history["shared"], strict=True), start=1):
        for key in trl.keys() & {"loss", "grad_norm", "reward", "kl", "entropy"}:
            assert shared_entry[key] == pytest.approx(trl[key], abs=1e-3), f"{key} at step {step}"
    assert max(entry["grad_norm"] for entry in history["stock"]) > 1e-3


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


def test_split_groups_are_rejected_with_the_reason(tiny, prompt, processor, tasks, page_folder, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.raises(ValueError, match=r"per_device_train_batch_size \(2\) is not a multiple of .*\(4\)"):
        make_trainer(SharedPrefixGRPOTrainer, tiny, prompt, processor, tasks, page_folder, tmp_path, settings)
    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, use_cpu=True, bf16=False
    )
    assert unsupported(load_model(tiny), args) is None


def test_prompts_are_bound_only_while_their_batch_is_scored(tiny, prompt, processor, tasks, page_folder, tmp_path):
    trainer = make_trainer(
        SharedPrefixGRPOTrainer, tiny, prompt, processor, tasks, page_folder, tmp_path, {"max_steps": 1}
    )
    trainer.train()
    batch = trainer._buffered_inputs[0]
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
