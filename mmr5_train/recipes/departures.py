"""Lists where a recipe departs from MM-R5 as published.

A recipe's stages are resolved completely: fields that neither the recipe nor the stage's config lists have TRL's
defaults. Each published setting (`mmr5_train.evaluation.published_settings`) is compared with the resolved value.
Settings without a published value are compared with those of the recipe `mm_r5`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from trl import GRPOConfig, SFTConfig

from mmr5_train.common.config import StageConfig
from mmr5_train.evaluation.published_settings import FACTS, NOT_STATED, Fact

Settings = dict[str, dict[str, Any]]
"""Stage → dotted name of a setting → its value."""

# Settings that are not compared with those of the recipe `mm_r5`: paths and seeds.
NOT_COMPARED = (
    "out",
    "data",
    "overwrite",
    "seed",
    "model.path",
    "seen",
    "questions",
    "systems",
    "exclude",
    "override_checkpoint",
)
TRAINER_ARGUMENTS = {"sft": SFTConfig, "grpo": GRPOConfig, "distill": SFTConfig}


def resolved_settings(name: str, stage: StageConfig) -> dict[str, Any]:
    """All settings of a stage, keyed by dotted name, with TRL's defaults for the fields that `trainer` omits."""
    values = stage.model_dump(mode="json")
    if name in TRAINER_ARGUMENTS:
        values["trainer"] = trainer_defaults(TRAINER_ARGUMENTS[name]) | values["trainer"]
    if name == "evaluate":
        values["decoding"] = "greedy"  # it has no setting; `samples` are answers besides the greedy one
    return dict(flatten(values))


def trainer_defaults(arguments_class: type) -> dict[str, Any]:
    """The plain default values of TRL's and transformers' training arguments."""
    defaults = {}
    for field in dataclasses.fields(arguments_class):
        default = getattr(
            field.default, "value", field.default
        )  # the value of an enum, such as a scheduler's name
        if default is None or isinstance(default, str | int | float | bool):
            defaults[field.name] = default
    return defaults


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def launch_settings(file: Path | None) -> dict[str, Any]:
    """Number of processes and ZeRO stage (0: none) of an accelerate config; one process without a file."""
    if file is None:
        return {"processes": 1, "zero_stage": 0}
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    zero_stage = (values.get("deepspeed_config") or {}).get("zero_stage", 0)
    return {"processes": values.get("num_processes", 1), "zero_stage": zero_stage}


def departures(settings: Settings, mm_r5: Settings) -> Iterator[str]:
    """Yields `stage.setting: value (MM-R5: published value, source): reason` for each difference.

    `mm_r5` are the settings of the recipe `mm_r5`. A reason is given if this recipe has its value.
    """
    facts = {(fact.stage, fact.field): fact for fact in FACTS}
    for name in dict.fromkeys([*settings, *mm_r5]):
        if name not in settings or name not in mm_r5:
            yield f"{name}: {'added' if name in settings else 'left out'}"
            continue
        published = {fact.field for fact in FACTS if fact.stage == name}
        for key in sorted(settings[name].keys() | mm_r5[name].keys() | published):
            value, recipe_value = settings[name].get(key), mm_r5[name].get(key)
            fact = facts.get((name, key))
            if fact is not None:
                yield from _departure(fact, value, recipe_value)
            elif value != recipe_value and not key.startswith(NOT_COMPARED):
                yield f"{name}.{key}: {value} (recipe mm_r5: {recipe_value})"


def _departure(fact: Fact, value: Any, recipe_value: Any) -> Iterator[str]:
    """The line of a published setting, if the value differs from the published one."""
    if isinstance(fact.value, int) and isinstance(value, list):
        value = len(value)  # the published number of subsets
    if value == fact.value:
        return
    reason = f": {fact.reason}" if fact.reason and value == recipe_value else ""
    published = fact.value if fact.value == NOT_STATED else f"{fact.value}, {fact.source}"
    yield f"{fact.stage}.{fact.field}: {value} (MM-R5: {published}){reason}"
