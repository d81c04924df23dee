"""A recipe: every stage from documents to a report, with the choices of one experiment.

    python -m mmr5_train.recipe experiment=mm_r5 out=outputs/mm_r5 launch=zero2
    python -m mmr5_train.recipe experiment=[recommended,no_think] size=tiny
    python -m mmr5_train.recipe -m experiment=recommended,sft_only seed=0,1 size=tiny 'out=outputs/${name}-${seed}'

Prints where the recipe departs from MM-R5 as published, then each stage's command before it runs. A stage that
was made already with the same settings, from the same files, is not made again: a recipe that was stopped goes
on with the same command, and recipes may share a folder (`shared`) for what they have in common.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import Field

from data_construction import candidates, synthetic, traces
from mmr5_train import distill, evaluate, grpo, report, select, sft
from mmr5_train.common.config import CONFIGS, StageConfig, compose_stage, config_path, group_choices, run_stage
from mmr5_train.common.files import RECIPE, InputError, file_hash, is_unfinished, read_manifest, write_json

# Name in a recipe → (the stage's module, its config model, its entry config), in the order in which they run.
STAGES: dict[str, tuple[Any, type[StageConfig], str]] = {
    "corpus": (synthetic, synthetic.SyntheticStage, "synthetic"),
    "heldout": (candidates, candidates.CandidatesStage, "candidates"),
    "candidates": (candidates, candidates.CandidatesStage, "candidates"),
    "traces": (traces, traces.TracesStage, "traces"),
    "sft": (sft, sft.SftStage, "sft"),
    "select": (select, select.SelectStage, "select"),
    "grpo": (grpo, grpo.GrpoStage, "grpo"),
    "evaluate": (evaluate, evaluate.EvaluateStage, "evaluate"),
    "teach": (evaluate, evaluate.EvaluateStage, "evaluate"),
    "distill": (distill, distill.DistillStage, "distill"),
    "modes": (evaluate, evaluate.EvaluateStage, "evaluate"),
    "report": (report, report.ReportStage, "report"),
}
LAUNCHED = ("sft", "grpo")
# Where things are, and seeds: no departure by themselves.
PLACES = ("out", "data", "overwrite", "seed", "model.path", "seen", "questions", "systems", "exclude")


class RecipeStage(StageConfig):
    """`python -m mmr5_train.recipe` (configs/recipe.yaml)."""

    name: str
    shared: Path = Field(description="folder of what recipes have in common")
    folders: dict[str, Path] = Field(description="where the stages put what another recipe may share")
    launch: str | None = Field(default=None, description="accelerate's config for sft and grpo: a name or a file")
    leave_out: list[str] = Field(default=[], description="stages that are not made")
    stages: dict[str, dict[str, Any] | None] = Field(description="what each stage is told; null: nothing, none")


def main(config: RecipeStage) -> None:
    commands = stage_commands(config)
    for line in departures(config):
        print(f"  {line}")
    run_commands(commands, config)


def stage_commands(config: RecipeStage) -> dict[str, list[str]]:
    """The overrides of each stage of the recipe, in the order in which they run."""
    for field, names in (("stages", config.stages), ("leave_out", config.leave_out)):
        if unknown := sorted(set(names) - set(STAGES)):
            raise InputError(f"{field}: no stage is called {unknown[0]} (choices: {', '.join(STAGES)})")
    names = [name for name in STAGES if name not in config.leave_out]
    told = {name: values for name in names if (values := config.stages.get(name)) is not None}
    if "report" in told:
        folders = {name: values["out"] for name, values in told.items() if "out" in values}
        shown: dict[str, Any] = {name: folders[name] for name in ("sft", "grpo", "modes") if name in folders}
        data = [
            folders[name] for name in ("corpus", "heldout", "candidates", "traces", "select") if name in folders
        ]
        told["report"] = {"evaluation": folders.get("evaluate"), **shown, "data": data, **told["report"]}
    return {
        name: [
            f"{key}={written(value)}" for key, value in told_apart(STAGES[name][2], values) if value is not None
        ]
        for name, values in told.items()
    }


def told_apart(entry: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a stage is told, with the fields of `trainer` that its entry config does not name added one by one."""
    for key, value in values.items():
        if key == "trainer":
            named = OmegaConf.select(OmegaConf.load(CONFIGS / f"{entry}.yaml"), key)
            yield key, {field: given for field, given in value.items() if field in named}
            yield from ((f"+{key}.{field}", given) for field, given in value.items() if field not in named)
        else:
            yield key, value


