"""The settings that a recipe's stages take from the checkpoints of earlier stages, before any stage has run.

A stage takes the prompt, page sizes, dtype and think block from its checkpoint (`mmr5_train.models.settings`). In
a recipe, that checkpoint often does not exist yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr5_train.common.config import StageConfig
from mmr5_train.common.files import InputError
from mmr5_train.evaluate import EvaluateStage
from mmr5_train.inference.systems import checkpoint_options
from mmr5_train.models.config import CheckpointOptions
from mmr5_train.models.loading import read_settings
from mmr5_train.models.settings import RECORDED_MODEL_FIELDS, contradictions, stated_settings
from mmr5_train.ranking.prompt import read_prompt
from mmr5_train.select import SelectStage
from mmr5_train.training.run import TrainingStage

NOTHING = stated_settings(CheckpointOptions())


def inherit_settings(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages of a recipe, in order, with the settings that each takes from its checkpoint.

    A setting stays null if it is known only when the checkpoint is loaded: the page sizes of a base model's image
    processor, for example. Raises `InputError` if a stage contradicts its checkpoint.
    """
    written: dict[Path, dict[str, Any]] = {}  # output folder of a training stage → what its checkpoint will state
    inherited = {}
    for name, stage in stages.items():
        inherited[name] = stage
        if not isinstance(stage, CheckpointOptions):
            continue
        own: dict[str, Any] = NOTHING
        for checkpoint, options in checkpoints(stage):
            own = written.get(Path(checkpoint).parent) or existing_settings(checkpoint)
            for field, value, other in contradictions(stated_settings(options), own):
                if not stage.override_checkpoint:
                    raise InputError(
                        f"stages.{name}.{field}: found {value}, but {checkpoint} is trained with {other}; omit "
                        f"the setting, or set stages.{name}.override_checkpoint=true"
                    )
        values = {field: own[field] if value is None else value for field, value in stated_settings(stage).items()}
        if isinstance(stage, TrainingStage):
            values |= {"think": values["think"] is not False, "prompt": values["prompt"] or read_prompt("default")}
            written[stage.out] = values
        model = {name: values[f"model.{name}"] for name in RECORDED_MODEL_FIELDS}
        inherited[name] = stage.model_copy(
            update={
                "model": stage.model.model_copy(update=model),
                "think": values["think"],
                "prompt": values["prompt"],
            }
        )
    return inherited


def checkpoints(stage: CheckpointOptions) -> list[tuple[str, CheckpointOptions]]:
    """The checkpoints that a stage runs, each with the settings that the stage has for it."""
    if isinstance(stage, EvaluateStage):
        systems = stage.systems.values()
        return [(s.checkpoint, checkpoint_options(s, stage)) for s in systems if s.checkpoint]
    if isinstance(stage, SelectStage):
        checkpoint = stage.difficulty and stage.difficulty.checkpoint
        return [(checkpoint, stage)] if checkpoint else []
    return [(stage.model.path, stage)]


def existing_settings(checkpoint: str) -> dict[str, Any]:
    """What the reranker.json of a checkpoint in a folder says; nothing for other checkpoints."""
    is_folder = checkpoint == "tiny" or Path(checkpoint).is_dir()
    recorded = read_settings(checkpoint) if is_folder else None
    return stated_settings(recorded) if recorded else NOTHING
