"""Reinforcement learning with ranking rewards, with TRL's GRPOTrainer.

    python -m mmr5_train.grpo data=outputs/select/questions.jsonl model.path=outputs/sft/model out=outputs/grpo
    accelerate launch --config_file configs/accelerate/cpu.yaml -m mmr5_train.grpo …

Reads ranking tasks and the SFT checkpoint. Writes `model/`, `adapter/` with LoRA, `log_history.json` (each reward,
each answer defect, entropy, KL, completion length), `completions/` (the sampled texts) and a manifest.
MM-R5, section 3.3. The reward formulas are in mmr5_train/ranking/rewards.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic import Field
from trl import GRPOConfig, GRPOTrainer

from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError, read_records
from mmr5_train.evaluation.alarms import Action, read_alarms
from mmr5_train.inference.vllm_engine import engine_settings
from mmr5_train.models.lengths import (
    Fitting,
    TokenLimit,
    context_limit,
    count_tokens,
    image_sizes,
    leave_out_too_long,
    lowest,
    setting_limit,
)
from mmr5_train.models.loading import load_model, load_processor, vision_token_ids
from mmr5_train.models.sampling import end_token_ids, rollout_settings
from mmr5_train.models.settings import Settings
from mmr5_train.ranking.answer import Defect, parse_answer
from mmr5_train.ranking.notes import page_verdicts
from mmr5_train.ranking.records import LocalId, Order, PromptedTask, RankingTask
from mmr5_train.ranking.rewards import GROUP_REWARDS, REWARDS, RewardConfig, follows_verdicts, score_group
from mmr5_train.training.adapters import lora_config, use_lora_plus
from mmr5_train.training.arguments import (
    check_group_sizes,
    rejected_settings_as_input_errors,
    trainer_arguments,
)
from mmr5_train.training.callbacks import AlarmCallback, FiniteGRPOTrainer, FiniteSharedGRPOTrainer
from mmr5_train.training.dataset import prompt_dataset
from mmr5_train.training.run import (
    TrainingStage,
    check_training_pages,
    finish_run,
    policy_settings,
    start_run,
    train,
)
from mmr5_train.training.shared_grpo import unsupported
from mmr5_train.training.sharing import sharing_of
from mmr5_train.training.vllm_rollouts import check_rollouts, engine_arguments, memory_share

VERDICT_METRICS = ("answers/true_verdicts", "answers/follow_verdicts")

RewardFunction = Callable[..., list[float | None]]
"""TRL's form of a reward: called with completions and the data set's columns, returns one value per completion."""


class GrpoStage(TrainingStage):
    """`python -m mmr5_train.grpo` (configs/grpo.yaml)."""

    data: Path = Field(description="ranking tasks, e.g. questions.jsonl of mmr5_train.select")
    order: Order = Field(default="shuffled", description="order of the candidates in a prompt")
    reward: RewardConfig
    max_prompt_length: int | None = Field(
        default=None,
        gt=0,
        description="largest number of tokens of a prompt; null: what the model's context allows",
    )
    shared_prefix: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="compute each prompt once for its group of completions. auto: if the settings allow it; "
        "always: raise an error if they do not",
    )
    alarms: Action = Field(default="warn", description="what an alarm of mmr5_train.evaluation.alarms does")
    trainer: dict[str, Any] = Field(description="fields of trl.GRPOConfig")


def main(config: GrpoStage) -> None:
    tasks = read_records(config.data, RankingTask)[: config.limit]
    check_training_pages(config, tasks)
    prompted = [task.in_prompt_order(config.order, config.seed) for task in tasks]
    policy = policy_settings("grpo", config)
    policy = policy if policy.think else replace(policy, verdicts=False)
    config.reward.check_verdicts(policy.verdicts, config.model.path)
    processor = load_processor(policy.model)
    arguments = grpo_arguments(config, policy, processor)
    fitting, longest_prompt = leave_out_long_prompts(config, arguments, policy, processor, prompted)
    prompted = [prompted[i] for i in fitting.indices]
    if arguments.use_vllm and arguments.vllm_max_model_length is None:
        # vLLM would reserve memory for the model's whole context.
        arguments.vllm_max_model_length = longest_prompt + (arguments.max_completion_length or 0)
    run = start_run("grpo", config, policy, arguments, processor, fitting)
    model = load_model(policy.model)
    if arguments.use_vllm and arguments.vllm_mode == "colocate":
        set_memory_share(config, arguments, model, longest_prompt)
    trainer = make_trainer(config, arguments, policy, processor, model, prompted)
    if policy.verdicts is False and trainer.accelerator.is_main_process:
        print("grpo: the model writes no verdicts on pages: they are not logged, and no alarm watches them")
    train(run, trainer, progress={"reward": "reward", "kl": "kl", "entropy": "entropy"})
    counts = {"tasks": len(prompted), "alarms": len(read_alarms(config.out))}
    finish_run(run, trainer, counts=counts, metric="reward")


def leave_out_long_prompts(
    config: GrpoStage, arguments: GRPOConfig, policy: Settings, processor: Any, prompted: Sequence[PromptedTask]
) -> tuple[Fitting, int]:
    """The questions that fit, and the tokens of the longest prompt among them. Raises `InputError` for too few."""
    sizes = image_sizes((page for p in prompted for page in p.shown), config.data.parent)
    queries, shown = [p.task.query for p in prompted], [p.shown for p in prompted]
    lengths = count_tokens(processor, policy.prompt, queries, shown, sizes)
    query_ids, limit = [p.task.query_id for p in prompted], prompt_limit(config, arguments)
    fitting = leave_out_too_long(config.data, query_ids, lengths, limit, config.max_too_long)
    return fitting, max(lengths[i].prompt for i in fitting.indices)


def make_trainer(
    config: GrpoStage,
    arguments: GRPOConfig,
    policy: Settings,
    processor: Any,
    model: Any,
    prompted: Sequence[PromptedTask],
) -> GRPOTrainer:
    """The trainer of the model on the questions, with rewards, logs and alarms."""
    end_ids = end_token_ids(processor.tokenizer)
    model.generation_config.eos_token_id = end_ids  # TRL ends completions at these tokens
    dataset = prompt_dataset(
        [
            {
                "query_id": p.task.query_id,
                "pages": len(p.shown),
                "positives": list(p.local_positives),
                "reference": list(p.reference_order),
            }
            for p in prompted
        ],
        [p.task.query for p in prompted],
        [p.shown for p in prompted],
        config.data.parent,
        policy.prompt,
        processor,
        open_pages=False,
    )
    rewards = [reward_function(name, policy.think) for name in config.reward.weights]
    logger = answer_logger(policy.think, policy.verdicts, config.order == "shuffled", set(end_ids))
    engine = engine_arguments(**engine_settings(policy.model, processor))
    with rejected_settings_as_input_errors("grpo"), engine:
        trainer = trainer_class(config.shared_prefix, model, arguments)(
            model=model,
            reward_funcs=[*rewards, logger],
            args=arguments,
            train_dataset=dataset,
            processing_class=processor,
            peft_config=lora_config(policy.model),
        )
    use_lora_plus(trainer, policy.model)
    if arguments.use_vllm:
        check_rollouts(trainer, [processor.image_token_id], vision_token_ids(processor))
    if config.alarms != "off":
        trainer.add_callback(AlarmCallback(config.out, config.alarms))
    return trainer


def set_memory_share(config: GrpoStage, arguments: GRPOConfig, model: Any, longest_prompt: int) -> None:
    """Sets trainer.vllm_gpu_memory_utilization from the data, unless the config gives it."""
    if "vllm_gpu_memory_utilization" in config.trainer or not torch.cuda.is_available():
        return
    rollouts = arguments.per_device_train_batch_size * (arguments.steps_per_generation or 1)
    arguments.vllm_gpu_memory_utilization = memory_share(
        model,
        -(-rollouts // (arguments.num_generations or 1)),
        rollouts,
        longest_prompt,
        arguments.vllm_max_model_length or longest_prompt,
        torch.cuda.mem_get_info()[1],
    )
    print(f"grpo: vLLM takes {arguments.vllm_gpu_memory_utilization:.0%} of the GPU's memory")


def prompt_limit(config: GrpoStage, arguments: GRPOConfig) -> TokenLimit | None:
    """The largest number of tokens of a prompt: its completions need space in the model's context, too."""
    completion = {"trainer.max_completion_length": arguments.max_completion_length or 0}
    vllm_length = arguments.vllm_max_model_length if arguments.use_vllm else None
    return lowest(
        setting_limit("max_prompt_length", config.max_prompt_length),
        context_limit(config.model.path, completion),
        setting_limit("trainer.vllm_max_model_length", vllm_length, completion),
    )


