"""Loads checkpoints and processors, in the same way for training, evaluation and inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import cached_file, is_bitsandbytes_available, is_flash_attn_2_available

from mmr5_train.common.files import InputError, validation_message
from mmr5_train.models.config import SETTINGS, Dtype, ModelConfig, RerankerSettings
from mmr5_train.models.vision_speed import batch_windows

TINY = Path(__file__).parent / "tiny"
"""The tiny model that is part of this package."""


def read_settings(checkpoint: str | Path) -> RerankerSettings | None:
    """The settings in a checkpoint of this project; None for a checkpoint that another project wrote.

    Raises `InputError` if the settings can't be read.
    """
    source = str(checkpoint) if is_adapter(checkpoint) else resolve_checkpoint(checkpoint)
    try:
        path = cached_file(source, SETTINGS, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise _loading_error(str(checkpoint), SETTINGS, error) from None
    if path is None:
        return None
    try:
        settings = RerankerSettings.model_validate_json(Path(path).read_bytes())
        settings.to_model_config(str(checkpoint))
    except ValidationError as error:
        raise InputError(f"{path}: {validation_message(error)}; train again, or correct the file") from None
    return settings


def writes_verdicts(checkpoint: str) -> bool | None:
    """Whether the model's think block states a verdict on each page, as its settings record; None: unknown."""
    settings = read_settings(checkpoint)
    return settings.verdicts if settings else None


def resolve_checkpoint(path: str | Path) -> str:
    """The folder or hub id that `path` refers to. Raises `InputError` for a folder that is not a checkpoint."""
    if str(path) == "tiny":
        return str(TINY)
    folder = Path(path)
    if folder.is_dir():
        if is_adapter(folder):
            raise InputError(
                f"{folder}: holds an adapter without its base; use the merged checkpoint next to it (model/), or "
                "merge it with PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
            )
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: is not a checkpoint, since it has no config.json")
    elif str(path).startswith((".", "/", "outputs/")):
        raise InputError(f"{folder}: no such checkpoint folder; run the stage that writes it first")
    return str(path)


def load_processor(config: ModelConfig, path: str | Path | None = None) -> Any:
    """The checkpoint's processor with the page sizes of `config`. It pads prompts on the left."""
    processor = _load_processor(resolve_checkpoint(path or config.path))
    processor.image_processor.size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor.tokenizer.padding_side = "left"
    return processor


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer. Raises `InputError` if it can't be loaded."""
    source = resolve_checkpoint(path)
    _load_config(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _loading_error(source, "tokenizer", error) from None


def default_model_config(path: str) -> ModelConfig:
    """The config for a checkpoint without reranker.json: the page sizes of its image processor and its dtype.

    If its config.json has no dtype: bfloat16 on a GPU, float32 on a CPU.
    """
    source = resolve_checkpoint(path)
    size = _load_processor(source).image_processor.size
    dtype: Dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    own_dtypes: dict[Any, Dtype] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    dtype = own_dtypes.get(_load_config(source).dtype, dtype)
    return ModelConfig(path=path, dtype=dtype, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])


def _load_processor(source: str) -> Any:
    # Load the config first to fail early: without a network, AutoProcessor requests each possible file five times.
    _load_config(source)
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _loading_error(source, "processor", error) from None
    if not hasattr(processor, "image_processor"):
        raise InputError(f"{source}: has no image processor; expected a vision-language checkpoint")
    _check_image_processor(source, processor.image_processor)
    return processor


def _check_image_processor(source: str, image_processor: Any) -> None:
    """Raises `InputError` for an image processor that resizes pages by another rule than `pages.page_size`."""
    size = getattr(image_processor, "size", None)
    missing = [
        *(name for name in ("patch_size", "merge_size") if getattr(image_processor, name, None) is None),
        *(f"size[{name!r}]" for name in ("shortest_edge", "longest_edge") if _entry(size, name) is None),
    ]
    if missing:
        raise InputError(
            f"{source}: its {type(image_processor).__name__} has no {', '.join(missing)}, so it resizes pages by "
            "another rule than Qwen's image processors, which is not supported in this process. Serve the "
            "checkpoint with vLLM, and use server={url: …, model: …} with model.min_pixels and model.max_pixels"
        )


