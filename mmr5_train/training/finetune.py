"""What SFT and GRPO share: data sets of prompts, trainer settings, adapters, and what they leave behind."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from mmr5_train.common.files import InputError, atomic_folder, write_json
from mmr5_train.models.inputs import keep_small_pages, load_pages
from mmr5_train.models.loading import SETTINGS, ModelConfig, load_merged, load_model
from mmr5_train.ranking.prompt import Prompt, build_messages
from mmr5_train.ranking.records import Candidate
from mmr5_train.training.callbacks import HELD_OUT, HeldOut
from mmr5_train.training.checkpoints import (
    MarkComplete,
    ResumeSampler,
    check_saving,
    keep_names,
    last_checkpoint,
)

MODEL = "model"  # the folder of a stage's output that holds the merged checkpoint
ADAPTER = "adapter"  # beside it, where LoRA was used: the adapter alone
BEST = "best"  # beside it, where held-out questions were ranked: the checkpoint that ranked them best
LOG_HISTORY = "log_history.json"

# TRL's own choice of devices that score no more than the labelled positions; a later TRL may have none.
_compacts: Any = getattr(trl_utils, "_use_triton", None)


def prompt_dataset(
    rows: Sequence[dict[str, Any]],
    queries: Sequence[str],
    shown: Sequence[Sequence[Candidate]],
    folder: Path,
    prompt: Prompt,
    processor: Any,
) -> Dataset:
    """A data set in TRL's prompt format: `rows` with "prompt" (messages) and "images" added as they are read.

    Pages are opened when a row is used, so that a corpus larger than memory can be trained on; small ones now.
    """

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        indices = batch.pop("index")
        batch["prompt"] = [build_messages(prompt, queries[i], len(shown[i])) for i in indices]
        batch["images"] = [load_pages(shown[i], folder, processor) for i in indices]
        return batch

    keep_small_pages((page for pages in shown for page in pages), folder, processor)
    return Dataset.from_list([{**row, "index": i} for i, row in enumerate(rows)]).with_transform(read)


def trainer_arguments(
    kind: type[TrainingArguments], values: dict[str, Any], *, out: Path, seed: int, model: ModelConfig
) -> Any:
    """TRL's own config object from the `trainer` part of a stage's config, which may set any of its fields.

    Raises `InputError` for a name that TRL does not know (with the nearest it does) or a value it refuses.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"trainer.{name}: {kind.__name__} has no such field{hint}")
        wanted = set(typing.get_args(hints[name]) or [hints[name]])
        # TRL itself would fail on these much later, with a message that names no field.
        if wanted <= {int, float, type(None)} and not _is_number(value, wanted):
            number = "number" if float in wanted else "whole number"
            raise InputError(f"trainer.{name}: expected a {number}, found {value!r}")
    # Columns are read by the data set's transform and by the rewards: the trainer must not drop them.
    fixed: dict[str, Any] = {
        "output_dir": str(out),
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
    }
    # Without use_cpu, processes on a machine without GPUs don't find each other. DeepSpeed sees to that itself.
    under_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    use_cpu = not torch.accelerator.is_available() and not under_deepspeed
    if use_cpu:  # else DeepSpeed, which accelerate imports, warns on stdout that it found no accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    values = {"dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": use_cpu, **values}
    if under_deepspeed and not torch.accelerator.is_available():
        values = {"ddp_backend": "gloo", **values}  # accelerate counts DeepSpeed's processes on CPUs by it
    fixed |= {"bf16": model.dtype == "bfloat16", "fp16": model.dtype == "float16"}
    taken = sorted(set(values) & set(fixed))
    if taken:
        raise InputError(f"trainer.{taken[0]}: is set from the stage's out, seed and model.dtype; set it there")
    try:
        arguments = kind(**fixed, **values)
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {kind.__name__} refuses these settings: {error}") from None
    check_saving(arguments)
    return arguments


