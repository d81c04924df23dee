"""Supervised fine-tuning on reasoning traces, with TRL's SFTTrainer.

    python -m mmr5_train.sft data=outputs/traces/traces.jsonl out=outputs/sft
    accelerate launch --config_file configs/accelerate/cpu.yaml -m mmr5_train.sft …

Reads traces (data_construction.traces). Writes `model/` (the merged checkpoint), `adapter/` with LoRA,
`log_history.json` and a manifest. Only completion tokens contribute to the loss. MM-R5, section 3.2.

The checkpoint's reranker.json records whether most of the trained think blocks state a verdict on each page. Later
stages read it there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from trl import SFTConfig

from mmr5_train.common.config import run_stage
from mmr5_train.common.files import read_records
from mmr5_train.models.lengths import (
    context_limit,
    count_tokens,
    image_sizes,
    leave_out_too_long,
    lowest,
    setting_limit,
)
from mmr5_train.models.loading import load_model, load_processor
from mmr5_train.ranking.notes import page_verdicts
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Trace
from mmr5_train.training.adapters import lora_config, use_lora_plus
from mmr5_train.training.arguments import rejected_settings_as_input_errors, trainer_arguments
from mmr5_train.training.callbacks import FiniteSFTTrainer
from mmr5_train.training.dataset import prompt_dataset
from mmr5_train.training.run import (
    TrainingStage,
    check_training_pages,
    finish_run,
    normalize_loss_by_tokens,
    policy_settings,
    start_run,
    train,
)


class SftStage(TrainingStage):
    """`python -m mmr5_train.sft` (configs/sft.yaml)."""

    data: Path = Field(description="traces.jsonl")
    trainer: dict[str, Any] = Field(description="fields of trl.SFTConfig")


def main(config: SftStage) -> None:
    traces = read_records(config.data, Trace)[: config.limit]
    check_training_pages(config, traces)
    policy = policy_settings("sft", config)
    sizes = image_sizes((page for trace in traces for page in trace.shown), config.data.parent)
    processor = load_processor(policy.model)
    arguments = trainer_arguments(SFTConfig, config.trainer, out=config.out, seed=config.seed, model=policy.model)
    completions = [render_completion(trace.think if policy.think else None, trace.answer) for trace in traces]
    queries, shown = [trace.query for trace in traces], [trace.shown for trace in traces]
    lengths = count_tokens(processor, policy.prompt, queries, shown, sizes, completions)
    limit = lowest(setting_limit("trainer.max_length", arguments.max_length), context_limit(config.model.path))
    query_ids = [trace.query_id for trace in traces]
    fitting = leave_out_too_long(config.data, query_ids, lengths, limit, config.max_too_long)
    traces = [traces[i] for i in fitting.indices]
    with_verdicts = sum(states_verdicts(trace) for trace in traces) if policy.think else 0
    policy = replace(policy, verdicts=2 * with_verdicts > len(traces))
    run = start_run("sft", config, policy, arguments, processor, fitting)

    model = load_model(policy.model)
    dataset = prompt_dataset(
        [{"completion": [{"role": "assistant", "content": completions[i]}]} for i in fitting.indices],
        [queries[i] for i in fitting.indices],
        [shown[i] for i in fitting.indices],
        config.data.parent,
        policy.prompt,
        processor,
    )
    with rejected_settings_as_input_errors("sft"):
        trainer = FiniteSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=processor,
            peft_config=lora_config(policy.model),
        )
    normalize_loss_by_tokens(trainer)
    use_lora_plus(trainer, policy.model)
    if trainer.accelerator.is_main_process and with_verdicts < len(traces):
        print(f"sft: {with_verdicts} of {len(traces)} answers state a verdict on each page", flush=True)

    train(run, trainer, progress={"loss": "loss", "mean_token_accuracy": "token accuracy"})
    finish_run(run, trainer, counts={"traces": len(traces), "with_verdicts": with_verdicts}, metric="loss")


def states_verdicts(trace: Trace) -> bool:
    """Whether the think block of a trace states a verdict on each page. Refined reasoning states none."""
    return len(page_verdicts(trace.think, len(trace.shown))) == len(trace.shown)


if __name__ == "__main__":
    run_stage(main, SftStage, "sft")
