"""The settings of a checkpoint: those of a config, and those in its reranker.json. Loads no torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode, Record

SETTINGS = "reranker.json"
"""File in each checkpoint of this project, with its prompt, page sizes and dtype (`RerankerSettings`)."""

MAX_NEW_TOKENS = 2048
"""Default limit on the tokens of an answer in the stages: MM-R5's `max_completion_length`."""


def answer_tokens(n_pages: int, *, think: bool) -> int:
    """The limit on the tokens of an answer of `Reranker`, unless one is given: it follows the number of pages.

    Each page has 128 tokens for its note, twice what the notes of a teacher take, and 8 for its place in the list.
    """
    return (256 + 136 * n_pages) if think else (32 + 8 * n_pages)


MAX_SCORED_PAGES = 100
"""Limit on the pages of a prompt in mode logits."""

LogitsOrder = Literal["first_place", "place_by_place"]
"""How mode logits orders pages: by the probability that a page comes first, which one forward pass gives, or place
by place, with a short pass for each."""

Dtype = Literal["float32", "bfloat16", "float16"]


class LoraSettings(BaseModel):
    """Low-rank adapters on the language model (PEFT)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(gt=0)
    alpha: int = Field(gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    plus_ratio: float | None = Field(
        default=None,
        ge=1,
        description="LoRA+ (arXiv 2402.12354): learning rate of B divided by that of A; null: equal",
    )
    target_modules: str | list[str] = Field(
        default=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        description="a regular expression or a list of module names",
    )


class ModelOptions(BaseModel):
    """Config group `model`: the checkpoint to load, and the size of its page images.

    Page sizes and dtype that are null are the checkpoint's own (`mmr5_train.models.settings`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        default="tiny",
        description='a checkpoint folder, a hub id, or "tiny" for the model in this package; evaluate and select '
        "name their checkpoints elsewhere and do not read it",
    )
    min_pixels: int | None = Field(default=None, gt=0, description="smallest area of a page image, in pixels")
    max_pixels: int | None = Field(default=None, gt=0, description="largest area of a page image, in pixels")
    dtype: Dtype | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    freeze_vision: bool = True
    load_in_4bit: bool = Field(
        default=False, description="QLoRA (arXiv 2305.14314): base model in NF4, vision tower not quantized"
    )
    device_map: Literal["auto"] | None = Field(
        default=None,
        description="auto: spread a model that does not fit one GPU over all of them, in one process, and what is "
        "left over CPU memory; null: the whole model on one device",
    )
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> Self:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must be at most max_pixels ({self.max_pixels})")
        if self.device_map and self.load_in_4bit:
            raise ValueError("load_in_4bit and device_map exclude each other; 4 bits need a quarter of the memory")
        return self


class ModelConfig(ModelOptions):
    """`ModelOptions` with page sizes and dtype: what loads a model and its processor."""

    path: str
    min_pixels: int = Field(gt=0)
    max_pixels: int = Field(gt=0)
    dtype: Dtype


class CheckpointOptions(BaseModel):
    """Fields of the stages that run a checkpoint. null: what its reranker.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelOptions = ModelOptions()
    prompt: Prompt | None = Field(
        default=None, description="null: the prompt that the checkpoint was trained with"
    )
    think: bool | None = Field(
        default=None, description="whether answers have a think block; null: as the checkpoint was trained"
    )
    override_checkpoint: bool = Field(
        default=False,
        description="use the model, prompt and think of this config where the checkpoint's reranker.json has "
        "others; false: that is an error",
    )


class BackendOptions(BaseModel):
    """What runs a checkpoint in this process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["transformers", "vllm"] = Field(
        default="transformers", description="transformers, or vLLM's offline engine"
    )
    vllm: dict[str, Any] = Field(
        default={}, description="arguments of vllm.LLM for backend vllm, e.g. tensor_parallel_size: 4"
    )

    @field_validator("vllm", mode="before")
    @classmethod
    def _no_arguments(cls, arguments: Any) -> Any:
        return {} if arguments is None else arguments  # the default is null, so that Hydra can add names

    @model_validator(mode="after")
    def _arguments_are_used(self) -> Self:
        if self.vllm and self.backend != "vllm":
            raise ValueError("vllm is read with backend: vllm only")
        return self


class Adaptive(Record):
    """When mode adaptive reasons: if the two best scores of mode logits differ by less than `margin`."""

    pages: int = Field(default=5, ge=2, description="how many of the first pages it reasons about")
    margin: float | None = Field(
        default=None,
        ge=0,
        description="null: the one in the checkpoint's reranker.json, chosen on held-out questions (`calibrate`)",
    )


class RerankerSettings(Record):
    """reranker.json: the settings that a checkpoint was trained with and needs at inference."""

    min_pixels: int = Field(description="a smaller page is enlarged to this many pixels")
    max_pixels: int = Field(description="a larger page is shrunk to this many pixels")
    dtype: str = Field(description="`float32`, `bfloat16` or `float16`")
    think: bool = Field(description="whether the checkpoint was trained to write a think block")
    verdicts: bool | None = Field(
        default=None,
        description="whether its think block states a verdict on each page (`notes.read_verdict`); null: unknown",
    )
    prompt: Prompt = Field(description="the prompt it was trained with")
    step: int | None = Field(default=None, description="optimizer step of the checkpoint")
    steps: int | None = Field(default=None, description="optimizer steps of its training run")
    heldout_recall: float | None = Field(
        default=None, description="recall@1 on the held-out questions by which it was chosen; null: not chosen"
    )

    adaptive: Adaptive | None = Field(default=None, description="of mode adaptive; null: not calibrated")

    @property
    def mode(self) -> Mode:
        """The default inference mode."""
        return "reason" if self.think else "direct"

    @property
    def origin(self) -> str:
        """Which checkpoint of its training run this is, in words; empty if unknown."""
        if self.step is None:
            return ""
        recall = self.heldout_recall
        chosen = "" if recall is None else f", the best by held-out recall@1 ({recall:.3f})"
        return f"step {self.step} of {self.steps}{chosen}"

    def to_model_config(self, path: str) -> ModelConfig:
        """The config that loads the checkpoint, which is at `path`."""
        return ModelConfig(path=path, **self.model_dump(include={"min_pixels", "max_pixels", "dtype"}))