def grpo_arguments(config: GrpoStage, policy: Settings, processor: Any) -> GRPOConfig:
    """TRL's config: the user's fields, the reward weights, and how rollouts are sampled.

    Raises `InputError` for settings that can't work.
    """
    check_group_sizes(config.trainer)
    if config.trainer.get("dataloader_num_workers"):
        raise InputError(
            f"trainer.dataloader_num_workers: expected 0, found {config.trainer['dataloader_num_workers']}: in "
            "grpo, threads of the training process open the pages"
        )
    values = {
        "log_multimodal": False,  # TRL would send all page images to all ranks
        **rollout_settings(config.trainer, processor),
        "reward_weights": [*config.reward.weights.values(), 0.0],  # the last one is `answer_logger`
    }
    return trainer_arguments(GRPOConfig, values, out=config.out, seed=config.seed, model=policy.model)


def trainer_class(choice: str, model: Any, arguments: GRPOConfig) -> type[GRPOTrainer]:
    """The trainer that shares prompts within a group, if the settings allow it, otherwise TRL's own trainer.

    Prints which one, with its arrangement or the reason. Raises `InputError` if `choice` is "always" and the
    settings do not allow it.
    """
    reason = "shared_prefix=never" if choice == "never" else unsupported(model, arguments)
    if reason and choice == "always":
        raise InputError(f"shared_prefix=always: {reason}")
    if PartialState().is_main_process:
        arrangement = f"not shared within a group: {reason}" if reason else f"shared: {sharing_of(arguments)}"
        print(f"grpo: prompts are {arrangement}", flush=True)
    return FiniteGRPOTrainer if reason else FiniteSharedGRPOTrainer


