"""Trainers that stop at non-finite values, and callbacks that rank held-out questions and raise alarms."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer
from trl.models import unwrap_model_for_generation

from mmr5_train.common.files import InputError, read_records, write_json
from mmr5_train.evaluation.alarms import ALARMS, Action, Alarm, raised_alarms, read_alarms
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.inference.local import LocalBackend
from mmr5_train.inference.processes import on_main_process
from mmr5_train.inference.tasks import rank_tasks
from mmr5_train.models.config import MAX_NEW_TOKENS
from mmr5_train.models.inputs import check_images
from mmr5_train.ranking.metrics import recall_at_k
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode, ModelAnswer, Order, PromptedTask, RankingTask
from mmr5_train.training.checkpoints import MIN_CHECKPOINTS, last_checkpoint
from mmr5_train.training.rollout_pages import RolloutPagesTrainer
from mmr5_train.training.shared_grpo import SharedPrefixGRPOTrainer

HELD_OUT = "heldout/recall@1"


# What torch reports if it samples from probabilities that are not finite. On a GPU a later operation raises the
# error, and other checks fail with the same words.
NOT_FINITE = {
    "probability tensor contains": "next-token probabilities are not finite",
    "device-side assert": "next-token probabilities are not finite, or another check on the GPU failed "
    "(CUDA_LAUNCH_BLOCKING=1 shows which)",
}


class FiniteTrainer(Trainer):
    """Raises `InputError` at a non-finite loss or gradient norm. Existing checkpoints stay unchanged.

    All ranks raise it if the loss of one is not finite. If sampling fails on one rank, that rank raises it, and
    the launcher stops the others.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[Tensor] = []  # of the micro-batches since the last optimizer step

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            loss = super().training_step(*args, **kwargs)
            self._check_losses(loss)
        except RuntimeError as error:
            cause = next((cause for text, cause in NOT_FINITE.items() if text in str(error)), None)
            if cause is None:
                raise
            raise self._not_finite(cause) from error
        return loss

    def _check_losses(self, loss: Tensor) -> None:
        """Checks the losses of all ranks, once per optimizer step and before it."""
        self._losses.append(loss.detach().float())
        if self.accelerator.sync_gradients:
            losses = self.accelerator.gather(torch.stack(self._losses))
            self._losses.clear()
            for value in losses.tolist():
                self._check_finite("loss", value)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not self.args.fp16:  # with float16 the gradient scaler skips such a step
            self._check_finite("gradient norm", norm)
        return norm

    def _check_finite(self, quantity: str, value: Any) -> None:
        if not math.isfinite(value):
            raise self._not_finite(f"{quantity} is {float(value)}")

    def _not_finite(self, problem: str) -> InputError:
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        state = f"{checkpoint} is unchanged" if checkpoint else "no checkpoint was written yet"
        return InputError(
            f"step {self.state.global_step + 1}: the {problem}; {state}. Start over (overwrite=true) with a "
            "smaller trainer.learning_rate or trainer.max_grad_norm, or with model.dtype=bfloat16 "
            "instead of float16"
        )


class FiniteSFTTrainer(FiniteTrainer, SFTTrainer):
    pass


class FiniteGRPOTrainer(FiniteTrainer, RolloutPagesTrainer):
    pass


class FiniteSharedGRPOTrainer(FiniteTrainer, RolloutPagesTrainer, SharedPrefixGRPOTrainer):
    pass


