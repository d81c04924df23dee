"""The steps that SFT, GRPO and distillation share.

Each stage calls them in this order:

    policy = policy_settings("sft", config)                          # what the checkpoint says, and the config
    run = start_run("sft", config, policy, arguments, processor, fitting)    # output folder, checkpoint to resume
    trainer = …                                                      # differs between the stages
    train(run, trainer, progress={"loss": "loss"})
    finish_run(run, trainer, counts={"traces": 100}, metric="loss")  # checkpoint, manifest, one line on stdout
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState
from pydantic import Field, model_validator
from transformers import PrinterCallback, ProgressCallback, Trainer
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from mmr5_train.common.config import StageConfig
from mmr5_train.common.environment import is_first_process
from mmr5_train.common.files import InputError, run_settings, write_manifest, write_records
from mmr5_train.evaluation.splits import check_split
from mmr5_train.models.config import SETTINGS, CheckpointOptions
from mmr5_train.models.lengths import Fitting, check_all_fit, context_limit, count_tokens, image_sizes
from mmr5_train.models.loading import read_settings
from mmr5_train.models.settings import Settings, resolve_settings
from mmr5_train.ranking.prompt import Prompt, read_prompt
from mmr5_train.ranking.records import Candidate, Ranking, RankingTask, Trace
from mmr5_train.training.adapters import (
    count_trainable_parameters,
    keep_float32_weights,
    run_frozen_tower_without_gradients,
)
from mmr5_train.training.callbacks import HeldOutCallback, HeldOutConfig, held_out_callback
from mmr5_train.training.checkpoints import (
    MarkComplete,
    ResumeSampler,
    keep_parameter_names,
    open_training_output,
)
from mmr5_train.training.progress import ProgressLine
from mmr5_train.training.saving import MODEL, best_checkpoint_counts, full_disk_as_input_error, save_result

# TRL's rule for which devices compute logits only at labeled positions. Later TRL versions may not have it.
_trl_rule: Any = getattr(trl_utils, "_use_triton", None)


class TrainingStage(StageConfig, CheckpointOptions):
    """Fields that sft, grpo and distill share."""

    data: Path
    limit: int | None = Field(default=None, gt=0, description="use only the first records")
    max_too_long: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="largest share of examples that are left out because they have too many tokens; with more, "
        "the stage stops before it loads the model",
    )
    any_split: bool = Field(default=False, description="allow training on documents of the split heldout")
    heldout: HeldOutConfig | None = None
    trainer: dict[str, Any]

    @model_validator(mode="after")
    def _is_not_spread(self) -> Self:
        if self.model.device_map is not None:
            raise ValueError(
                "model.device_map is for inference; to train a model that does not fit one GPU, launch with zero3"
            )
        return self


@dataclass(frozen=True)
class TrainingRun:
    """A stage whose settings are valid and whose output folder is open."""

    stage: str
    config: TrainingStage
    policy: Settings  # how the checkpoint is loaded, its prompt, and what its answers contain
    processor: Any
    settings: dict[str, Any]  # must be equal in a stopped run and the run that resumes it
    checkpoint: Path | None  # the checkpoint to resume from
    held_out: HeldOutCallback | None
    fitting: Fitting  # the examples that are not too long


def check_training_pages(config: TrainingStage, records: Iterable[RankingTask | Trace | Ranking]) -> None:
    """Raises `InputError` if a record is about a held-out document, unless the config allows it."""
    documents = (page.doc_name for record in records for page in pages_of(record))
    check_split(config.data, documents, training=True, any_split=config.any_split)


def pages_of(record: RankingTask | Trace | Ranking) -> Sequence[Candidate]:
    return record.candidates if isinstance(record, RankingTask) else record.shown


def policy_settings(stage: str, config: TrainingStage) -> Settings:
    """The settings of the checkpoint that a stage trains (`resolve_settings`).

    If neither the checkpoint nor the config has a prompt, as with a base model, it is trained with the prompt
    `default`, and a line on stdout says so.
    """
    settings = resolve_settings(config.model.path, config, default_prompt=read_prompt("default"))
    if config.prompt is None and read_settings(config.model.path) is None and is_first_process():
        print(
            f"{stage}: {config.model.path} has no {SETTINGS}; it is trained with the prompt `default`", flush=True
        )
    return settings


def start_run(
    stage: str, config: TrainingStage, policy: Settings, arguments: Any, processor: Any, fitting: Fitting
) -> TrainingRun:
    """Opens the output folder, or finds the checkpoint to resume from in the folder of a stopped run.

    Call it after all checks of the user's settings, because with overwrite=true it deletes an earlier result. The
    examples that `fitting` leaves out are listed in skipped.jsonl.
    """
    held_out = held_out_callback(config.heldout, arguments, processor, policy.prompt, policy.think)
    if held_out is not None:
        check_held_out_lengths(held_out, config.model.path, processor, policy.prompt)
    settings = run_settings(config) | {"resolved": policy.to_record().model_dump(mode="json")}
    inputs = [config.data, Path(config.model.path)]
    checkpoint = open_training_output(config.out, config.overwrite, inputs, stage, settings)
    if fitting.skipped and PartialState().is_main_process:
        write_records(config.out / "skipped.jsonl", fitting.skipped)
        print(f"{stage}: {fitting.message}; listed in {config.out / 'skipped.jsonl'}", flush=True)
    return TrainingRun(stage, config, policy, processor, settings, checkpoint, held_out, fitting)


def check_held_out_lengths(held_out: HeldOutCallback, path: str, processor: Any, prompt: Prompt) -> None:
    """Raises `InputError` if a held-out question and its answer do not fit the context of the model at `path`."""
    config, prompted = held_out.config, held_out.prompted
    queries, shown = [p.task.query for p in prompted], [p.shown for p in prompted]
    sizes = image_sizes((page for pages in shown for page in pages), config.data.parent)
    counts = count_tokens(processor, prompt, queries, shown, sizes)
    limit = context_limit(path, {"heldout.max_new_tokens": config.max_new_tokens})
    check_all_fit(f"heldout: {config.data}", [p.task.query_id for p in prompted], counts, limit)


def normalize_loss_by_tokens(trainer: Trainer) -> None:
    """Divides an SFT step's loss by the number of tokens in the whole step, over all ranks and micro-batches.

    The Qwen-VL model classes declare that they do not accept this count. TRL accepts it, and computes the loss
    itself.
    """
    if trainer.args.world_size * trainer.args.gradient_accumulation_steps > 1:
        trainer.model_accepts_loss_kwargs = True


def labeled_positions_only(device: torch.device) -> bool:
    """Whether TRL's LM head computes logits only at labeled positions. Extends TRL's rule to CPUs.

    Where Triton is missing, TRL computes logits at all positions, because some devices compile each new shape. On
    a CPU that takes two fifths of an SFT step, mostly for prompt tokens, whose loss is multiplied by 0.
    """
    return device.type == "cpu" or bool(_trl_rule(device))


def train(run: TrainingRun, trainer: Trainer, progress: dict[str, str]) -> None:
    """Trains from `run.checkpoint` or from the start. `progress` maps log keys to labels of the progress line.

    Raises `InputError` if the data set does not fill one batch: TRL would train nothing, without a message.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLine(run.stage, progress))
    trainer.add_callback(MarkComplete(run.settings))
    if run.held_out is not None:
        run.held_out.trainer = trainer
        trainer.add_callback(run.held_out)
    if isinstance(trainer, GRPOTrainer):
        trainer.add_callback(ResumeSampler())
    keep_float32_weights(trainer, run.policy.model)
    keep_parameter_names(trainer.model)
    run_frozen_tower_without_gradients(trainer)
    if _trl_rule is not None:
        trl_utils._use_triton = labeled_positions_only  # TRL has no setting for it
    if trainer.accelerator.is_main_process:
        if run.checkpoint is not None:
            print(f"{run.stage}: resumes from {run.checkpoint}", flush=True)
        print(f"{run.stage}: {_describe(trainer)}", flush=True)
    with full_disk_as_input_error(run.config.out):
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    if trainer.state.global_step == 0:
        size = len(trainer.train_dataset)  # type: ignore[arg-type]
        raise InputError(
            f"{run.stage}: {size} examples do not fill one batch, so no step was taken; use more data, or a "
            "smaller trainer.per_device_train_batch_size or trainer.gradient_accumulation_steps"
        )


