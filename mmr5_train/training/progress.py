"""One progress line for a whole training run."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressLine(TrainerCallback):
    """Shows steps, remaining time and the latest values of a few log keys, on the main process.

    `labels` maps each log key to its label in the line.
    """

    def __init__(self, stage: str, labels: dict[str, str]) -> None:
        self.stage, self.labels = stage, labels
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.bar is not None and logs:
            values = {label: logs[key] for key, label in self.labels.items() if logs.get(key) is not None}
            if values:
                self.bar.set_postfix({label: f"{float(value):.3f}" for label, value in values.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
