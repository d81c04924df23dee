"""What a user may say about the server. Knows neither FastAPI nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmr5_train.ranking.prompt import Prompt

API_KEY = "MMR5_API_KEY"
"""The environment variable with the key that callers must show; without it none is asked for."""

MB = 1_000_000


class Limits(BaseModel):
    """How much one request may ask for, and how many may be in the house."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    body_mb: float = Field(default=32, gt=0, description="megabytes of a rerank request, base64 included")
    pdf_mb: float = Field(default=50, gt=0, description="megabytes of a PDF")
    pages: int = Field(default=50, ge=1, description="pages of a request, and pages rendered of a PDF")
    megapixels: float = Field(default=40, gt=0, le=120, description="of one page picture, checked before decoding")
    query_chars: int = Field(default=2000, ge=1)
    requests: int = Field(default=64, ge=1, description="in the house at once: read, waiting or ranked")
    seconds: float = Field(default=120, gt=0, description="from a request's first byte to its answer")


class ServeConfig(BaseModel):
    """`python -m mmr5_train.serve` (configs/serve.yaml)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    checkpoint: str = Field(description="a folder such as sft and grpo write, or a hub id")
    name: str | None = Field(
        default=None, min_length=1, description="the model's name in answers; null: checkpoint"
    )
    prompt: Prompt | None = Field(default=None, description="of a checkpoint that does not say its own")
    mode: Literal["reason", "direct", "logits"] | None = Field(default=None, description="null: as trained")
    max_new_tokens: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=2, description="pages of one prompt")
    stride: int | None = Field(default=None, ge=1, description="pages that a window moves on by")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0: any that is free")
    folder: Path | None = Field(default=None, description="requests may name pictures inside it")
    batch_size: int = Field(default=8, ge=1, description="requests ranked together")
    wait_ms: float = Field(default=20, ge=0, description="how long a request waits for others to join it")
    shutdown_s: float = Field(default=30, ge=0, description="given to what is being ranked when the server stops")
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _folder_is_there(self) -> Self:
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"folder: {self.folder} is no folder; make it, or leave folder=… out")
        return self

    @property
    def model_name(self) -> str:
        return self.name or self.checkpoint