def finish_run(run: TrainingRun, trainer: Trainer, counts: dict[str, Any], metric: str) -> None:
    """Saves the result, writes the manifest and prints one line. Call on all ranks.

    The first entry of `counts` is the size of the data ("traces", "tasks", …), which the line shows. `metric` is
    the log key whose first and last value the line shows.
    """
    config, policy, state = run.config, run.policy, trainer.state
    parameters = count_trainable_parameters(trainer)
    choose = config.heldout.choose if config.heldout else "last"
    result = save_result(trainer, run.processor, policy.model, policy.to_record(), config.out, choose)
    if not trainer.accelerator.is_main_process:
        return
    facts = {"steps": state.global_step, "trained_parameters": parameters}
    facts |= {"processes": trainer.accelerator.num_processes}
    write_manifest(
        config.out,
        stage=run.stage,
        config=config.model_dump(mode="json"),
        inputs=[config.data],
        resolved=policy.to_record().model_dump(mode="json"),
        counts=counts | facts | run.fitting.counts | {"model_step": result.step} | best_checkpoint_counts(trainer),
    )
    values = [entry[metric] for entry in state.log_history if metric in entry]
    change = f"{metric.replace('_', ' ')} {values[0]:.3f} → {values[-1]:.3f}, " if values else ""
    name, size = next(iter(counts.items()))
    chosen = f"{result.origin} " if config.heldout else ""
    print(
        f"{run.stage}: {size} {name}, {state.global_step} steps, {parameters:,} parameters, "
        f"{change}{chosen}in {config.out / MODEL}"
    )


def _describe(trainer: Trainer) -> str:
    args, model = trainer.args, trainer.model
    config: Any = model.config  # type: ignore[union-attr]
    processes = trainer.accelerator.num_processes
    launch = trainer.accelerator.distributed_type.value.lower()
    return (
        f"{processes} process{'es' * (processes > 1)} ({launch}) × batch {args.per_device_train_batch_size} × "
        f"accumulation {args.gradient_accumulation_steps} on {args.device.type}; attention: "
        f"{config.text_config._attn_implementation}"
    )
