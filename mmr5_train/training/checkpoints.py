"""Checkpoints of a training: whole or not counted, and gone on from exactly.

A checkpoint is a folder `checkpoint-<step>` as transformers' Trainer writes it (adapter or model, optimizer,
scheduler, random states), with `whole.json` in it: the stage's settings, written last. What a kill left without
that file is thrown away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from mmr5_train.common.files import InputError, file_hash, is_unfinished, open_output, write_json

WHOLE = "whole.json"
KEPT = 2  # with one, the last whole checkpoint would be gone while its successor is not yet marked


def run_settings(config: Any) -> dict[str, Any]:
    """What must be the same where a stopped run goes on: the stage's config, and the bytes of its data."""
    settings = config.model_dump(mode="json", exclude={"out", "overwrite"})
    return settings | {"data": f"{config.data}, sha256 {file_hash(config.data)}"}


def open_training_output(
    out: Path, overwrite: bool, inputs: Sequence[Path], stage: str, settings: dict[str, Any]
) -> Path | None:
    """The output folder, made or emptied by one process while the others wait.

    Returns the checkpoint from which a stopped run of the stage goes on, None where there is none. Raises
    `InputError` where the run that was stopped had other settings.
    """
    processes = PartialState()
    if processes.is_main_process:
        last = last_checkpoint(out)
        if overwrite or last is None or not is_unfinished(out, stage):
            open_output(out, overwrite, inputs=inputs, stage=stage)
        else:
            check_settings(out, json.loads((last / WHOLE).read_text(encoding="utf-8")), settings)
            for folder in out.glob("checkpoint-*"):
                if not (folder / WHOLE).is_file():
                    shutil.rmtree(folder)
    processes.wait_for_everyone()
    return last_checkpoint(out)


def last_checkpoint(out: Path) -> Path | None:
    """The whole checkpoint with the most steps."""
    whole = [path.parent for path in out.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def check_settings(out: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f"{out}: holds a run that was stopped and had another {name}: {theirs.get(name)}, now "
                f"{ours.get(name)}; give the same settings to go on, or overwrite=true to begin anew"
            )


def check_saving(arguments: Any) -> None:
    """Raises `InputError` for settings under which a stopped run could not go on exactly."""
    if arguments.save_strategy == "no":
        return
    if arguments.save_total_limit is not None and arguments.save_total_limit < KEPT:
        raise InputError(
            f"trainer.save_total_limit: expected {KEPT} or more, found {arguments.save_total_limit}: the last "
            "whole checkpoint must stay until the next one is whole"
        )
    if isinstance(arguments, GRPOConfig) and arguments.save_strategy == "steps":
        # Between two updates on one rollout, the completions would be lost.
        slices = arguments.steps_per_generation or arguments.gradient_accumulation_steps
        cycle = max(1, slices * arguments.num_iterations // arguments.gradient_accumulation_steps)
        if arguments.save_steps % cycle:
            below = int(arguments.save_steps // cycle * cycle)
            raise InputError(
                f"trainer.save_steps: expected a multiple of {cycle}, the steps on one rollout "
                f"(steps_per_generation × num_iterations / gradient_accumulation_steps), found "
                f"{arguments.save_steps:g}; the nearest are {below or cycle} and {below + cycle}"
            )


def keep_names(model: Any) -> None:
    """Makes checkpoints of a whole model keep its parameters' names.

    A Qwen2.5-VL is saved under the names of its first release, and transformers' Trainer, which reads a checkpoint
    back by name, passes over those it doesn't know: it would go on from the base model's weights.
    """
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]


class MarkComplete(TrainerCallback):
    """Writes `whole.json` into a checkpoint once every process has written its part."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE, self.settings)


class ResumeSampler(TrainerCallback):
    """Gives each epoch the order of prompts that TRL's sampler gives it in a run that is never stopped.

    That sampler draws an epoch's order from the generator that the epoch before left behind, so that a run that
    goes on in the second epoch would see the order of the first.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        sampler = train_dataloader.batch_sampler
        while not isinstance(
            sampler, RepeatSampler
        ):  # in the batch sampler, which may be one of a process's shard
            sampler = getattr(sampler, "batch_sampler", None) or sampler.sampler
        sampler.generator.manual_seed(args.seed)
        for _epoch in range(int(state.epoch or 0)):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
