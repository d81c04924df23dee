"""SharedPrefixGRPOTrainer beside TRL's own trainer: same seed, same data, same losses, step by step."""

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from mmr5_train.models.finetune import prompt_dataset
from mmr5_train.models.loading import load_model, vision_token_ids
from mmr5_train.shared_grpo import SharedPrefixGRPOTrainer, unsupported

STEPS = 20
ADAPTERS = {"r": 8, "lora_alpha": 16, "target_modules": r".*language_model.*(q_proj|v_proj|o_proj|up_proj)"}
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


def even_words(completions, completion_ids, images, **_):
    """A reward with variance in each group; reads the images column, as any reward may."""
    assert all(len(row) == 3 for row in images)
    return [sum(token % 2 for token in ids) / 8 + len(ids) / 64 for ids in completion_ids]


def make_trainer(kind, tiny, prompt, processor, tasks, folder, out, settings):
    settings = dict(settings)
    lora = settings.pop("lora", True)
    model = load_model(tiny.model_copy(update={"freeze_vision": settings.pop("freeze_vision", True)}))
    values = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_completion_length": 20,
        "temperature": 1.0,
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "generation_kwargs": {"suppress_tokens": vision_token_ids(processor)},
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    rows = [{"query_id": task.query_id} for task in tasks]
    shown = [task.candidates for task in tasks]
    return kind(
        model=model,
        reward_funcs=[even_words],
        args=GRPOConfig(output_dir=str(out), seed=3, **values),
        train_dataset=prompt_dataset(rows, [t.query for t in tasks], shown, folder, prompt, processor),
        processing_class=processor,
        peft_config=LoraConfig(**ADAPTERS, task_type="CAUSAL_LM") if lora else None,
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_are_those_of_trl(name, tiny, prompt, processor, tasks, page_folder, tmp_path):
    histories = []
    for kind in (GRPOTrainer, SharedPrefixGRPOTrainer):
        trainer = make_trainer(kind, tiny, prompt, processor, tasks, page_folder, tmp_path, SETTINGS[name])
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
    stock, shared = histories
    assert len(stock) == len(shared) == STEPS
    compared = {"loss", "grad_norm", "reward", "completions/mean_length"}
    if SETTINGS[name].get("gradient_accumulation_steps", 1) == 1:
        compared |= {"entropy", "kl"}  # else logged as a mean over micro-batches, which are dealt out otherwise
    for step, (theirs, ours) in enumerate(zip(stock, shared, strict=True), start=1):
        assert ours.keys() == theirs.keys()
        for key in compared & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], abs=1e-3), f"{key} at step {step}"
    # The training moved: else twenty equal steps would prove nothing.
    assert max(entry["grad_norm"] for entry in stock) > 1e-3
    assert len({round(entry["entropy"], 4) for entry in stock}) > STEPS // 2


def test_pages_go_through_the_tower_once_a_step(tiny, prompt, processor, tasks, page_folder, tmp_path):
    """Old, reference and policy passes of two iterations, and the rollout: one call for all of them."""
    images = {}
    for kind in (GRPOTrainer, SharedPrefixGRPOTrainer):
        settings = {"beta": 0.04, "num_iterations": 2, "max_steps": 4}
        trainer = make_trainer(kind, tiny, prompt, processor, tasks, page_folder, tmp_path, settings)
        seen = []
        tower = trainer.model.get_base_model().model.visual
        tower.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
        )
        trainer.train()
        images[kind] = seen
    # 2 prompts of 3 pages, 4 completions each, 2 rollouts; TRL: rollout, old, reference and 2 policy passes.
    assert images[SharedPrefixGRPOTrainer] == [6, 6]
    assert images[GRPOTrainer] == [24] * 10


def test_evaluation_shares_prompts_too(tiny, prompt, processor, tasks, page_folder, tmp_path):
    results = []
    for kind in (GRPOTrainer, SharedPrefixGRPOTrainer):
        settings = {"max_steps": 1, "per_device_eval_batch_size": 8, "num_generations_eval": 2}
        trainer = make_trainer(kind, tiny, prompt, processor, tasks, page_folder, tmp_path, settings)
        torch.manual_seed(5)
        results.append(trainer.evaluate(trainer.train_dataset))
    assert results[1]["eval_reward"] == pytest.approx(results[0]["eval_reward"], abs=1e-4)
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], abs=1e-4)


def test_torn_groups_are_refused_with_the_reason(tiny, prompt, processor, tasks, page_folder, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.raises(ValueError, match=r"per_device_train_batch_size \(2\) is not a multiple of .*\(4\)"):
        make_trainer(SharedPrefixGRPOTrainer, tiny, prompt, processor, tasks, page_folder, tmp_path, settings)
    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, use_cpu=True, bf16=False
    )
    assert unsupported(load_model(tiny), args) is None
