"""Reinforcement learning with ranking rewards, with TRL's GRPOTrainer.

    python -m mmr5_train.grpo data=outputs/select/questions.jsonl model.path=outputs/sft/model out=outputs/grpo
    accelerate launch --config_file configs/accelerate/cpu.yaml -m mmr5_train.grpo …

Reads ranking tasks and the SFT checkpoint, writes `model/`, `adapter/` with LoRA, `log_history.json` (each
reward, each answer defect, entropy, KL, completion length), `completions/` (what was sampled) and a manifest.
MM-R5, section 3.3; the rewards are in mmr5_train/ranking/rewards.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field
from trl import GRPOConfig, GRPOTrainer

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import InputError, read_records, write_manifest
from mmr5_train.evaluation.alarms import Action, read_alarms
from mmr5_train.models.inputs import check_images
from mmr5_train.models.loading import ModelConfig, load_model, load_processor, vision_token_ids
from mmr5_train.ranking.answer import Defect, parse_answer
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import LocalId, Order, RankingTask
from mmr5_train.ranking.rewards import REWARDS, RewardConfig, follows_verdicts, page_verdicts
from mmr5_train.training.callbacks import (
    AlarmCallback,
    FiniteGRPOTrainer,
    FiniteSharedGRPOTrainer,
    HeldOutConfig,
    held_out,
)
from mmr5_train.training.checkpoints import open_training_output, run_settings
from mmr5_train.training.finetune import (
    MODEL,
    best_counts,
    check_batches,
    lora_config,
    prompt_dataset,
    save_result,
    settings_checked,
    train,
    trained_parameters,
    trainer_arguments,
    use_lora_plus,
)
from mmr5_train.training.shared_grpo import unsupported

VERDICTS = ("answers/true_verdicts", "answers/follow_verdicts")

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
    heldout: HeldOutConfig | None = None
    alarms: Action = Field(default="warn", description="what an alarm of mmr5_train.evaluation.alarms does")
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


def answer_logger(think: bool, shuffled: bool, end_ids: set[int]) -> RewardFunction:
    """A reward of weight 0 that logs what the answers are like, whatever is paid; the alarms read it.

    `defects/*` and `answers/*` are shares of completions (`answers/reranking` is the mean of that reward,
    `answers/true_verdicts` a share of pages; both of `VERDICTS` only for a model that gives some), `first/<place>`
    shares of the answers that put the page in that place of the prompt first.
    """

    verdicts_known = False

    def no_defect(
        completions: list[Any],
        completion_ids: list[list[int]],
        pages: list[int],
        positives: list[list[LocalId]],
        log_metric: Any,
        **_: Any,
    ) -> list[float | None]:
        nonlocal verdicts_known
        rows: list[dict[str, float]] = []
        for completion, ids, n, relevant in zip(completions, completion_ids, pages, positives, strict=True):
            cut_off = not ids or ids[-1] not in end_ids
            rows.append(describe(completion[0]["content"], n, relevant, think, shuffled, cut_off))
        verdicts_known = verdicts_known or any(VERDICTS[0] in row for row in rows)
        if verdicts_known:  # where they are given, a completion without any has none right
            rows = [dict.fromkeys(VERDICTS, 0.0) | row for row in rows]
        for key in dict.fromkeys(key for row in rows for key in row):
            log_metric(key, fmean(row[key] for row in rows if key in row))
        return [row["answers/without_defect"] for row in rows]

    return no_defect


def describe(
    text: str, n: int, positives: list[LocalId], think: bool, shuffled: bool, cut_off: bool
) -> dict[str, float]:
    """A completion's part in each of the logged shares; what it has no part in is left out."""
    answer = parse_answer(text, n, cut_off=cut_off, expect_think=think)
    row = {f"defects/{defect.value}": float(defect in answer.defects) for defect in Defect}
    row["answers/without_defect"] = float(not answer.defects)
    row["answers/complete"] = float(answer.is_complete_permutation)
    row["answers/reranking"] = REWARDS["reranking"](text, n, positives, expect_think=think)
    said = page_verdicts(answer.think or "", n)
    if said:
        true = sum(helps == (i in positives) for i, helps in said.items()) / n
        row |= dict(zip(VERDICTS, (true, float(follows_verdicts(answer.ids, said))), strict=True))
    if shuffled and answer.ids:
        row |= {f"first/{i}": float(answer.ids[0] == i) for i in range(1, n + 1)}
    return row


def grpo_arguments(config: GrpoStage, processor: Any) -> GRPOConfig:
    """TRL's config: what the user set, the weights of the rewards, and tokens that can't be sampled."""
    check_batches(config.trainer)
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
        return FiniteGRPOTrainer
    reason = unsupported(model, arguments)
    if reason is None:
        return FiniteSharedGRPOTrainer
    if choice == "always":
        raise InputError(f"shared_prefix=always: {reason}")
    print(f"grpo: every completion is trained with a prompt of its own: {reason}")
    return FiniteGRPOTrainer


def main(config: GrpoStage) -> None:
    tasks = read_records(config.data, RankingTask)[: config.limit]
    check_images((page for task in tasks for page in task.candidates), config.data.parent)
    processor = load_processor(config.model)
    arguments = grpo_arguments(config, processor)
    watch = held_out(config.heldout, arguments, processor, config.prompt, config.think)
    # Only now: what the user got wrong must not cost an earlier result that is to be overwritten.
    settings = run_settings(config)
    inputs = [config.data, Path(config.model.path)]
    checkpoint = open_training_output(config.out, config.overwrite, inputs, "grpo", settings)
    model = load_model(config.model)
    prompted = [task.in_prompt_order(config.order, config.seed) for task in tasks]
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
            reward_funcs=[*rewards, answer_logger(config.think, config.order == "shuffled", end_ids)],
            args=arguments,
            train_dataset=dataset,
            processing_class=processor,
            peft_config=lora_config(config.model),
        )
    use_lora_plus(trainer, config.model)
    trained = trained_parameters(trainer)
    if config.alarms != "off":
        trainer.add_callback(AlarmCallback(config.out, config.alarms))
    shown = {"reward": "reward", "kl": "kl", "entropy": "entropy"}
    train(trainer, "grpo", shown, settings, checkpoint, watch)
    save_result(trainer, processor, config.model, config.prompt, config.think, config.out)
    if trainer.accelerator.is_main_process:
        paid = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        learned = f"reward {paid[0]:.3f} → {paid[-1]:.3f}, " if paid else ""
        counts = {"tasks": len(tasks), "steps": trainer.state.global_step, "trained_parameters": trained}
        counts |= {"processes": trainer.accelerator.num_processes, "alarms": len(read_alarms(config.out))}
        counts |= best_counts(trainer)
        write_manifest(
            config.out, stage="grpo", config=config.model_dump(mode="json"), inputs=[config.data], counts=counts
        )
        print(
            f"grpo: {len(tasks)} questions, {trainer.state.global_step} steps, {trained:,} parameters, "
            f"{learned}in {config.out / MODEL}"
        )


if __name__ == "__main__":
    run_stage(main, GrpoStage, "grpo")
