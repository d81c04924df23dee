"""Runs the published recipes on a machine without a GPU, with nothing small but the checkpoint and the amounts.

    python scripts/benchmarks/rehearse.py        # make rehearsal: writes outputs/bench/rehearsal.json
    python scripts/benchmarks/rehearse.py --short --out FOLDER
    python scripts/benchmarks/rehearse.py --family qwen3_vl --out FOLDER

Prepares a small checkpoint with the real tokenizer (standin.py, standin_form.py), small data sets in the published
formats (rehearsal_data.py), and a server that replaces the teacher. Then it runs the recipes `mm_r5` and
`recommended` with `size=rehearsal` (configs/size/rehearsal.yaml), from the data sets to the report and to the
table with the published figures. They run in two processes under DeepSpeed ZeRO-2; SFT and GRPO of `recommended`
run again under ZeRO-3. First it prints each setting that differs from the recipe without `size=rehearsal`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from bench_common import (
    OUTPUT,
    argument_parser,
    at_most,
    equal,
    machine,
    print_targets,
    write_results,
)
from PIL import Image
from rehearsal_data import write_rehearsal_data
from standin import Family, write_standin
from standin_form import PAGE_COUNTS, share_in_form, train_form

from mmr5_train import tables
from mmr5_train.common.config import CONFIGS, compose_stage
from mmr5_train.common.files import read_manifest, read_records
from mmr5_train.ranking.records import Trace
from mmr5_train.recipe import RecipeStage, stage_settings
from mmr5_train.recipe import main as run_all_stages

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
MAX_MINUTES, MAX_MINUTES_SHORT = 20, 2
# Of the launched processes: one thread each, no GPU, no network. Nothing is compiled; without the compiler, each
# process imports its libraries in two seconds less.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TORCHDYNAMO_DISABLE": "1",
}
# What `size=rehearsal` may change: the checkpoints (the retriever is one, too), the data folders, the numbers of
# questions and optimizer steps, and what CPUs require.
CHANGED = {
    "launch": ("processes",),
    "heldout": ("corpus.folder", "corpus.page_cache", "retriever."),
    "candidates": ("corpus.folder", "corpus.page_cache", "retriever."),
    "sft": ("model.path", "model.dtype", "limit", "trainer.max_steps"),
    "select": ("balanced.count",),
    "grpo": ("model.dtype", "trainer.max_steps"),  # grpo and evaluate take the dtype from SFT's checkpoint
    "evaluate": ("model.dtype",),
}


@dataclass(frozen=True)
class Run:
    """A recipe under a launch file of configs/accelerate, with overrides of the rehearsal's amounts."""

    recipe: str
    launch: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.recipe}_{self.launch}"

    @property
    def evaluates(self) -> bool:
        return not any("evaluate" in override for override in self.overrides)


ONE_GRPO_STEP = "stages.grpo.trainer.max_steps=1"
RUNS = (
    Run("mm_r5", "zero2"),
    Run("recommended", "zero2", (ONE_GRPO_STEP,)),
    Run("recommended", "zero3", (ONE_GRPO_STEP, "leave_out=[evaluate,report,teach,distill,calibrate,modes]")),
)
FEWER = ("sft.limit=8", "sft.trainer.max_steps=1", "select.balanced.count=4", "grpo.trainer.max_steps=2")
SHORT_RUNS = (Run("mm_r5", "zero2", tuple(f"stages.{amount}" for amount in FEWER)),)


def changed_settings(recipe: str, overrides: Sequence[str] = ()) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields (stage, setting, value, published value) for each setting of a recipe that the rehearsal changes.

    Folders of outputs are equal, because both use the same `out`. Both leave out the same stages.
    """
    left_out = [override for override in overrides if override.startswith("leave_out=")]
    common = [f"experiment={recipe}", "out=outputs/rehearsal", *left_out]
    published = stage_settings(compose_stage(RecipeStage, "recipe", common))
    rehearsed = stage_settings(compose_stage(RecipeStage, "recipe", [*common, "size=rehearsal", *overrides]))
    for stage in sorted(published.keys() | rehearsed.keys()):
        before, after = published.get(stage, {}), rehearsed.get(stage, {})
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                yield stage, key, after.get(key), before.get(key)


def is_allowed(stage: str, key: str) -> bool:
    """Whether `size=rehearsal` may change this setting."""
    return key.startswith(CHANGED.get(stage, ()))


def prepare(shared: Path, family: Family, short: bool) -> float | None:
    """Writes the checkpoint and the data sets into `shared`. Returns the share of answers in the valid form.

    In the short form, the checkpoint only learns to end its answers, and the share is not measured: None.
    """
    checkpoint = write_standin(shared / "checkpoint", family)
    train_form(checkpoint, steps=70 if short else 500)
    write_rehearsal_data(
        shared / "corpus", documents=2 if short else 4, evaluation=1 if short else 3, large=not short
    )
    return None if short else share_in_form(checkpoint, page_counts=PAGE_COUNTS)


@contextmanager
def teacher_server() -> Iterator[dict[str, str]]:
    """Runs a server with the teacher's API. Yields the environment variables of the processes that call it."""
    command = [sys.executable, str(ROOT / "scripts/benchmarks/chat_server.py"), "--delay", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield {"OPENAI_BASE_URL": server.stdout.readline().strip(), "OPENAI_API_KEY": "unused"}
        finally:
            server.terminate()


def launch_file(name: str, folder: Path) -> Path:
    """A copy of configs/accelerate/<name>.yaml with two processes."""
    values = yaml.safe_load((CONFIGS / f"accelerate/{name}.yaml").read_text(encoding="utf-8"))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | {"num_processes": PROCESSES}), encoding="utf-8")
    return path


