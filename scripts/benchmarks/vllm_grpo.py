"""A GRPO run of bench_engines.py, in vLLM's environment: records vLLM's rollouts, or repeats recorded ones.

    python scripts/benchmarks/vllm_grpo.py record ROLLOUTS.json OVERRIDE…    # with trainer.use_vllm=true
    python scripts/benchmarks/vllm_grpo.py replay ROLLOUTS.json OVERRIDE…    # without vLLM

Both run `mmr5_train.grpo`. vLLM's build for CPUs can't take new weights, so `record` leaves out their transfer:
with learning rate 0 the policy stays that of the engine. `replay` gives the trainer the recorded completions
instead of sampling its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from mmr5_train.common.config import run_stage
from mmr5_train.grpo import GrpoStage, main
from mmr5_train.training import shared_grpo


def record(path: Path) -> None:
    """Appends the completions of each rollout batch to the file."""
    generate, batches = VLLMGeneration.generate, []

    def recording(self: Any, *args: Any, **options: Any) -> Any:
        output = generate(self, *args, **options)
        batches.append([list(ids) for ids in output[1]])
        path.write_text(json.dumps(batches), encoding="utf-8")
        return output

    VLLMGeneration.generate = recording
    VLLMGeneration.sync_weights = lambda self: None


def replay(path: Path) -> None:
    batches = iter(json.loads(path.read_text(encoding="utf-8")))

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        return next(batches), None

    def recorded_tensor(model: Any, prompts: Any, samples: int, config: Any, *rest: Any) -> torch.Tensor:
        rows = [torch.tensor(ids) for ids in next(batches)]
        return pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id)

    GRPOTrainer._generate_single_turn = recorded
    shared_grpo.generate = recorded_tensor


if __name__ == "__main__":
    mode, file = sys.argv.pop(1), Path(sys.argv.pop(1))
    {"record": record, "replay": replay}[mode](file)
    run_stage(main, GrpoStage, "grpo")
