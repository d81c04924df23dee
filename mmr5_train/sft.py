"""Supervised fine-tuning on reasoning traces, with TRL's SFTTrainer.

    python -m mmr5_train.sft data=outputs/traces/traces.jsonl out=outputs/sft
    accelerate launch --config_file configs/accelerate/cpu.yaml -m mmr5_train.sft …

Reads traces (data_construction.traces), writes `model/` (the merged checkpoint), `adapter/` with LoRA,
`log_history.json` and a manifest. The loss is on the completion alone. MM-R5, section 3.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from trl import SFTConfig

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import read_records, write_manifest
from mmr5_train.models.inputs import check_images
from mmr5_train.models.loading import ModelConfig, load_model, load_processor
from mmr5_train.ranking.prompt import Prompt, render_completion
from mmr5_train.ranking.records import Trace
from mmr5_train.training.callbacks import FiniteSFTTrainer, HeldOutConfig, held_out
from mmr5_train.training.checkpoints import open_training_output, run_settings
from mmr5_train.training.finetune import (
    MODEL,
    best_counts,
    lora_config,
    normalize_loss_by_tokens,
    prompt_dataset,
    save_result,
    settings_checked,
    train,
    trained_parameters,
    trainer_arguments,
    use_lora_plus,
)


class SftStage(StageConfig):
    """`python -m mmr5_train.sft` (configs/sft.yaml)."""

    data: Path = Field(description="traces.jsonl")
    limit: int | None = Field(default=None, gt=0, description="use the first so many traces")
    think: bool = Field(default=True, description="teach the think block; false: the answer alone")
    model: ModelConfig
    prompt: Prompt
    heldout: HeldOutConfig | None = None
    trainer: dict[str, Any] = Field(description="fields of trl.SFTConfig")


def main(config: SftStage) -> None:
    traces = read_records(config.data, Trace)[: config.limit]
    check_images((page for trace in traces for page in trace.shown), config.data.parent)
    processor = load_processor(config.model)
    arguments = trainer_arguments(SFTConfig, config.trainer, out=config.out, seed=config.seed, model=config.model)
    watch = held_out(config.heldout, arguments, processor, config.prompt, config.think)
    # Only now: what the user got wrong must not cost an earlier result that is to be overwritten.
    settings = run_settings(config)
    inputs = [config.data, Path(config.model.path)]
    checkpoint = open_training_output(config.out, config.overwrite, inputs, "sft", settings)
    model = load_model(config.model)
    completions = [render_completion(trace.think if config.think else None, trace.answer) for trace in traces]
    dataset = prompt_dataset(
        [{"completion": [{"role": "assistant", "content": text}]} for text in completions],
        [trace.query for trace in traces],
        [trace.shown for trace in traces],
        config.data.parent,
        config.prompt,
        processor,
    )
    with settings_checked("sft"):
        trainer = FiniteSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=processor,
            peft_config=lora_config(config.model),
        )
    normalize_loss_by_tokens(trainer)
    use_lora_plus(trainer, config.model)
    trained = trained_parameters(trainer)
    shown = {"loss": "loss", "mean_token_accuracy": "token accuracy"}
    train(trainer, "sft", shown, settings, checkpoint, watch)
    save_result(trainer, processor, config.model, config.prompt, config.think, config.out)
    if trainer.accelerator.is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        learned = f"loss {losses[0]:.3f} → {losses[-1]:.3f}, " if losses else ""
        counts = {"traces": len(traces), "steps": trainer.state.global_step, "trained_parameters": trained}
        counts |= {"processes": trainer.accelerator.num_processes} | best_counts(trainer)
        write_manifest(
            config.out, stage="sft", config=config.model_dump(mode="json"), inputs=[config.data], counts=counts
        )
        print(
            f"sft: {len(traces)} traces, {trainer.state.global_step} steps, {trained:,} parameters, "
            f"{learned}in {config.out / MODEL}"
        )


if __name__ == "__main__":
    run_stage(main, SftStage, "sft")
