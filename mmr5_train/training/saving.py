"""Saves the result of a training run: the merged checkpoint, the adapter and the log history."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.integrations import unset_hf_deepspeed_config

from mmr5_train.common.files import InputError, atomic_folder, write_json
from mmr5_train.models.loading import SETTINGS, ModelConfig, load_merged, load_model
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.training.callbacks import HELD_OUT
from mmr5_train.training.checkpoints import last_checkpoint

MODEL = "model"  # the merged checkpoint
ADAPTER = "adapter"  # with LoRA: the adapter, not merged
BEST = "best"  # with held-out questions: the merged checkpoint that ranked them best
LOG_HISTORY = "log_history.json"


def save_result(
    trainer: Trainer,
    processor: Any,
    config: ModelConfig,
    prompt: Prompt,
    out: Path,
    *,
    think: bool,
    verdicts: bool | None,
) -> None:
    """Writes `model/` (loads with `from_pretrained`), `adapter/`, `best/` and the log history. Call on all ranks.

    Each of these folders also contains `reranker.json` (`RerankerSettings`): the prompt, page sizes and dtype that
    the model was trained with, and what its answers contain. `Reranker` reads it.
    """
    # A collective call: under ZeRO-3 each rank holds a part of the parameters.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        limits = config.model_dump(include={"min_pixels", "max_pixels", "dtype"})
        settings = {**limits, "think": think, "verdicts": verdicts, "prompt": prompt.model_dump()}
        # Otherwise ZeRO-3 would partition the models loaded below over the other ranks, which wait for this one.
        unset_hf_deepspeed_config()
        if config.lora is not None:
            model.save_pretrained(out / ADAPTER, state_dict=state)
            write_json(out / ADAPTER / SETTINGS, settings)
            model, state = load_merged(config, out / ADAPTER), None
        _write_model(model, state, processor, settings, out / MODEL)
        if best := trainer.state.best_model_checkpoint:
            model = load_model(config, best) if config.lora is None else load_merged(config, best)
            _write_model(model, None, processor, settings, out / BEST)
        write_json(out / LOG_HISTORY, trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()


def _write_model(model: Any, state: Any, processor: Any, settings: dict[str, Any], out: Path) -> None:
    with atomic_folder(out) as folder:
        model.save_pretrained(folder, state_dict=state, save_original_format=True)
        processor.save_pretrained(folder)
        write_json(folder / SETTINGS, settings)


def best_checkpoint_counts(trainer: Trainer) -> dict[str, Any]:
    """Manifest entries of the best checkpoint: step and held-out recall@1. Empty without held-out questions."""
    state = trainer.state
    return {} if state.best_metric is None else {"best_step": state.best_global_step, HELD_OUT: state.best_metric}


@contextmanager
def full_disk_as_input_error(out: Path) -> Iterator[None]:
    """Raises `InputError` if a checkpoint in `out` can't be written because the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk only in the message, without an errno.
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full_disk_messages = r"file write failed|No space left|File too large|unexpected pos"
        if not is_full and not re.search(full_disk_messages, str(error)):
            raise
        checkpoint = last_checkpoint(out)
        state = "no checkpoint was written"
        if checkpoint is not None:
            state = f"{checkpoint} is complete, and the same command resumes from it"
        raise InputError(
            f"{out}: the disk is full, a checkpoint can't be written; free some space: {state}"
        ) from error
