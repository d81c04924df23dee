"""Checkpoints and processors, loaded the same way by every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils import cached_file, is_bitsandbytes_available, is_flash_attn_2_available

from mmr5_train.common.files import InputError, validation_message
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode, Record

TINY = Path(__file__).parent / "tiny"
SETTINGS = "reranker.json"  # in a checkpoint that this project trained: its prompt, page sizes, dtype


class LoraChoice(BaseModel):
    """Low-rank adapters on the language model (PEFT)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(gt=0)
    alpha: int = Field(gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    plus_ratio: float | None = Field(
        default=None,
        ge=1,
        description="LoRA+ (arXiv 2402.12354): B learns so many times as fast as A; null: alike",
    )
    target_modules: str | list[str] = Field(
        default=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        description="a regular expression or a list of module names",
    )


class ModelConfig(BaseModel):
    """Config group `model`: what is loaded, and how large its page images are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description='a checkpoint folder, a hub id, or "tiny" for the shipped model')
    min_pixels: int = Field(gt=0, description="pixels a page image has at least")
    max_pixels: int = Field(gt=0, description="pixels a page image has at most")
    dtype: Literal["float32", "bfloat16", "float16"]
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    freeze_vision: bool = True
    load_in_4bit: bool = Field(
        default=False, description="QLoRA's base (arXiv 2305.14314): NF4, the tower as it is"
    )
    lora: LoraChoice | None = None

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must be at most max_pixels ({self.max_pixels})")
        return self


class RerankerSettings(Record):
    """reranker.json: what a checkpoint was taught to expect."""

    min_pixels: int
    max_pixels: int
    dtype: str
    think: bool
    prompt: Prompt

    @property
    def mode(self) -> Mode:
        """How the checkpoint is asked where nothing else is said."""
        return "reason" if self.think else "direct"

    def model(self, path: str) -> ModelConfig:
        """How the checkpoint is loaded."""
        return ModelConfig(path=path, **self.model_dump(include={"min_pixels", "max_pixels", "dtype"}))


def read_settings(checkpoint: str | Path) -> RerankerSettings | None:
    """The settings that a checkpoint of this project carries; None for one of other origin.

    Raises `InputError` where they can't be read.
    """
    source = str(checkpoint) if is_adapter(checkpoint) else resolve_checkpoint(checkpoint)
    try:
        found = cached_file(source, SETTINGS, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise _not_loaded(str(checkpoint), SETTINGS, error) from None
    if found is None:
        return None
    try:
        settings = RerankerSettings.model_validate_json(Path(found).read_bytes())
        settings.model(str(checkpoint))
    except ValidationError as error:
        raise InputError(f"{found}: {validation_message(error)}; train again, or mend the file") from None
    return settings


def resolve_checkpoint(path: str | Path) -> str:
    """The folder or hub id behind `path`. Raises `InputError` for a folder that is no checkpoint."""
    if str(path) == "tiny":
        return str(TINY)
    folder = Path(path)
    if folder.is_dir():
        if is_adapter(folder):
            raise InputError(
                f"{folder}: holds an adapter without its base; take the merged checkpoint beside it (model/), or "
                "merge it with PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
            )
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: holds no config.json, so it is no checkpoint")
    elif str(path).startswith((".", "/", "outputs/")):
        raise InputError(f"{folder}: no such checkpoint folder; run the stage that writes it first")
    return str(path)


def load_processor(config: ModelConfig, path: str | Path | None = None) -> Any:
    """The checkpoint's processor with the config's page size; prompts are padded on the left."""
    processor = _processor(resolve_checkpoint(path or config.path))
    processor.image_processor.size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor.tokenizer.padding_side = "left"
    return processor


def default_model(path: str) -> ModelConfig:
    """How a checkpoint of other origin is loaded: with its own page sizes, in bfloat16 on a GPU."""
    size = _processor(resolve_checkpoint(path)).image_processor.size
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if torch.cuda.is_available() else "float32"
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return ModelConfig(path=path, dtype=dtype, **limits)


def _processor(source: str) -> Any:
    _load_config(source)  # first: without a network, each file that a processor may have is asked for five times
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _not_loaded(source, "processor", error) from None
    if not hasattr(processor, "image_processor"):
        raise InputError(f"{source}: has no image processor; a vision-language checkpoint is needed")
    return processor


def load_model(config: ModelConfig, path: str | Path | None = None) -> Any:
    """The checkpoint's model in the config's dtype, with its vision tower frozen where asked for."""
    source = resolve_checkpoint(path or config.path)
    kind = _load_config(source).model_type
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            attn_implementation=choose_attention(config),
            quantization_config=_four_bits(config),
        )
    except (OSError, SafetensorError) as error:
        raise _not_loaded(source, "model", error) from None
    except ValueError as error:
        raise InputError(f"{source}: not a vision-language model ({_first_line(error)})") from None
    if config.freeze_vision:
        if not hasattr(model, "model") or not hasattr(model.model, "visual"):
            raise InputError(f"{source}: model type {kind} has no vision tower at model.visual to freeze")
        model.model.visual.requires_grad_(False)
    return model


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and no whole checkpoint."""
    folder = Path(path)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def base_of(adapter: str | Path) -> str:
    """The checkpoint that an adapter was trained on, as it says itself."""
    path = Path(adapter) / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: names no base_model_name_or_path; give base=…")
    return base


def load_merged(config: ModelConfig, adapter: str | Path) -> Any:
    """The config's model with an adapter merged into it."""
    base = load_model(config.model_copy(update={"load_in_4bit": False}))  # adapters don't merge into four bits
    try:
        return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{adapter}: does not fit its base {config.path} ({_first_line(error)})") from None


def choose_attention(config: ModelConfig) -> str:
    """Flash attention where it is installed and the dtype allows it, else PyTorch's own.

    Raises `InputError` where it is asked for and can't be had.
    """
    usable = torch.cuda.is_available() and is_flash_attn_2_available() and config.dtype != "float32"
    if config.attention == "flash_attention_2" and not usable:
        raise InputError(
            "model.attention=flash_attention_2: needs a CUDA GPU, the package flash-attn and 16 bits; "
            f"found {'a' if torch.cuda.is_available() else 'no'} GPU, flash-attn "
            f"{'' if is_flash_attn_2_available() else 'not '}installed, {config.dtype}; take auto, or sdpa"
        )
    if config.attention != "auto":
        return config.attention
    return "flash_attention_2" if usable else "sdpa"


def _four_bits(config: ModelConfig) -> BitsAndBytesConfig | None:
    if not config.load_in_4bit:
        return None
    if not is_bitsandbytes_available():
        raise InputError("model.load_in_4bit: needs bitsandbytes: in the checkout, pip install '.[quantize]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=[r"model\.visual", "lm_head"],  # despite its name, of every kind of quantization
    )


def vision_token_ids(processor: Any) -> list[int]:
    """Ids of the tokens that stand for pictures: a sampled one would break the next forward pass."""
    tokenizer = processor.tokenizer
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    known = tokenizer.get_vocab()
    ids = {known[name] for name in names if name in known}
    ids.update(i for i in (processor.image_token_id, getattr(processor, "video_token_id", None)) if i is not None)
    return sorted(ids)


def _load_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _not_loaded(source, "config", error) from None


def _not_loaded(source: str, what: str, error: BaseException) -> InputError:
    if Path(source).is_dir():
        return InputError(f"{source}: its {what} can't be loaded ({_first_line(error)}); write the folder again")
    return InputError(
        f"{source}: is no folder, and as a hub id its {what} can't be loaded ({_first_line(error)}); mend the "
        "path, or download the checkpoint where there is a network"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
