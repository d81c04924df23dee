"""Checks on each of two processes, run as a module by a launcher: python -m two_processes FOLDER MODEL."""

import sys
from pathlib import Path

from accelerate import PartialState

from mmr5_train import evaluate, select
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError
from mmr5_train.inference import processes
from mmr5_train.inference.processes import on_main_process, raise_on_all, run_unfinished, start_inference_processes
from mmr5_train.inference.tasks import Batch


def message(function, *arguments):
    try:
        function(*arguments)
    except InputError as error:
        return str(error)
    return ""


def fail():
    raise InputError("the folder is not empty")


def check_collectives(folder):
    rank = PartialState().process_index
    assert PartialState().distributed_type.value == "MULTI_CPU"  # not DeepSpeed, although the launch file says so
    assert on_main_process(lambda: rank + 5) == 5
    assert message(on_main_process, fail) == "the folder is not empty"
    for failing in (0, 1):
        assert message(raise_on_all, f"rank {rank} fails" if rank == failing else None) == f"rank {failing} fails"
    raise_on_all(None)

    # Process 1 does not see what process 0 has written.
    finished_batches = processes.finished_batches
    if rank == 1:
        processes.finished_batches = lambda *_: {}
    ran = []
    for total in (1, 2, 3, 5):

        def run(start):
            ran.append(start)
            return Batch(start=start)

        run_unfinished(folder, "numbers", Batch, range(total), lambda run=run: run)
    assert ran == {0: [0, 1, 2, 3], 1: [4]}[rank]
    assert sorted(finished_batches(folder, "numbers", Batch)) == [0, 1, 2, 3, 4]
    processes.finished_batches = finished_batches


def select_in(folder, out, model):
    settings = {
        "questions": folder / "data/select.jsonl",
        "out": folder / out,
        "difficulty": model and {"checkpoint": model, "samples": 4, "batch_size": 16, "max_new_tokens": 40},
        "reward": {"name": "reranking", "weights": {"reranking": 1.0}},
    }
    select.main(select.SelectStage.model_validate(settings))


EVALUATION = ("rankings/untrained.jsonl", "results.json", "pages.jsonl", "trec/untrained.run")


def evaluate_in(folder, out):
    overrides = ["systems={untrained:tiny}", "samples=2", "batch_size=2", "max_new_tokens=4", "any_split=true"]
    overrides += [f"data={folder / 'data/select.jsonl'}", f"out={folder / out}"]
    evaluate.main(compose_stage(evaluate.EvaluateStage, "evaluate", overrides))


if __name__ == "__main__":
    folder, model = Path(sys.argv[1]), sys.argv[2]
    start_inference_processes()
    on_main_process(lambda: (folder / "partial").mkdir())
    check_collectives(folder / "partial")
    select_in(folder, "two/selection", model)
    select_in(folder, "not_sampled", None)
    evaluate_in(folder, "two/evaluation")