def written(value: Any) -> str:
    """A value in Hydra's override grammar (hydra.cc/docs/advanced/override_grammar); nulls in it fall out."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        parts = [f"{key}:{written(part)}" for key, part in value.items() if part is not None]
        return "{" + ",".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(part) for part in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[\w/.+-]+", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def run_commands(commands: dict[str, list[str]], config: RecipeStage) -> None:
    """Runs the stages, each as from the command line; those made already stay. Ends with recipe.json."""
    launch = launch_file(config.launch) if config.launch else None
    anew, made, before = config.overwrite, {}, _seconds_before(config.out / RECIPE)
    for name, overrides in commands.items():
        module, model, entry = STAGES[name]
        stage = compose_stage(model, entry, overrides)
        made[name] = {"out": str(stage.out), "seconds": before.get(str(stage.out))}
        if not anew and is_made(stage):
            print(f"\n{name}: already in {stage.out}", flush=True)
            continue
        anew = True  # what follows reads what this stage writes
        overwrite = config.overwrite or not is_unfinished(stage.out, entry)  # one that was stopped goes on
        started = time.monotonic()
        if launch and name in LAUNCHED:
            launched = ["accelerate.commands.launch", "--config_file", str(launch), "-m", module.__name__]
            command = [*launched, *overrides, f"overwrite={written(overwrite)}"]
            print(f"\n{name}: {shlex.join(['python', '-m', *command])}", flush=True)
            ended = subprocess.run([sys.executable, "-m", *command])
            if ended.returncode:
                raise InputError(f"{name}: ended with {ended.returncode}; its message stands above")
        else:
            print(f"\n{name}: {shlex.join(['python', '-m', module.__name__, *overrides])}", flush=True)
            module.main(stage.model_copy(update={"overwrite": overwrite}))
        made[name]["seconds"] = round(time.monotonic() - started, 1)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / RECIPE, {"name": config.name, "seed": config.seed, "stages": made})


def launch_file(name: str) -> Path:
    """accelerate's config: an option of configs/accelerate, or a file. Raises `InputError` if it is neither."""
    path = config_path("accelerate", name) or Path(name)
    if not path.is_file():
        raise InputError(f"launch: no such file as {name} (choices: {group_choices('accelerate')}, or a file)")
    return path


def _seconds_before(path: Path) -> dict[str, float]:
    """By folder, what the stages took that an earlier run of the recipe made."""
    if not path.is_file():
        return {}
    return {
        made["out"]: made["seconds"] for made in json.loads(path.read_text(encoding="utf-8"))["stages"].values()
    }


def is_made(stage: StageConfig) -> bool:
    """Whether the stage's folder holds what this config makes, from files that have not changed since."""
    try:
        manifest = read_manifest(stage.out)
    except InputError:
        return False
    settings = stage.model_dump(mode="json", exclude={"overwrite"})
    made = {key: value for key, value in manifest["config"].items() if key != "overwrite"}
    same_files = all(
        Path(path).is_file() and file_hash(Path(path)) == digest for path, digest in manifest["inputs"].items()
    )
    return made == settings and same_files


def departures(config: RecipeStage) -> Iterator[str]:
    """A line for each setting that is not MM-R5's, as `stage.field: its value (MM-R5: its value)`."""
    published = compose_stage(RecipeStage, "recipe", [f"out={written(str(config.out))}"])
    theirs, ours = resolved(published), resolved(config)
    for name in STAGES:
        if name in ours and name in theirs:
            for key in sorted(ours[name].keys() | theirs[name].keys()):
                here, there = ours[name].get(key), theirs[name].get(key)
                if here != there and not key.startswith(PLACES):
                    yield f"{name}.{key}: {here} (MM-R5: {there})"
        elif name in ours or name in theirs:
            yield f"{name}: {'added' if name in ours else 'left out'}"


def resolved(config: RecipeStage) -> dict[str, dict[str, Any]]:
    """Every setting of every stage, by dotted name."""
    return {
        name: dict(flat(compose_stage(STAGES[name][1], STAGES[name][2], overrides).model_dump(mode="json")))
        for name, overrides in stage_commands(config).items()
    }


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    run_stage(main, RecipeStage, "recipe")