def _entry(size: Any, name: str) -> Any:
    try:
        return size[name]
    except (KeyError, TypeError):
        return None


def load_model(config: ModelConfig, path: str | Path | None = None) -> Any:
    """The checkpoint's model in the dtype of `config`, with a frozen vision tower if `config` says so.

    Of the checkpoint's generation_config, only the token ids are kept. Its sampling settings would change what
    `generate` samples (`mmr5_train.models.sampling`), also on a server that loads the trained checkpoint.

    Raises `InputError` if the checkpoint can't be loaded or is not a vision-language model.
    """
    source = resolve_checkpoint(path or config.path)
    model_type = _load_config(source).model_type
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            attn_implementation=choose_attention(config),
            quantization_config=_quantization_config(config),
        )
    except (OSError, SafetensorError) as error:
        raise _loading_error(source, "model", error) from None
    except ValueError as error:
        raise InputError(f"{source}: not a vision-language model ({_first_line(error)})") from None
    if torch.cuda.is_available():
        batch_windows(model)
    own = model.generation_config
    token_ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**token_ids)
    if config.freeze_vision:
        if not hasattr(model, "model") or not hasattr(model.model, "visual"):
            raise InputError(f"{source}: model type {model_type} has no vision tower at model.visual to freeze")
        model.model.visual.requires_grad_(False)
    return model


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and no full checkpoint."""
    folder = Path(path)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def adapter_base(adapter: str | Path) -> str:
    """The checkpoint that an adapter was trained on, according to its adapter_config.json."""
    path = Path(adapter) / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: has no base_model_name_or_path; give base=…")
    return base


def load_merged(config: ModelConfig, adapter: str | Path) -> Any:
    """The config's model with an adapter merged into it. Raises `InputError` for an adapter that does not fit."""
    from peft import PeftModel  # takes seconds to import, and only adapters need it

    base = load_model(config.model_copy(update={"load_in_4bit": False}))  # merging needs unquantized weights
    try:
        return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{adapter}: does not fit its base {config.path} ({_first_line(error)})") from None


def choose_attention(config: ModelConfig) -> str:
    """The attention implementation: for "auto", flash attention if it is available for the dtype, else sdpa.

    Raises `InputError` if the config requires flash attention and it is not available.
    """
    is_available = torch.cuda.is_available() and is_flash_attn_2_available() and config.dtype != "float32"
    if config.attention == "flash_attention_2" and not is_available:
        raise InputError(
            "model.attention=flash_attention_2: needs a CUDA GPU, the package flash-attn and a 16-bit dtype; "
            f"found {'a' if torch.cuda.is_available() else 'no'} GPU, flash-attn "
            f"{'' if is_flash_attn_2_available() else 'not '}installed, {config.dtype}; use auto or sdpa"
        )
    if config.attention != "auto":
        return config.attention
    return "flash_attention_2" if is_available else "sdpa"


def _quantization_config(config: ModelConfig) -> BitsAndBytesConfig | None:
    if not config.load_in_4bit:
        return None
    if not is_bitsandbytes_available():
        raise InputError("model.load_in_4bit: needs bitsandbytes: in the checkout, pip install '.[quantize]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=[r"model\.visual", "lm_head"],  # despite its name, it also applies to 4 bits
    )


def vision_token_ids(processor: Any) -> list[int]:
    """Ids of the tokens that represent images. If one of them were sampled, the next forward pass would fail."""
    tokenizer = processor.tokenizer
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[name] for name in names if name in vocabulary}
    ids.update(i for i in (processor.image_token_id, getattr(processor, "video_token_id", None)) if i is not None)
    return sorted(ids)


def _load_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _loading_error(source, "config", error) from None


def _loading_error(source: str, part: str, error: BaseException) -> InputError:
    if Path(source).is_dir():
        return InputError(f"{source}: its {part} can't be loaded ({_first_line(error)}); write the folder again")
    return InputError(
        f"{source}: is not a folder, and as a hub id its {part} can't be loaded ({_first_line(error)}); correct "
        "the path, or download the checkpoint on a machine with a network"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
