"""Training checkpoints: marking them complete, and resuming a stopped run from the last complete one.

A checkpoint is a folder `checkpoint-<step>` as transformers' Trainer writes it (adapter or model, optimizer,
scheduler, random states). `complete.json` is written into it last and holds the stage's settings. A checkpoint
without that file was interrupted; it is deleted when the run resumes.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from mmr5_train.common.files import (
    MANIFEST,
    InputError,
    check_settings,
    is_unfinished,
    open_output,
    write_json,
)
from mmr5_train.inference.processes import on_main_process, raise_on_all, wait_for

COMPLETE = "complete.json"
MIN_CHECKPOINTS = 2  # with 1, the last complete checkpoint would be deleted before the next one is complete


def open_training_output(
    out: Path, overwrite: bool, inputs: Sequence[Path], stage: str, settings: dict[str, Any]
) -> Path | None:
    """Creates or empties the output folder, or keeps the folder of a stopped run. Call on all ranks.

    Returns the checkpoint to resume from, or None. The main process decides it for all ranks, because file systems
    can show a checkpoint later on another machine. Raises `InputError` on all ranks if the stopped run had other
    settings, or if a rank does not see the folder.
    """
    name = on_main_process(lambda: _open_or_resume(out, overwrite, inputs, stage, settings))
    checkpoint = None if name is None else out / name
    expected = out / MANIFEST if checkpoint is None else checkpoint / COMPLETE
    problem = None
    if not wait_for(expected.is_file):
        problem = (
            f"{expected}: rank {PartialState().process_index} on {socket.gethostname()} can't see this file, but "
            "the main process can; put out on a file system that all machines share"
        )
    raise_on_all(problem)
    return checkpoint


def _open_or_resume(
    out: Path, overwrite: bool, inputs: Sequence[Path], stage: str, settings: dict[str, Any]
) -> str | None:
    """Opens the folder on the main process. Returns the name of the checkpoint to resume from, or None."""
    checkpoint = last_checkpoint(out)
    if overwrite or checkpoint is None or not is_unfinished(out, stage):
        open_output(out, overwrite, inputs=inputs, stage=stage)
        return None
    check_settings(out, json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")), settings)
    for folder in out.glob("checkpoint-*"):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder)
    return checkpoint.name


def last_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    complete = [path.parent for path in out.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def check_saving(arguments: Any) -> None:
    """Raises `InputError` for save settings with which a stopped run could not resume exactly."""
    if arguments.save_strategy == "no":
        return
    if arguments.save_total_limit is not None and arguments.save_total_limit < MIN_CHECKPOINTS:
        raise InputError(
            f"trainer.save_total_limit: expected {MIN_CHECKPOINTS} or more, found {arguments.save_total_limit}: "
            "the last complete checkpoint must stay until the next one is complete"
        )
    if isinstance(arguments, GRPOConfig) and arguments.save_strategy == "steps":
        # A checkpoint between two updates on the same rollouts would lose these rollouts.
        steps = arguments.steps_per_generation or arguments.gradient_accumulation_steps
        cycle = max(1, steps * arguments.num_iterations // arguments.gradient_accumulation_steps)
        if arguments.save_steps % cycle:
            below = int(arguments.save_steps // cycle * cycle)
            raise InputError(
                f"trainer.save_steps: expected a multiple of {cycle}, the optimizer steps per rollout batch "
                f"(steps_per_generation × num_iterations / gradient_accumulation_steps), found "
                f"{arguments.save_steps:g}; the nearest are {below or cycle} and {below + cycle}"
            )


def keep_parameter_names(model: Any) -> None:
    """Makes checkpoints of a full model (without adapters) keep the parameters' current names.

    transformers saves a Qwen2.5-VL under the parameter names of its first release. Its Trainer reads a checkpoint
    back by name and ignores unknown names, so a resumed run would start from the base model's weights.
    """
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]


class MarkComplete(TrainerCallback):
    """Writes `complete.json` into a checkpoint after every process has written its part."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, self.settings)


class ResumeSampler(TrainerCallback):
    """Gives each epoch of a resumed run the prompt order that an uninterrupted run would have.

    TRL's sampler draws the order of an epoch from the generator state that the previous epoch left. Without this
    callback a run that resumes in the second epoch would repeat the order of the first.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        sampler = train_dataloader.batch_sampler
        while not isinstance(sampler, RepeatSampler):  # batch samplers and process shards may wrap it
            sampler = getattr(sampler, "batch_sampler", None) or sampler.sampler
        sampler.generator.manual_seed(args.seed)
        for _epoch in range(int(state.epoch or 0)):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