class HeldOutConfig(BaseModel):
    """Held-out questions. The model ranks them at each checkpoint during training, to find the best checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(description="ranking tasks that are used neither in training nor in the final evaluation")
    limit: int | None = Field(default=200, gt=0, description="use only the first questions")
    batch_size: int = Field(default=8, gt=0, description="questions per batch on each process")
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, gt=0)
    order: Order = "score"
    choose: Literal["best", "last"] = Field(
        default="best", description="the checkpoint that becomes model/: the one that ranks best, or the last one"
    )


class HeldOutCallback(TrainerCallback):
    """Ranks held-out questions greedily before the first step and at each checkpoint, split over the processes.

    Logs recall@1 and the share of complete permutations. The earliest checkpoint with the highest recall@1 becomes
    the trainer's best checkpoint, which checkpoint rotation does not delete.
    """

    def __init__(self, config: HeldOutConfig, processor: Any, prompt: Prompt, *, think: bool, seed: int) -> None:
        tasks = read_records(config.data, RankingTask)[: config.limit]
        check_images((page for task in tasks for page in task.candidates), config.data.parent)
        self.config, self.prompted = config, [task.in_prompt_order(config.order, seed) for task in tasks]
        mode: Mode = "reason" if think else "direct"
        self.backend = LocalBackend(None, processor, prompt, mode=mode, max_new_tokens=config.max_new_tokens)
        self.trainer: Any = None  # set by `train`, because the trainer is constructed later

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._rank()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            should_log = control.should_log
            recall = self._rank()
            control.should_log = should_log  # `_rank` logs, which resets it
            if state.best_metric is None or recall > state.best_metric:
                state.best_metric, state.best_global_step = recall, state.global_step

    def _rank(self) -> float:
        """Ranks the questions and logs the metrics. Returns recall@1. Call on all ranks."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        trainer.model.eval()  # the next training step switches back to training mode
        # Under ZeRO-3 generation is collective, so every rank ranks equally many questions: some rank one twice.
        # transformers lets a rank that has finished its answers continue until all ranks have.
        shard = self.prompted[accelerator.process_index :: accelerator.num_processes]
        size = math.ceil(len(self.prompted) / accelerator.num_processes)
        padded = [*shard, *self.prompted[: size - len(shard)]]
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gather_deepspeed3_params=getattr(trainer.args, "ds3_gather_for_generation", True),
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            self.backend.model = model.get_base_model() if hasattr(model, "get_base_model") else model
            folder, batch_size = self.config.data.parent, self.config.batch_size
            answers = list(rank_tasks(self.backend, padded, folder, batch_size=batch_size))[: len(shard)]
            metrics = [_metrics(prompted, answer) for prompted, [answer] in zip(shard, answers, strict=True)]
        recalls, complete = zip(*gather_object(metrics), strict=True)
        # Call transformers' log method, because TRL's would write the current step's completions again.
        values = {HELD_OUT: mean(recalls), "heldout/complete_permutations": mean(complete)}
        Trainer.log(trainer, {**values, "heldout/questions": len(recalls)})
        return mean(recalls)


class AlarmCallback(TrainerCallback):
    """Prints each alarm of `evaluation.alarms` once, writes alarms.json, and stops training if configured."""

    def __init__(self, out: Path, action: Action) -> None:
        self.out, self.action = out, action
        self.raised: dict[str, Alarm] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:  # a resumed run does not repeat earlier alarms
            self.raised = {alarm.name: alarm for alarm in read_alarms(self.out)}

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        alarms = raised_alarms(state.log_history, state.global_step)
        new = [alarm for alarm in alarms if alarm.name not in self.raised]
        self.raised |= {alarm.name: alarm for alarm in new}
        if state.is_world_process_zero:
            for alarm in new:
                tqdm.write(f"grpo: alarm at {alarm}")
            if new:
                write_json(self.out / ALARMS, [asdict(alarm) for alarm in self.raised.values()])
        # The main process decides: a rank that stopped without the others would leave them waiting.
        if self.action == "stop" and on_main_process(lambda: bool(new)):
            control.should_training_stop = True


def _metrics(prompted: PromptedTask, answer: ModelAnswer) -> tuple[float, float]:
    """Recall@1 and whether the answer is a complete permutation."""
    order = [prompted.shown[i - 1].id for i in answer.order]
    return recall_at_k(order, prompted.task.positives, 1), float(is_complete(answer))


def held_out_callback(
    config: HeldOutConfig | None, arguments: Any, processor: Any, prompt: Prompt, think: bool
) -> HeldOutCallback | None:
    """The callback, or None without held-out questions.

    Raises `InputError` if the save settings would not keep the best checkpoint.
    """
    if config is None:
        return None
    if (
        arguments.save_strategy != "steps"
        or (arguments.save_total_limit or MIN_CHECKPOINTS + 1) <= MIN_CHECKPOINTS
    ):
        raise InputError(
            f"heldout: the run keeps the best checkpoint in addition to the last {MIN_CHECKPOINTS}; set "
            f"trainer.save_strategy=steps and trainer.save_total_limit={MIN_CHECKPOINTS + 1} or more, found "
            f"{arguments.save_strategy} and {arguments.save_total_limit}"
        )
    return HeldOutCallback(config, processor, prompt, think=think, seed=arguments.seed)