def check_batches(trainer: dict[str, Any]) -> None:
    """Raises `InputError`, with the nearest settings that fit, where completions make no whole groups."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch, group = trainer.get("per_device_train_batch_size", 8), trainer.get("num_generations", 8)
    name = "steps_per_generation" if trainer.get("steps_per_generation") else "gradient_accumulation_steps"
    slices = trainer.get(name, 1)
    whole = all(isinstance(value, int) and value > 0 for value in (batch, group, slices))
    if not whole or trainer.get("generation_batch_size") or batch * slices * processes % group == 0:
        return  # what is no number is refused, field by field, when the config is made
    total = batch * slices * processes
    fitting = {
        "per_device_train_batch_size": _nearest(batch, lambda n: n * slices * processes % group == 0),
        name: _nearest(slices, lambda n: batch * n * processes % group == 0),
        "num_generations": _nearest(group, lambda n: n > 1 and total % n == 0),
    }
    ways = "; ".join(f"trainer.{key}={' or '.join(map(str, near))}" for key, near in fitting.items() if near)
    raise InputError(
        f"trainer: {processes} process{'es' * (processes > 1)} × per_device_train_batch_size {batch} × {name} "
        f"{slices} = {total} completions a rollout, which are no whole groups of num_generations {group}; "
        f"nearest: {ways}"
    )


def _nearest(value: int, fits: Callable[[int], bool]) -> list[int]:
    """The nearest fitting numbers below and above, as far as ten times `value`."""
    below = next((n for n in range(value - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, 10 * value + 1) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


@contextmanager
def settings_checked(name: str) -> Iterator[None]:
    """Around the making of a trainer: what TRL or PEFT refuse there (adapters, trackers) is the user's setting."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise InputError(f"{name}: these settings are refused: {error}") from error


def _is_number(value: Any, kinds: set[type]) -> bool:
    if value is None:
        return type(None) in kinds
    return isinstance(value, (int, float) if float in kinds else int) and not isinstance(value, bool)


