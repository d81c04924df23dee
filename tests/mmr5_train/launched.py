"""A training stage with additional checks, run as a module by a launcher: python -m launched STAGE OVERRIDE…

- Before the first step, the processes rank one, two, … up to all held-out questions, one at a time. So they have
  unequal numbers of them.
- Machine 1 (SLURM_NODEID=1) of `scripts/train.slurm` fails at step 3 of the first attempt: launcher and process
  are killed. In a later attempt, it does not see the checkpoints when the run begins.
"""

import os
import signal
import sys

from transformers import TrainerCallback

from mmr5_train import grpo, sft
from mmr5_train.common.config import run_stage
from mmr5_train.training import checkpoints, run
from mmr5_train.training.callbacks import HeldOutCallback

STAGES = {"sft": (sft.main, sft.SftStage), "grpo": (grpo.main, grpo.GrpoStage)}
NODE, ATTEMPT = os.environ.get("SLURM_NODEID"), os.environ.get("SLURM_RESTART_COUNT", "0")


def rank_increasing_numbers(self, args, state, control, **_):
    questions = self.prompted
    for count in range(1, len(questions) + 1) if state.global_step == 0 else ():
        self.prompted = questions[:count]
        self._rank()


class FailAtStepThree(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_failure(training_run, trainer, progress):
    trainer.add_callback(FailAtStepThree())
    run.train(training_run, trainer, progress)


if __name__ == "__main__":
    stage = sys.argv.pop(1)
    HeldOutCallback.on_train_begin = rank_increasing_numbers
    if NODE == "1" and ATTEMPT == "0":
        sft.train = train_until_failure
    if NODE == "1" and ATTEMPT != "0":
        checkpoints.last_checkpoint = lambda out: None
    run_stage(*STAGES[stage], stage)
