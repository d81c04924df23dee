"""TRL's config objects from the `trainer` section of a stage's config."""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mmr5_train.common.files import InputError
from mmr5_train.models.config import ModelConfig
from mmr5_train.training.checkpoints import check_saving


def trainer_arguments(
    arguments_class: type[TrainingArguments], values: dict[str, Any], *, out: Path, seed: int, model: ModelConfig
) -> Any:
    """Builds `arguments_class` (SFTConfig or GRPOConfig) from `values`, which may set any of its fields.

    Raises `InputError` for an unknown field (with the nearest known ones), for a value that TRL rejects, for a
    field that the stage sets itself, and for save settings that would prevent an exact resume.
    """
    _check_fields(arguments_class, values)
    fixed: dict[str, Any] = {
        "output_dir": str(out),
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,  # the data set's transform and the reward functions read these columns
        "bf16": model.dtype == "bfloat16",
        "fp16": model.dtype == "float16",
    }
    overridden = sorted(set(values) & set(fixed))
    if overridden:
        raise InputError(
            f"trainer.{overridden[0]}: is set from the stage's out, seed and model.dtype; set it there"
        )
    try:
        arguments = arguments_class(**fixed, **(_device_settings() | values))
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {arguments_class.__name__} rejects these settings: {error}") from None
    check_saving(arguments)
    return arguments


def _check_fields(arguments_class: type[TrainingArguments], values: dict[str, Any]) -> None:
    """Raises `InputError` for unknown names, and for numeric fields without a number.

    TRL would fail on a wrong type much later, with a message that does not name the field.
    """
    fields = {field.name for field in dataclasses.fields(arguments_class)}
    hints = typing.get_type_hints(arguments_class)
    for name, value in values.items():
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=3)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
            raise InputError(f"trainer.{name}: {arguments_class.__name__} has no such field{hint}")
        types = set(typing.get_args(hints[name]) or [hints[name]])
        if types <= {int, float, type(None)} and not _is_number(value, types):
            number = "number" if float in types else "whole number"
            raise InputError(f"trainer.{name}: expected a {number}, found {value!r}")


def _is_number(value: Any, types: set[type]) -> bool:
    if value is None:
        return type(None) in types
    return isinstance(value, (int, float) if float in types else int) and not isinstance(value, bool)


def _device_settings() -> dict[str, Any]:
    """Defaults that depend on the machine and the launcher."""
    # Without use_cpu, processes on a machine without GPUs do not form one process group. DeepSpeed forms it.
    under_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    use_cpu = not torch.accelerator.is_available() and not under_deepspeed
    if use_cpu:  # otherwise DeepSpeed, which accelerate imports, prints a warning that it found no accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    settings: dict[str, Any] = {"dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": use_cpu}
    if under_deepspeed and not torch.accelerator.is_available():
        settings["ddp_backend"] = "gloo"  # accelerate needs it to count DeepSpeed's CPU processes
    return settings


def check_group_sizes(trainer: dict[str, Any]) -> None:
    """Raises `InputError`, with the nearest valid settings, if a rollout batch is not a whole number of groups."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch, group = trainer.get("per_device_train_batch_size", 8), trainer.get("num_generations", 8)
    steps_field = "steps_per_generation" if trainer.get("steps_per_generation") else "gradient_accumulation_steps"
    steps = trainer.get(steps_field, 1)
    if not all(isinstance(value, int) and value > 0 for value in (batch, group, steps)):
        return  # `trainer_arguments` reports values of the wrong type, field by field
    completions = batch * steps * processes
    if trainer.get("generation_batch_size") or completions % group == 0:
        return
    valid = {
        "per_device_train_batch_size": _nearest(batch, lambda n: n * steps * processes % group == 0),
        steps_field: _nearest(steps, lambda n: batch * n * processes % group == 0),
        "num_generations": _nearest(group, lambda n: n > 1 and completions % n == 0),
    }
    options = "; ".join(f"trainer.{key}={' or '.join(map(str, near))}" for key, near in valid.items() if near)
    raise InputError(
        f"trainer: {processes} process{'es' * (processes > 1)} × per_device_train_batch_size {batch} × "
        f"{steps_field} {steps} = {completions} completions per rollout, which is not a multiple of "
        f"num_generations {group}; nearest valid settings: {options}"
    )


def _nearest(value: int, is_valid: Callable[[int], bool]) -> list[int]:
    """The nearest valid numbers below and above `value`, up to ten times `value`."""
    below = next((n for n in range(value - 1, 0, -1) if is_valid(n)), None)
    above = next((n for n in range(value + 1, 10 * value + 1) if is_valid(n)), None)
    return [n for n in (below, above) if n is not None]


@contextmanager
def rejected_settings_as_input_errors(stage: str) -> Iterator[None]:
    """Raises `InputError` if TRL or PEFT rejects the settings. Wrap the construction of a trainer in it.

    TRL and PEFT check adapter and tracker settings only when the trainer is constructed.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        raise InputError(f"{stage}: TRL or PEFT rejects these settings: {error}") from error