class Progress(TrainerCallback):
    """One line for a whole training: steps, time left, and the last values of what matters."""

    def __init__(self, name: str, shown: dict[str, str]) -> None:
        self.name, self.shown = name, shown  # shown: log key → its name in the line
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.bar is not None and logs:
            values = {name: logs[key] for key, name in self.shown.items() if logs.get(key) is not None}
            if values:
                self.bar.set_postfix({name: f"{float(value):.3f}" for name, value in values.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def score_labeled_positions_only(device: torch.device) -> bool:
    """Whether TRL's language-model head is to compute labelled positions and no others: on CPUs too.

    TRL computes every position where there is no Triton, since some devices compile each new shape. On a CPU
    that would be two fifths of a step of SFT, most of it for tokens of the prompt, which are multiplied by 0.
    """
    return device.type == "cpu" or bool(_compacts(device))


def train(
    trainer: Trainer,
    name: str,
    shown: dict[str, str],
    settings: dict[str, Any],
    checkpoint: Path | None,
    watch: HeldOut | None,
) -> None:
    """Trains, from a checkpoint or the beginning, with `Progress` in the place of the trainer's own printing.

    Raises `InputError` where the data set fills no batch: TRL would train nothing, and say nothing.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(name, shown))
    trainer.add_callback(MarkComplete(settings))
    if watch is not None:
        watch.trainer = trainer
        trainer.add_callback(watch)
    keep_names(trainer.model)
    if _compacts is not None:
        trl_utils._use_triton = score_labeled_positions_only  # no setting of TRL's says it
    if isinstance(trainer, GRPOTrainer):
        trainer.add_callback(ResumeSampler())
    if checkpoint is not None and trainer.accelerator.is_main_process:
        print(f"{name}: goes on from {checkpoint}", flush=True)
    if trainer.accelerator.is_main_process:
        print(f"{name}: {_described(trainer)}", flush=True)
    with room_on_disk(Path(str(trainer.args.output_dir))):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step == 0:
        size = len(trainer.train_dataset)  # type: ignore[arg-type]
        raise InputError(
            f"{name}: {size} examples fill no batch, so not one step was taken; give more data, or a smaller "
            "trainer.per_device_train_batch_size or trainer.gradient_accumulation_steps"
        )


def _described(trainer: Trainer) -> str:
    args, model = trainer.args, trainer.model
    config: Any = model.config  # type: ignore[union-attr]
    processes = trainer.accelerator.num_processes
    kind = trainer.accelerator.distributed_type.value.lower()
    return (
        f"{processes} process{'es' * (processes > 1)} ({kind}) × batch {args.per_device_train_batch_size} × "
        f"accumulation {args.gradient_accumulation_steps} on {args.device.type}; attention: "
        f"{config.text_config._attn_implementation}"
    )


@contextmanager
def room_on_disk(out: Path) -> Iterator[None]:
    """Turns a checkpoint that could not be written into an `InputError`; those before it are whole."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors say it in words of their own.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not re.search(
            r"file write failed|No space left|File too large|unexpected pos", str(error)
        ):
            raise
        last = last_checkpoint(out)
        kept = (
            f"{last} is whole, and the same command goes on from it"
            if last
            else "no checkpoint was written before"
        )
        raise InputError(f"{out}: a checkpoint can't be written, the disk is full; make room: {kept}") from error


def lora_config(model: ModelConfig) -> LoraConfig | None:
    """PEFT's config for the model's adapters, None for full fine-tuning."""
    if model.lora is None and model.load_in_4bit:
        raise InputError(
            "model.load_in_4bit: a base in four bits can't be trained itself; give it adapters: model.lora"
        )
    if model.lora is None:
        return None
    return LoraConfig(
        r=model.lora.r,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=model.lora.target_modules,
        task_type="CAUSAL_LM",
    )


def use_lora_plus(trainer: Trainer, model: ModelConfig) -> None:
    """Gives the trainer PEFT's LoRA+ optimizer, of the kind that its own would be, where the model asks for it."""
    if model.lora is None or model.lora.plus_ratio is None:
        return
    network: Any = trainer.model
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, network)
    rate = settings.pop("lr")
    optimizer = create_loraplus_optimizer(
        network, kind, lr=rate, loraplus_lr_ratio=model.lora.plus_ratio, **settings
    )
    # PEFT makes a group for embeddings too, mostly an empty one, which DeepSpeed can't take.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    trainer.optimizer = optimizer


def normalize_loss_by_tokens(trainer: Trainer) -> None:
    """Makes each token of a step of SFT weigh the same, however a step is split over processes and micro-batches.

    The classes of Qwen-VL decline the count of a step's tokens; TRL's loss, which is the one used, takes it.
    """
    if trainer.args.world_size * trainer.args.gradient_accumulation_steps > 1:
        trainer.model_accepts_loss_kwargs = True


def save_result(
    trainer: Trainer, processor: Any, config: ModelConfig, prompt: Prompt, think: bool, out: Path
) -> None:
    """Writes the merged checkpoint (loads with `from_pretrained` alone), the adapter, and the log history.

    Beside the weights goes `reranker.json`: what the model was taught to expect, for `Reranker`. Where
    held-out questions were ranked, `best/` is the checkpoint that ranked them best, in the same form.
    """
    # On all ranks: under ZeRO-3 each holds a part of the parameters.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        limits = config.model_dump(include={"min_pixels", "max_pixels", "dtype"})
        settings = {**limits, "think": think, "prompt": prompt.model_dump()}
        unset_hf_deepspeed_config()  # else ZeRO-3 would deal what is loaded here out to processes that wait
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


def best_counts(trainer: Trainer) -> dict[str, Any]:
    """For the manifest: which step ranked the held-out questions best, and how well; empty where none were."""
    state = trainer.state
    return {} if state.best_metric is None else {"best_step": state.best_global_step, HELD_OUT: state.best_metric}


def trained_parameters(trainer: Trainer) -> int:
    """How many numbers the training moves."""
    model: Any = trainer.model
    # Under ZeRO-3 a parameter is empty here, and knows its size as ds_numel.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