def reward_function(name: str, think: bool) -> RewardFunction:
    """A ranking reward in TRL's form."""

    def reward(
        completions: list[Any],
        query_id: list[str],
        pages: list[int],
        positives: list[list[LocalId]],
        reference: list[list[LocalId]],
        **_: Any,
    ) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        rows: list[Any] = list(zip(query_id, texts, pages, positives, reference, strict=True))
        first = 0
        if name in GROUP_REWARDS:  # the completions of a prompt may be on several ranks
            first = PartialState().process_index * len(rows)
            rows = gather_object(rows)
        rows_by_query: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            rows_by_query.setdefault(row[0], []).append(i)
        values: list[float | None] = [None] * len(rows)
        for group in rows_by_query.values():
            _, _, n, relevant, order = rows[group[0]]
            group_texts = [rows[i][1] for i in group]
            scores = score_group(name, group_texts, n, relevant, order, expect_think=think)
            for i, score in zip(group, scores, strict=True):
                values[i] = score
        return values[first : first + len(texts)]

    reward.__name__ = name  # TRL logs a reward under its function's name
    return reward


def answer_logger(think: bool, verdicts: bool | None, shuffled: bool, end_ids: set[int]) -> RewardFunction:
    """A reward of weight 0 that logs properties of the answers. The alarms read these metrics.

    `defects/*` and `answers/*` are shares of completions, with two exceptions: `answers/reranking` is the mean
    reranking reward, and `answers/true_verdicts` a share of pages. `VERDICT_METRICS` are logged unless `verdicts`,
    which says whether the model writes verdicts, is False. `first/<i>` is the share of answers that rank the page
    at prompt position i first.
    """

    def no_defect(
        completions: list[Any],
        completion_ids: list[list[int]],
        pages: list[int],
        positives: list[list[LocalId]],
        log_metric: Any,
        **_: Any,
    ) -> list[float | None]:
        metrics_by_answer: list[dict[str, float]] = []
        for completion, ids, n, relevant in zip(completions, completion_ids, pages, positives, strict=True):
            cut_off = not ids or ids[-1] not in end_ids
            text = completion[0]["content"]
            metrics_by_answer.append(
                answer_metrics(text, n, relevant, cut_off, think=think, verdicts=verdicts, shuffled=shuffled)
            )
        for key in dict.fromkeys(key for metrics in metrics_by_answer for key in metrics):
            log_metric(key, fmean(metrics[key] for metrics in metrics_by_answer if key in metrics))
        return [metrics["answers/without_defect"] for metrics in metrics_by_answer]

    return no_defect


def answer_metrics(
    text: str,
    n: int,
    positives: list[LocalId],
    cut_off: bool,
    *,
    think: bool,
    verdicts: bool | None,
    shuffled: bool,
) -> dict[str, float]:
    """Metrics of one completion about `n` pages. Metrics that do not apply to it are omitted."""
    answer = parse_answer(text, n, cut_off=cut_off, expect_think=think)
    metrics = {f"defects/{defect.value}": float(defect in answer.defects) for defect in Defect}
    metrics["answers/without_defect"] = float(not answer.defects)
    metrics["answers/complete"] = float(answer.is_complete_permutation)
    metrics["answers/reranking"] = REWARDS["reranking"](text, n, positives, expect_think=think)
    if verdicts is not False:
        stated = page_verdicts(answer.think or "", n)
        true_share = sum(helps == (i in positives) for i, helps in stated.items()) / n
        follows = float(bool(stated) and follows_verdicts(answer.ids, stated))
        metrics |= dict(zip(VERDICT_METRICS, (true_share, follows), strict=True))
    if shuffled and answer.ids:
        metrics |= {f"first/{i}": float(answer.ids[0] == i) for i in range(1, n + 1)}
    return metrics


if __name__ == "__main__":
    run_stage(main, GrpoStage, "grpo")
