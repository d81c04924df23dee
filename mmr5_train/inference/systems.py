"""The systems that an evaluation compares: this project's rerankers, cross-encoders and rerank endpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import Field, field_serializer, field_validator, model_validator

from mmr5_train.chat.dialect import Dialect
from mmr5_train.common.config import config_path
from mmr5_train.inference.options import RankingOptions
from mmr5_train.inference.remote import RemoteBackend, ServerConfig
from mmr5_train.inference.reranker import Reranker
from mmr5_train.inference.scorers import (
    CrossEncoderOptions,
    CrossEncoderScorer,
    EndpointOptions,
    EndpointScorer,
    PointwiseReranker,
)
from mmr5_train.models.config import MAX_NEW_TOKENS, BackendOptions, CheckpointOptions
from mmr5_train.ranking.prompt import read_prompt

FIRST_STAGE = "first_stage"
LoadedSystem = Reranker | PointwiseReranker
KINDS = ("checkpoint", "crossencoder", "endpoint")


class System(RankingOptions):
    """A reranker to evaluate. Options that are not set here have the stage's values."""

    checkpoint: str | None = Field(
        default=None,
        description="a folder, a hub id, an adapter, or an option of configs/model, which stands for its path; "
        "optional with a server",
    )
    base: str | None = Field(default=None, description="the checkpoint that an adapter belongs to")
    server: ServerConfig | None = None
    prompt: str | None = Field(default=None, description="an option of configs/prompt or a file, for this system")
    crossencoder: CrossEncoderOptions | None = Field(
        default=None, description="a pointwise reranker instead of a checkpoint: an option of configs/crossencoder"
    )
    endpoint: EndpointOptions | None = Field(default=None, description="a rerank endpoint instead of a checkpoint")

    @field_validator("checkpoint")
    @classmethod
    def _option_of_model(cls, checkpoint: str | None) -> str | None:
        if checkpoint is None or "/" in checkpoint or Path(checkpoint).exists():
            return checkpoint
        option = config_path("model", checkpoint)
        return str(OmegaConf.select(OmegaConf.load(option), "path")) if option else checkpoint

    @field_validator("crossencoder", mode="before")
    @classmethod
    def _option_of_crossencoder(cls, crossencoder: Any) -> Any:
        """The name of an option, a path or hub id, or `{name: …}` with fields that replace the option's."""
        if isinstance(crossencoder, str):
            crossencoder = {"name": crossencoder}
        if not isinstance(crossencoder, dict) or "name" not in crossencoder:
            return crossencoder
        fields = {key: value for key, value in crossencoder.items() if key != "name"}
        option = config_path("crossencoder", crossencoder["name"])
        known = OmegaConf.to_container(OmegaConf.load(option)) if option else {"path": crossencoder["name"]}
        return {**known, **fields}  # type: ignore[dict-item]

    @model_validator(mode="after")
    def _is_one_kind(self) -> System:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if self.server is not None and "checkpoint" not in kinds:
            kinds.append("server")
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none of them"
            raise ValueError(f"expected a checkpoint, a server, a crossencoder or an endpoint, found {found}")
        return self


class SystemsOptions(CheckpointOptions, BackendOptions):
    """Fields of the stages that evaluate systems."""

    systems: dict[str, System] = Field(
        description="name → checkpoint, or {checkpoint: …, mode: …, server: …}, {crossencoder: …} or "
        "{endpoint: …}, in the order of comparison"
    )
    constrain: bool = Field(
        default=False, description="constrain answers to a list of all pages; false: count malformed answers"
    )
    batch_size: int = Field(gt=0, description="completions per batch")
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, gt=0)

    @field_validator("systems", mode="before")
    @classmethod
    def _expand_checkpoint_paths(cls, systems: Any) -> Any:
        if not isinstance(systems, dict):
            return {} if systems is None else systems  # the default is null, so that Hydra can add names
        return {
            name: {"checkpoint": system} if isinstance(system, str) else system for name, system in systems.items()
        }

    @field_serializer("systems")
    def _without_defaults(self, systems: dict[str, System]) -> dict[str, Any]:
        """Only the fields that were set. The others have the stage's values, not the defaults of `System`."""
        set_fields = {name: system.model_dump(mode="json", exclude_unset=True) for name, system in systems.items()}
        return {
            name: fields["checkpoint"] if fields.keys() == {"checkpoint"} else fields
            for name, fields in set_fields.items()
        }

    @field_validator("systems")
    @classmethod
    def _names_are_file_names(cls, systems: dict[str, System]) -> dict[str, System]:
        for name in systems:
            if name == FIRST_STAGE or not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(
                    f"{name!r} can't name a system: expected letters, digits and _ . + -, and not {FIRST_STAGE}"
                )
        return systems


def load_system(system: System, config: SystemsOptions, device: str) -> LoadedSystem:
    """The reranker of a system."""
    if system.crossencoder is not None:
        size = ranking_options(system, config)["batch_size"]
        return PointwiseReranker(CrossEncoderScorer(system.crossencoder, batch_size=size, device=device))
    if system.endpoint is not None:
        return PointwiseReranker(EndpointScorer(system.endpoint))
    options = checkpoint_options(system, config)
    return Reranker(
        system.checkpoint,
        base=system.base,
        server=system.server,
        model=options.model,
        prompt=options.prompt,
        override_checkpoint=options.override_checkpoint,
        device=device,
        **ranking_options(system, config),
    )


def ranking_options(system: System, config: SystemsOptions) -> dict[str, Any]:
    """How a system ranks: its own options, and the stage's for those that it does not set."""
    shared = {"constrain", "max_new_tokens", "batch_size", "backend", "vllm"}
    options = {"window": None, **config.model_dump(include=shared)}
    if config.think is not None:
        options["mode"] = "reason" if config.think else "direct"
    options |= system.model_dump(include=set(RankingOptions.model_fields), exclude_unset=True)
    if options["backend"] != "vllm" and not system.vllm:
        options["vllm"] = {}
    return options


def checkpoint_options(system: System, config: SystemsOptions) -> CheckpointOptions:
    """The stage's settings of checkpoints, with the system's own prompt."""
    options = CheckpointOptions.model_validate(config.model_dump(include=set(CheckpointOptions.model_fields)))
    return options.model_copy(update={"prompt": read_prompt(system.prompt)}) if system.prompt else options


def learned_dialect(system: LoadedSystem) -> Dialect | None:
    """The request fields that a system's server takes, as learned so far."""
    is_remote = isinstance(system, Reranker) and isinstance(system.backend, RemoteBackend)
    return system.backend.dialect if is_remote else None  # type: ignore[union-attr]
