"""Which settings run a checkpoint: its own, unless the config says otherwise.

A checkpoint of this project records in reranker.json the prompt, page sizes and dtype that it was trained with,
and whether it writes a think block. Every stage that runs a checkpoint, `Reranker` and the server call
`resolve_settings`, which has one rule:

- A setting that the config leaves null is that of reranker.json.
- A setting of the config that contradicts reranker.json is an `InputError`, unless `override_checkpoint` is set.
- A checkpoint without reranker.json, such as a published base model, has the page sizes of its image processor and
  the dtype of its config.json. Settings of the config replace them. Its prompt must be given;
  the training stages use `default` if it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmr5_train.common.files import InputError, validation_message
from mmr5_train.models.config import (
    SETTINGS,
    CheckpointOptions,
    ModelConfig,
    ModelOptions,
    RerankerSettings,
)
from mmr5_train.models.loading import adapter_base, default_model_config, is_adapter, read_settings
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode

RECORDED_MODEL_FIELDS = ("min_pixels", "max_pixels", "dtype")


@dataclass(frozen=True)
class Settings:
    """What runs a checkpoint: how to load it, its prompt, and what its answers contain."""

    model: ModelConfig
    prompt: Prompt
    think: bool
    """Whether it writes a think block."""
    verdicts: bool | None = None
    """Whether the think block states a verdict on each page. None: unknown."""

    def to_record(self) -> RerankerSettings:
        """The content of reranker.json."""
        sizes: dict[str, Any] = {name: getattr(self.model, name) for name in RECORDED_MODEL_FIELDS}
        return RerankerSettings(think=self.think, verdicts=self.verdicts, prompt=self.prompt, **sizes)


def resolve_settings(
    checkpoint: str | Path,
    options: CheckpointOptions,
    *,
    base: str | None = None,
    default_prompt: Prompt | None = None,
) -> Settings:
    """The settings that run `checkpoint`, which may be an adapter of the checkpoint `base`.

    `default_prompt` is the prompt of a checkpoint without reranker.json, if `options` has none.
    Raises `InputError` if a setting of `options` contradicts the checkpoint, or if the prompt is unknown.
    """
    adapter = base is not None or is_adapter(checkpoint)
    path = base or adapter_base(checkpoint) if adapter else str(checkpoint)
    recorded = read_settings(checkpoint)
    prompt = options.prompt or (default_prompt if recorded is None else recorded.prompt)
    if prompt is None:
        raise InputError(
            f"{checkpoint}: has no {SETTINGS}, so the prompt it was trained with is unknown; give "
            'prompt="default", or the prompt that scripts/import_prompt.py wrote'
        )
    if recorded is None:
        return Settings(
            complete_model(options.model.model_copy(update={"path": path})), prompt, options.think is not False
        )
    if not options.override_checkpoint:
        for field, given, own in contradictions(stated_settings(options), stated_settings(recorded)):
            raise InputError(
                f"{field}: found {given}, but {checkpoint} was trained with {own} ({SETTINGS}); omit the setting, "
                "or set override_checkpoint=true to use it nevertheless"
            )
    own_model = recorded.to_model_config(path)
    think = recorded.think if options.think is None else options.think
    return Settings(merge_model(options.model, own_model), prompt, think, recorded.verdicts)


def complete_model(options: ModelOptions) -> ModelConfig:
    """The config that loads `options.path`: `options`, completed by the checkpoint's own page sizes and dtype.

    The checkpoint is read only if `options` lacks one of them.
    """
    if all(getattr(options, name) is not None for name in RECORDED_MODEL_FIELDS):
        return ModelConfig(**options.model_dump())
    recorded = None if is_adapter(options.path) else read_settings(options.path)
    own = default_model_config(options.path) if recorded is None else recorded.to_model_config(options.path)
    return merge_model(options, own)


def merge_model(options: ModelOptions, own: ModelConfig) -> ModelConfig:
    """`options` with the path of `own`, and its page sizes and dtype where `options` has null."""
    missing = {name: getattr(own, name) for name in RECORDED_MODEL_FIELDS if getattr(options, name) is None}
    try:
        return ModelConfig(**options.model_dump() | missing | {"path": own.path})
    except ValidationError as error:
        raise InputError(f"model: {validation_message(error)}; {own.path} has the other limit") from None


def stated_settings(source: CheckpointOptions | RerankerSettings) -> dict[str, Any]:
    """What a config or a reranker.json says about a checkpoint, by field of a config. None: it does not say."""
    model = source.model if isinstance(source, CheckpointOptions) else source
    stated = {f"model.{name}": getattr(model, name) for name in RECORDED_MODEL_FIELDS}
    return {**stated, "think": source.think, "prompt": source.prompt}


def contradictions(given: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields each field that differs between two results of `stated_settings`, with both values as text."""
    for field, value in given.items():
        other = own[field]
        if value is None or other is None or value == other:
            continue
        if not isinstance(value, Prompt):
            yield field, str(value).lower(), str(other).lower()
            continue
        for name in Prompt.model_fields:  # two prompts with the same texts may have different names
            if name != "name" and getattr(value, name) != getattr(other, name):
                yield field, *(f"{p.name} ({name}: {getattr(p, name)!r:.80})" for p in (value, other))  # type: ignore[misc]
                break


def resolve_mode(mode: Mode | None, settings: Settings, checkpoint: str | Path, *, override: bool = False) -> Mode:
    """The inference mode: `mode`, by default the one that the checkpoint was trained for.

    Raises `InputError` if a checkpoint without think blocks should write them, and `override` is not set.
    """
    if mode == "reason" and not settings.think and not override:
        raise InputError(
            f"mode: reason expects a think block, but {checkpoint} was trained with think=false; omit the mode, "
            "or set override_checkpoint=true to use it nevertheless"
        )
    return mode or ("reason" if settings.think else "direct")
