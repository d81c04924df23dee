"""Training that is watched: NaNs stop it before they are kept, and held-out questions tell its best checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate.utils import gather_object
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer, SFTTrainer
from trl.models import unwrap_model_for_generation

from mmr5_train.common.files import InputError, read_records, write_json
from mmr5_train.evaluation.alarms import ALARMS, Action, Alarm, raised_alarms, read_alarms
from mmr5_train.evaluation.metrics import is_complete, recall_at_k
from mmr5_train.inference.local import LocalBackend
from mmr5_train.models.inputs import check_images
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Mode, ModelAnswer, Order, PromptedTask, RankingTask
from mmr5_train.training.checkpoints import KEPT, last_checkpoint
from mmr5_train.training.shared_grpo import SharedPrefixGRPOTrainer

HELD_OUT = "heldout/recall@1"


class FiniteTrainer(Trainer):
    """Stops at a loss or gradients that are not finite: the checkpoints there are stay as they are."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            loss = super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise self._not_finite("probabilities of the next token are not finite") from error
        self._check_finite("loss", loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not self.args.fp16:  # with float16 the scaler passes over such a step and goes on
            self._check_finite("norm of the gradients", norm)
        return norm

    def _check_finite(self, what: str, value: Any) -> None:
        if not math.isfinite(value):
            raise self._not_finite(f"{what} is {float(value)}")

    def _not_finite(self, what: str) -> InputError:
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        return InputError(
            f"step {self.state.global_step + 1}: the {what}; "
            f"{f'{kept} stays as it is' if kept else 'no checkpoint was written yet'}. Begin anew "
            "(overwrite=true) with a smaller trainer.learning_rate or trainer.max_grad_norm, or with "
            "model.dtype=bfloat16 in the place of float16"
        )


class FiniteSFTTrainer(FiniteTrainer, SFTTrainer):
    pass


class FiniteGRPOTrainer(FiniteTrainer, GRPOTrainer):
    pass


class FiniteSharedGRPOTrainer(FiniteTrainer, SharedPrefixGRPOTrainer):
    pass


class HeldOutConfig(BaseModel):
    """Questions that a model in training ranks at each checkpoint, so that the best one can be kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(description="ranking tasks that are neither trained on nor evaluated in the end")
    limit: int | None = Field(default=200, gt=0, description="use the first so many")
    batch_size: int = Field(default=8, gt=0, description="questions answered at a time on each process")
    max_new_tokens: int = Field(default=2048, gt=0)
    order: Order = "score"


class HeldOut(TrainerCallback):
    """Ranks the questions before the first step and at every checkpoint, greedily, dealt out to the processes.

    Logs recall@1 and the share of complete orders. The checkpoint with the highest recall@1 (the earliest of
    several) becomes the trainer's best, which its rotation of checkpoints spares.
    """

    def __init__(self, config: HeldOutConfig, processor: Any, prompt: Prompt, *, think: bool, seed: int) -> None:
        tasks = read_records(config.data, RankingTask)[: config.limit]
        check_images((page for task in tasks for page in task.candidates), config.data.parent)
        self.config, self.prompted = config, [task.in_prompt_order(config.order, seed) for task in tasks]
        mode: Mode = "reason" if think else "direct"
        self.backend = LocalBackend(None, processor, prompt, mode=mode, max_new_tokens=config.max_new_tokens)
        self.trainer: Any = None  # set once there is one

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._rank()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            should_log = control.should_log
            recall = self._rank()
            control.should_log = should_log  # logging what was ranked has unset it
            if state.best_metric is None or recall > state.best_metric:
                state.best_metric, state.best_global_step = recall, state.global_step

    def _rank(self) -> float:
        accelerator, trained = self.trainer.accelerator, self.trainer.model
        trained.eval()  # a training step sets it back
        checkpointing = self.trainer.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            self.trainer.model_wrapped, accelerator, gradient_checkpointing_kwargs=checkpointing
        ) as model:
            self.backend.model = model.get_base_model() if hasattr(model, "get_base_model") else model
            own = self.prompted[accelerator.process_index :: accelerator.num_processes]
            answers = self.backend.answer(own, self.config.data.parent, batch_size=self.config.batch_size)
            found = [_figures(asked, answer) for asked, [answer] in zip(own, answers, strict=True)]
        recalls, complete = zip(*gather_object(found), strict=True)
        # The trainer's own log: TRL's would write the step's sampled completions again.
        figures = {HELD_OUT: mean(recalls), "heldout/complete_permutations": mean(complete)}
        Trainer.log(self.trainer, {**figures, "heldout/questions": len(recalls)})
        return mean(recalls)


class AlarmCallback(TrainerCallback):
    """Prints each alarm of `evaluation.alarms` once, writes alarms.json, and stops training if configured."""

    def __init__(self, out: Path, action: Action) -> None:
        self.out, self.action = out, action
        self.raised: dict[str, Alarm] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:  # goes on: what was said is not said again
            self.raised = {alarm.name: alarm for alarm in read_alarms(self.out)}

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        new = [
            alarm for alarm in raised_alarms(state.log_history, state.global_step) if alarm.name not in self.raised
        ]
        self.raised |= {alarm.name: alarm for alarm in new}
        if state.is_world_process_zero:
            for alarm in new:
                tqdm.write(f"grpo: alarm at {alarm}")
            if new:
                write_json(self.out / ALARMS, [asdict(alarm) for alarm in self.raised.values()])
        if new and self.action == "stop":
            control.should_training_stop = True


def _figures(asked: PromptedTask, answer: ModelAnswer) -> tuple[float, float]:
    order = [asked.shown[i - 1].id for i in answer.order]
    return recall_at_k(order, asked.task.positives, 1), float(is_complete(answer))


def held_out(
    config: HeldOutConfig | None, arguments: Any, processor: Any, prompt: Prompt, think: bool
) -> HeldOut | None:
    """The callback, None where no questions were given. Raises `InputError` where the best would not be kept."""
    if config is None:
        return None
    if arguments.save_strategy == "no" or (arguments.save_total_limit or KEPT + 1) <= KEPT:
        raise InputError(
            f"heldout: needs checkpoints, and room for the best beside the last {KEPT}: set "
            f"trainer.save_strategy=steps and trainer.save_total_limit={KEPT + 1} or more, found "
            f"{arguments.save_strategy} and {arguments.save_total_limit}"
        )
    return HeldOut(config, processor, prompt, think=think, seed=arguments.seed)
