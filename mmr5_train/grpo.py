"""Reinforcement learning with ranking rewards, with TRL's GRPOTrainer.

    python -m mmr5_train.grpo data=outputs/select/questions.jsonl model.path=outputs/sft/model out=outputs/grpo
    accelerate launch --config_file configs/accelerate/cpu.yaml -m mmr5_train.grpo …

Reads ranking tasks and the SFT checkpoint, writes `model/`, `adapter/` with LoRA, `log_history.json` (each
reward, each answer defect, entropy, KL, completion length), `completions/` (what was sampled) and a manifest.
MM-R5, section 3.3; the rewards are in mmr5_train/ranking/rewards.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from trl import GRPOConfig, GRPOTrainer

from mmr5_train.config import StageConfig, run_stage
from mmr5_train.models.checkpoints import open_training_output, run_settings
from mmr5_train.models.finetune import (
    MODEL,
    lora_config,
    prompt_dataset,
    save_result,
    settings_checked,
    train,
    trained_parameters,
    trainer_arguments,
    use_lora_plus,
)
from mmr5_train.models.inputs import check_images
from mmr5_train.models.loading import ModelConfig, load_model, load_processor, vision_token_ids
from mmr5_train.ranking.answer import Defect, parse_answer
from mmr5_train.ranking.files import InputError, read_records, write_manifest
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import LocalId, Order, RankingTask
from mmr5_train.ranking.rewards import REWARDS, RewardConfig
from mmr5_train.shared_grpo import SharedPrefixGRPOTrainer, unsupported

RewardFunction = Callable[..., list[float | None]]
"""What TRL calls: completions and the data set's columns in, one value a completion out."""


class GrpoStage(StageConfig):
    """`python -m mmr5_train.grpo` (configs/grpo.yaml)."""

    data: Path = Field(description="ranking tasks, e.g. questions.jsonl of mmr5_train.select")
    limit: int | None = Field(default=None, gt=0, description="use the first so many tasks")
    think: bool = Field(default=True, description="whether the model was taught a think block")
    order: Order = Field(default="shuffled", description="how a prompt shows its candidates")
    model: ModelConfig
    prompt: Prompt
    reward: RewardConfig
    shared_prefix: Literal["auto", "always", "never"] = Field(
        default="auto", description="compute a prompt once for its completions: where it can be, or else an error"
    )
    trainer: dict[str, Any] = Field(description="fields of trl.GRPOConfig")


def reward_function(name: str, think: bool) -> RewardFunction:
    """A ranking reward in the form that TRL calls: one value a completion."""
    score = REWARDS[name]

    def reward(
        completions: list[Any], pages: list[int], positives: list[list[LocalId]], **_: Any
    ) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        rows = zip(texts, pages, positives, strict=True)
        return [score(text, n, relevant, expect_think=think) for text, n, relevant in rows]

    reward.__name__ = name  # TRL logs a reward under its function's name
    return reward


def defect_logger(think: bool, end_ids: set[int]) -> RewardFunction:
    """A reward of weight 0 that logs the share of completions with each answer defect."""

    def defects(
        completions: list[Any], completion_ids: list[list[int]], pages: list[int], log_metric: Any, **_: Any
    ) -> list[float | None]:
        counts: Counter[Defect] = Counter()
        clean: list[float | None] = []
        for completion, ids, n in zip(completions, completion_ids, pages, strict=True):
            cut_off = not ids or ids[-1] not in end_ids
            parsed = parse_answer(completion[0]["content"], n, cut_off=cut_off, expect_think=think)
            counts.update(parsed.defects)
            clean.append(float(not parsed.defects))
        for defect in Defect:
            log_metric(f"defects/{defect.value}", counts[defect] / len(completions))
        return clean

    defects.__name__ = "no_defect"
    return defects


def grpo_arguments(config: GrpoStage, processor: Any) -> GRPOConfig:
    """TRL's config: what the user set, the weights of the rewards, and tokens that can't be sampled."""
    values = {
        **config.trainer,
        "reward_weights": [*config.reward.weights.values(), 0.0],
        "generation_kwargs": {
            **(config.trainer.get("generation_kwargs") or {}),
            # A sampled vision token would promise a picture that is not there and break the next forward.
            "suppress_tokens": vision_token_ids(processor),
        },
    }
    return trainer_arguments(GRPOConfig, values, out=config.out, seed=config.seed, model=config.model)


def trainer_class(choice: str, model: Any, arguments: GRPOConfig) -> type[GRPOTrainer]:
    """The trainer that shares prompts, or TRL's own with a line that says why."""
    if choice == "never":
        return GRPOTrainer
    reason = unsupported(model, arguments)
    if reason is None:
        return SharedPrefixGRPOTrainer
    if choice == "always":
        raise InputError(f"shared_prefix=always: {reason}")
    print(f"grpo: every completion is trained with a prompt of its own: {reason}")
    return GRPOTrainer


def main(config: GrpoStage) -> None:
    tasks = read_records(config.data, RankingTask)[: config.limit]
    check_images((page for task in tasks for page in task.candidates), config.data.parent)
    processor = load_processor(config.model)
    arguments = grpo_arguments(config, processor)
    # Only now: what the user got wrong must not cost an earlier result that is to be overwritten.
    settings = run_settings(config)
    inputs = [config.data, Path(config.model.path)]
    checkpoint = open_training_output(config.out, config.overwrite, inputs, "grpo", settings)
    model = load_model(config.model)
    prompted = [task.prompted(config.order, config.seed) for task in tasks]
    dataset = prompt_dataset(
        [
            {"query_id": p.task.query_id, "pages": len(p.shown), "positives": list(p.local_positives)}
            for p in prompted
        ],
        [task.query for task in tasks],
        [p.shown for p in prompted],
        config.data.parent,
        config.prompt,
        processor,
    )
    end_ids = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
    rewards = [reward_function(name, config.think) for name in config.reward.weights]
    with settings_checked("grpo"):
        trainer = trainer_class(config.shared_prefix, model, arguments)(
            model=model,
            reward_funcs=[*rewards, defect_logger(config.think, end_ids)],
            args=arguments,
            train_dataset=dataset,
            processing_class=processor,
            peft_config=lora_config(config.model),
        )
    use_lora_plus(trainer, config.model)
    trained = trained_parameters(trainer)
    train(trainer, "grpo", {"reward": "reward", "kl": "kl", "entropy": "entropy"}, settings, checkpoint)
    save_result(trainer, processor, config.model, config.prompt, config.think, config.out)
    if trainer.accelerator.is_main_process:
        paid = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        learned = f"reward {paid[0]:.3f} → {paid[-1]:.3f}, " if paid else ""
        counts = {"tasks": len(tasks), "steps": trainer.state.global_step, "trained_parameters": trained}
        counts["processes"] = trainer.accelerator.num_processes
        write_manifest(
            config.out, stage="grpo", config=config.model_dump(mode="json"), inputs=[config.data], counts=counts
        )
        print(
            f"grpo: {len(tasks)} questions, {trainer.state.global_step} steps, {trained:,} parameters, "
            f"{learned}in {config.out / MODEL}"
        )


if __name__ == "__main__":
    run_stage(main, GrpoStage, "grpo")
