"""Saves the result of a training run: merged checkpoints, the adapter and the log history."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from mmr5_train.common.files import InputError, atomic_folder, write_json
from mmr5_train.models.loading import SETTINGS, ModelConfig, RerankerSettings, load_merged, load_model
from mmr5_train.training.callbacks import HELD_OUT
from mmr5_train.training.checkpoints import last_checkpoint

MODEL = "model"  # the merged checkpoint that the next stage reads
ADAPTER = "adapter"  # with LoRA: the adapter of `MODEL`, not merged
BEST, LAST = "best", "last"  # with held-out questions: the best and the last merged checkpoint, if not in `MODEL`
LOG_HISTORY = "log_history.json"


def save_result(
    trainer: Trainer, processor: Any, config: ModelConfig, settings: RerankerSettings, out: Path, choose: str
) -> RerankerSettings:
    """Writes `model/` (loads with `from_pretrained`), `adapter/` and the log history. Call on all ranks.

    `model/` is the best checkpoint if held-out questions were ranked and `choose` is "best", otherwise the last
    one. If they differ, the other one is in `last/` or `best/`. Each of these folders also contains
    `reranker.json`: `settings` with the step of the checkpoint. `Reranker` reads it. Returns those in `model/`.
    """
    weights = trained_weights(trainer)
    state = trainer.state
    last = settings.model_copy(update={"step": state.global_step, "steps": state.global_step})
    best = last.model_copy(update={"step": state.best_global_step, "heldout_recall": state.best_metric})
    best_checkpoint = out / f"checkpoint-{best.step}"
    best_is_older = best.step is not None and best.step != last.step and best_checkpoint.is_dir()
    choose_best = choose == "best" and (best_is_older or best.step == last.step)
    if trainer.accelerator.is_main_process:
        # Otherwise ZeRO-3 would partition the models loaded below over the other ranks, which wait for this one.
        unset_hf_deepspeed_config()
        for name in (MODEL, ADAPTER, BEST, LAST):  # of a run that was stopped while it wrote them
            shutil.rmtree(out / name, ignore_errors=True)
        source: Path | dict[str, Tensor] = weights or {}
        if config.lora is not None:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out / ADAPTER, state_dict=weights)
            source = out / ADAPTER
        write = partial(_write_model, config=config, processor=processor)
        if best_is_older:
            write(source, last, out=out / (LAST if choose_best else MODEL))
            write(best_checkpoint, best, out=out / (MODEL if choose_best else BEST))
        else:
            write(source, best if choose_best else last, out=out / MODEL)
        if config.lora is not None:
            if best_is_older and choose_best:
                for file in ("adapter_config.json", "adapter_model.safetensors"):
                    shutil.copyfile(best_checkpoint / file, out / ADAPTER / file)
            shutil.copyfile(out / MODEL / SETTINGS, out / ADAPTER / SETTINGS)
        write_json(out / LOG_HISTORY, state.log_history)
    trainer.accelerator.wait_for_everyone()
    return best if choose_best else last


def trained_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """The weights on the main process, None on the others: with adapters only these. Call on all ranks.

    Under ZeRO-3 the main process gathers the partitions, one module at a time, into CPU memory. Otherwise it has
    all weights already, and nothing is copied.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    has_adapter = hasattr(model, "get_base_model")
    if is_deepspeed_zero3_enabled():
        engine: Any = trainer.model_wrapped
        weights: dict[str, Tensor] | None = engine._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=has_adapter
        )
        return weights
    if not trainer.accelerator.is_main_process:
        return None
    if has_adapter:
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return dict(model.state_dict())


def _write_model(
    source: Path | dict[str, Tensor],
    settings: RerankerSettings,
    *,
    config: ModelConfig,
    processor: Any,
    out: Path,
) -> None:
    """Writes a merged checkpoint in the dtype of `config`. `source`: a checkpoint, an adapter, or all weights."""
    if isinstance(source, Path):
        model = load_model(config, source) if config.lora is None else load_merged(config, source)
    else:
        model = load_model(config)
        model.load_state_dict(source)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder, save_original_format=True)
        processor.save_pretrained(folder)
        write_json(folder / SETTINGS, settings.model_dump(mode="json"))


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
