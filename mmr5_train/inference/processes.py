"""What the processes of one launch do together: decisions, errors, and questions that they share.

All of them must make the same collective calls in the same order; a process that leaves one out makes the others
wait until the launcher's timeout. These functions are collective: call them on all processes, or on none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import ValidationError
from tqdm import tqdm

from mmr5_train.common.files import InputError
from mmr5_train.inference.tasks import Batch

VISIBLE_WITHIN = 60
"""Seconds after which a file that another machine wrote must be visible."""

T = TypeVar("T")
BatchT = TypeVar("BatchT", bound=Batch)


def start_inference_processes() -> PartialState:
    """The processes of the launch, which wait up to a week for each other: shares can take unequally long."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def on_main_process(work: Callable[[], T]) -> T:
    """Calls `work` on the main process and returns its result on all. An `InputError` is raised on all of them.

    The result travels to the other processes, so it must be small.
    """
    result: list[tuple[T | None, str | None]] = [(None, None)]
    if PartialState().is_main_process:
        try:
            result = [(work(), None)]
        except InputError as error:
            result = [(None, str(error))]
    [(value, problem)] = broadcast_object_list(result)
    if problem is not None:
        raise InputError(problem)
    return value


def raise_on_all(problem: str | None) -> None:
    """Raises `InputError` on all processes if one of them has a problem: the first one's."""
    problems = [found for found in gather_object([problem]) if found is not None]
    if problems:
        raise InputError(problems[0])


def run_unfinished(
    folder: Path,
    name: str,
    kind: type[BatchT],
    starts: Sequence[int],
    load: Callable[[], Callable[[int], BatchT]],
) -> None:
    """Runs this process's share of the batches at `starts` that are not finished, and saves each at once.

    Process p appends to `folder`/`name`.p.jsonl. `load` returns the function that runs the batch at a start, for
    example after it has loaded a model; it is not called without unfinished batches. Neither interruptions nor the
    number of processes change the batches. Returns when all processes have run theirs.
    """
    processes = PartialState()
    # The main process decides, because file systems can show a file later on another machine.
    finished = on_main_process(lambda: sorted(finished_batches(folder, name, kind)))
    if finished and processes.is_main_process:
        print(f"{name}: {len(finished)} of {len(starts)} batches are already done")
    unfinished = sorted(set(starts) - set(finished))
    share = unfinished[processes.process_index :: processes.num_processes]
    if share:
        run = load()
        path = folder / f"{name}.{processes.process_index}.jsonl"
        with path.open("a", encoding="utf-8") as stream:
            stream.write("\n")  # ends the incomplete line that an interruption may have left
            for start in tqdm(share, desc=name, unit="batch", disable=not processes.is_main_process):
                stream.write(run(start).model_dump_json() + "\n")
                stream.flush()
    processes.wait_for_everyone()
    on_main_process(lambda: _check_all_finished(folder, name, kind, starts))


def _check_all_finished(folder: Path, name: str, kind: type[BatchT], starts: Sequence[int]) -> None:
    if not wait_for(lambda: finished_batches(folder, name, kind).keys() >= set(starts)):
        missing = sorted(set(starts) - finished_batches(folder, name, kind).keys())
        raise InputError(
            f"{folder}: {len(missing)} of {len(starts)} batches of {name} are missing, although all processes "
            "have finished; put out on a file system that all machines share, and run the same command again"
        )


def wait_for(is_visible: Callable[[], bool]) -> bool:
    """Waits until what another machine wrote is visible on this one, for `VISIBLE_WITHIN` at most."""
    end = time.monotonic() + VISIBLE_WITHIN
    while not (visible := is_visible()) and time.monotonic() < end:
        time.sleep(0.5)
    return visible


def finished_batches(folder: Path, name: str, kind: type[BatchT]) -> dict[int, BatchT]:
    """The batches that any process has finished, by `start`. Incomplete lines are ignored."""
    batches = {}
    for path in sorted(folder.glob(f"{name}.*.jsonl")):
        if re.fullmatch(re.escape(name) + r"\.\d+\.jsonl", path.name):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    batch = kind.model_validate_json(line)
                except ValidationError:
                    continue
                batches[batch.start] = batch
    return batches
