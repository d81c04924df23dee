"""Settings of the server. This module imports neither FastAPI nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmr5_train.ranking.prompt import Prompt

API_KEY = "MMR5_API_KEY"
"""Environment variable with the key that clients must send. If it is unset, the server requires no key."""

MB = 1_000_000


class Limits(BaseModel):
    """Limits on one request, and on the number of requests at the same time."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    body_mb: float = Field(default=32, gt=0, description="megabytes of a rerank request, including base64")
    pdf_mb: float = Field(default=50, gt=0, description="megabytes of a PDF")
    pages: int = Field(default=50, ge=1, description="pages in a request, and pages rendered from a PDF")
    megapixels: float = Field(default=40, gt=0, le=120, description="of one page image, checked before decoding")
    visual_tokens: int = Field(
        default=65_536, ge=1, description="of all pages of a request, as the model reads them"
    )
    query_chars: int = Field(default=2000, ge=1)
    requests: int = Field(default=64, ge=1, description="largest number of requests in progress")
    seconds: float = Field(
        default=120, gt=0, description="time limit of a request, from its first byte to the response"
    )


class ServeConfig(BaseModel):
    """Settings of `python -m mmr5_train.serve` (configs/serve.yaml)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    checkpoint: str = Field(description="a model folder written by sft or grpo, or a Hugging Face hub id")
    name: str | None = Field(
        default=None, min_length=1, description="the model's name in responses; null: the checkpoint"
    )
    prompt: Prompt | None = Field(default=None, description="for a checkpoint that does not store its own prompt")
    override_checkpoint: bool = Field(
        default=False, description="use this prompt and mode even if the checkpoint was trained with others"
    )
    mode: Literal["reason", "direct", "logits", "adaptive"] | None = Field(
        default=None, description="null: the mode the checkpoint was trained for"
    )
    max_new_tokens: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=2, description="pages in one prompt")
    stride: int | None = Field(default=None, ge=1, description="pages that the window moves by")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free port")
    folder: Path | None = Field(default=None, description="requests may name image files inside this folder")
    batch_size: int = Field(default=8, ge=1, description="requests ranked in one batch")
    batch_pages: int = Field(
        default=64, ge=1, description="pages in one batch, which are in memory together; one request may have more"
    )
    wait_ms: float = Field(default=20, ge=0, description="how long a request waits for others to share its batch")
    shutdown_s: float = Field(default=30, ge=0, description="time to finish the current batch on shutdown")
    request_log: Literal["INFO", "WARNING"] = Field(
        default="WARNING", description="INFO: write one JSON line for each request to stderr"
    )
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"folder: {self.folder} is not a folder; create it, or omit folder=…")
        return self

    @property
    def model_name(self) -> str:
        return self.name or self.checkpoint