def run_recipe(run: Run, out: Path) -> dict[str, Any]:
    """Runs a recipe in this process, which has imported it. Returns its seconds, in total and by stage."""
    folder = out / run.name
    overrides = [f"experiment={run.recipe}", "size=rehearsal", f"out={folder}", f"shared={out / 'shared'}"]
    overrides += [f"folders.sft={folder / 'sft'}", f"launch={launch_file(run.launch, out)}", *run.overrides]
    started = time.monotonic()
    run_all_stages(compose_stage(RecipeStage, "recipe", overrides))
    stages = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["stages"]
    return {
        "seconds": round(time.monotonic() - started, 1),
        "stages": {name: stage["seconds"] for name, stage in stages.items()},
    }


def write_tables(folder: Path) -> None:
    """Puts the evaluation of a recipe into the published tables."""
    evaluations = f"evaluations={{ColQwen: {folder / 'evaluation'}}}"
    rows = "rows={sft: SFT only, sft+grpo: MM-R5}"
    tables.main(compose_stage(tables.TablesStage, "tables", [evaluations, rows, f"out={folder / 'tables'}"]))


def logged(folder: Path, key: str) -> list[dict[str, Any]]:
    """The entries of a training stage's log that have `key`."""
    history = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return [entry for entry in history if key in entry]


def largest_page(out: Path, run: Run) -> str:
    """Width and height in pixels of the largest page that SFT trained on."""
    limit = read_manifest(out / run.name / "sft")["config"]["limit"]
    folder = out / "shared/traces"
    pages = {page.image for trace in read_records(folder / "traces.jsonl", Trace)[:limit] for page in trace.shown}
    sizes = []
    for page in pages:
        with Image.open(folder / page) as image:
            sizes.append(image.size)
    width, height = max(sizes, key=math.prod)
    return f"{width} × {height}"


def targets(out: Path, runs: Sequence[Run], minutes: float, max_minutes: float) -> Iterator[dict[str, Any]]:
    """The targets of the rehearsal, read from the files that the recipes wrote."""
    yield at_most("minutes", minutes, max_minutes)
    for run in runs:
        changed = changed_settings(run.recipe, run.overrides)
        others = [f"{stage}.{key}" for stage, key, *_ in changed if not is_allowed(stage, key)]
        yield equal(f"{run.name}: settings changed besides checkpoint, amounts and device", ", ".join(others), "")
        folder = out / run.name
        for stage in ("sft", "grpo"):
            counts = read_manifest(folder / stage)["counts"]
            yield equal(f"{run.name}: processes of {stage}", counts["processes"], PROCESSES)
            if run.recipe == "recommended":
                steps = [entry["step"] for entry in logged(folder / stage, "heldout/recall@1")]
                yield equal(f"{run.name}: {stage} ranked held-out questions at", steps, [0, counts["steps"]])
        if run.evaluates:
            rows = read_manifest(folder / "tables")["counts"]["beside_published"]
            yield equal(f"{run.name}: measured rows beside published ones", rows, 3)
    if len(runs) > 1:
        yield equal("largest page of SFT", largest_page(out, runs[0]), "1700 × 2200")
    by_launch = {run.launch: out / run.name for run in runs if run.recipe == "recommended"}
    if len(by_launch) == 2:
        zero2, zero3 = (logged(folder / "sft", "train_loss")[-1]["train_loss"] for folder in by_launch.values())
        yield at_most("difference of SFT's mean losses under ZeRO-2 and ZeRO-3", abs(zero2 - zero3), 1e-3)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/rehearsal", help="folder that is overwritten")
    parser.add_argument("--json", type=Path, default=OUTPUT / "rehearsal.json", help="file with the results")
    parser.add_argument("--family", choices=get_args(Family), default="qwen2_5_vl")
    parser.add_argument("--short", action="store_true", help="one recipe with fewer steps")
    args = parser.parse_args()
    runs = SHORT_RUNS if args.short else RUNS
    started = time.monotonic()
    args.out.mkdir(parents=True)
    os.environ.update(ENVIRONMENT)
    for run in runs:
        print(f"settings of {run.recipe} that the run {run.name} changes:")
        for stage, key, value, published in changed_settings(run.recipe, run.overrides):
            print(f"  {stage}.{key}: {value} (published: {published})", flush=True)
    in_form = prepare(args.out / "shared", args.family, args.short)
    if in_form is not None:
        print(f"the checkpoint writes {in_form:.0%} of its answers in the valid form", flush=True)
    seconds = {}
    with teacher_server() as teacher:
        os.environ.update(teacher)
        for run in runs:
            seconds[run.name] = run_recipe(run, args.out)
            if run.evaluates:
                write_tables(args.out / run.name)
    minutes = (time.monotonic() - started) / 60
    rows = list(targets(args.out, runs, minutes, MAX_MINUTES_SHORT if args.short else MAX_MINUTES))
    results = {"machine": machine(), "family": args.family, "minutes": round(minutes, 1), "in_form": in_form}
    write_results(args.json, results | {"runs": seconds}, rows)
    print_targets(rows)
    print(f"rehearsal: {len(runs)} runs in {minutes:.1f} minutes; {args.json}")


if __name__ == "__main__":
    main()
