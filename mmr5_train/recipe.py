"""Runs all stages of an experiment, from documents to a report.

    python -m mmr5_train.recipe experiment=mm_r5 out=outputs/mm_r5 launch=zero2
    python -m mmr5_train.recipe experiment=[recommended,no_think] size=tiny
    python -m mmr5_train.recipe -m experiment=recommended,sft_only seed=0,1 size=tiny 'out=outputs/${name}-${seed}'

A recipe (configs/recipe.yaml with options of `experiment` and `size`) lists, for each stage, the values that
differ from the stage's own config. This command turns them into Hydra overrides, composes each stage's config from
configs/<stage>.yaml and those overrides, and runs the stages in order. It first prints each setting that differs
from MM-R5 as published (recipes/departures.py). Before each stage, it prints the command that would run the stage.
Before the first stage that costs money or trains, it prints how many examples the trainings get
(recipes/forecast.py), and stops if they are fewer than the recipe wants and a teacher would be paid for them.

It skips a stage whose folder already holds the result of the same config and unchanged input files. After the
first stage that runs, it runs all later stages, because they read new inputs. An interrupted stage resumes. So the
same command continues a stopped recipe, and recipes can share stages through the folder `shared`.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from pydantic import Field

from data_construction import candidates, synthetic, traces
from mmr5_train import calibrate, distill, evaluate, grpo, report, select, sft
from mmr5_train.common.config import CONFIGS, StageConfig, compose_stage, config_path, group_choices, run_stage
from mmr5_train.common.files import RECIPE, InputError, file_hash, is_unfinished, read_manifest, write_json
from mmr5_train.recipes.departures import Settings, launch_settings, resolved_settings
from mmr5_train.recipes.departures import departures as find_departures
from mmr5_train.recipes.forecast import forecasts
from mmr5_train.recipes.inherited import inherit_settings


class Stage(NamedTuple):
    """A stage of a recipe: the module with its `main`, its config model, and the name of its entry config."""

    module: ModuleType
    model: type[StageConfig]
    entry: str


# The stages by their name in a recipe, in the order in which they run.
STAGES: dict[str, Stage] = {
    "corpus": Stage(synthetic, synthetic.SyntheticStage, "synthetic"),
    "heldout": Stage(candidates, candidates.CandidatesStage, "candidates"),
    "candidates": Stage(candidates, candidates.CandidatesStage, "candidates"),
    "traces": Stage(traces, traces.TracesStage, "traces"),
    "sft": Stage(sft, sft.SftStage, "sft"),
    "select": Stage(select, select.SelectStage, "select"),
    "grpo": Stage(grpo, grpo.GrpoStage, "grpo"),
    "evaluate": Stage(evaluate, evaluate.EvaluateStage, "evaluate"),
    "teach": Stage(evaluate, evaluate.EvaluateStage, "evaluate"),
    "distill": Stage(distill, distill.DistillStage, "distill"),
    "calibrate": Stage(calibrate, calibrate.CalibrateStage, "calibrate"),
    "modes": Stage(evaluate, evaluate.EvaluateStage, "evaluate"),
    "report": Stage(report, report.ReportStage, "report"),
}
# Stages before the first one that costs money or trains.
CANDIDATE_STAGES = ("corpus", "heldout", "candidates")
# Stages that run under `accelerate launch` if `launch` is set.
LAUNCHED = ("sft", "grpo")
# Stages that share their questions over as many processes. They only run a model, so they don't use DeepSpeed:
# --multi_gpu takes precedence over the type in the launch file.
SHARED = ("select", "evaluate", "teach", "modes")


class RecipeStage(StageConfig):
    """Config of `python -m mmr5_train.recipe` (configs/recipe.yaml)."""

    name: str
    shared: Path = Field(description="folder of the stages that recipes share")
    folders: dict[str, Path] = Field(description="output folders of the stages that recipes may share")
    traced_types: list[str] = Field(
        default=[], description="types of the questions that have traces, where `size` distinguishes them"
    )
    launch: str | None = Field(
        default=None, description="accelerate's config for the stages that run a model: a name or a file"
    )
    leave_out: list[str] = Field(default=[], description="stages that don't run")
    stages: dict[str, dict[str, Any] | None] = Field(
        description="stage → the values that differ from its own config; null: the stage doesn't run"
    )


def main(config: RecipeStage) -> None:
    overrides = stage_overrides(config)
    inherit_settings(compose_stages(overrides))  # before anything runs, checks that no stage contradicts another
    print("settings that differ from MM-R5 as published:")
    for line in departures(config):
        print(f"  {line}")
    run_stages(overrides, config)


def stage_overrides(config: RecipeStage) -> dict[str, list[str]]:
    """The Hydra overrides of each stage that runs, in the order in which the stages run.

    Raises `InputError` if `stages` or `leave_out` names an unknown stage.
    """
    for field, names in (("stages", config.stages), ("leave_out", config.leave_out)):
        if unknown := sorted(set(names) - set(STAGES)):
            raise InputError(f"{field}: no stage is called {unknown[0]} (choices: {', '.join(STAGES)})")
    values_by_stage = {
        name: values
        for name in STAGES
        if name not in config.leave_out and (values := config.stages.get(name)) is not None
    }
    if "report" in values_by_stage:
        values_by_stage["report"] = report_inputs(values_by_stage) | values_by_stage["report"]
    return {name: to_overrides(STAGES[name].entry, values) for name, values in values_by_stage.items()}


def report_inputs(values_by_stage: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The folders that the report reads: those of the recipe's other stages."""
    folders = {name: values["out"] for name, values in values_by_stage.items() if "out" in values}
    inputs: dict[str, Any] = {"evaluation": folders.get("evaluate")}
    inputs |= {name: folders[name] for name in ("sft", "grpo", "modes") if name in folders}
    data = [folders[name] for name in ("corpus", "heldout", "candidates", "traces", "select") if name in folders]
    return inputs | {"data": data}


def to_overrides(entry: str, values: Mapping[str, Any]) -> list[str]:
    """Hydra overrides that set these values in an entry config; a value of None is omitted.

    Hydra needs a "+" to add a field that the config does not have. `trainer` accepts every field of TRL's
    arguments, so those that the entry config does not list are added one by one.
    """
    overrides = []
    for key, value in values.items():
        if key == "trainer":
            listed = OmegaConf.select(OmegaConf.load(CONFIGS / f"{entry}.yaml"), key)
            overrides.append(to_override(key, {field: v for field, v in value.items() if field in listed}))
            added = {f"+{key}.{field}": v for field, v in value.items() if field not in listed}
            overrides += [to_override(field, v) for field, v in added.items() if v is not None]
        elif value is not None:
            overrides.append(to_override(key, value))
    return overrides


def to_override(key: str, value: Any) -> str:
    return f"{key}={to_override_value(value)}"


def to_override_value(value: Any) -> str:
    """A value in Hydra's override grammar (hydra.cc/docs/advanced/override_grammar); omits dict items of None."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        items = [f"{key}:{to_override_value(item)}" for key, item in value.items() if item is not None]
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(to_override_value(item) for item in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[\w/.+-]+", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def run_stages(overrides_by_stage: Mapping[str, list[str]], config: RecipeStage) -> None:
    """Runs the stages in order, skips those that are up to date, and writes recipe.json.

    recipe.json records where each stage wrote and the seconds of its last run.
    """
    launch = launch_file(config.launch) if config.launch else None
    recorded_seconds = _recorded_seconds(config.out / RECIPE)
    inputs_changed = config.overwrite
    stages = compose_stages(overrides_by_stage)
    inherited = inherit_settings(stages)
    check_verdicts(inherited)
    distill.check_recipe(inherited)
    records = {}
    forecast_shown = False
    for name, overrides in overrides_by_stage.items():
        stage, entry = stages[name], STAGES[name].entry
        if not forecast_shown and name not in CANDIDATE_STAGES:
            show_forecast(stages, paid=name == "traces" and (inputs_changed or not is_up_to_date(stage)))
            forecast_shown = True
        seconds = recorded_seconds.get(str(stage.out))
        if not inputs_changed and is_up_to_date(stage):
            print(f"\n{name}: already in {stage.out}", flush=True)
        else:
            inputs_changed = True  # of all later stages
            resume = not config.overwrite and is_unfinished(stage.out, entry)
            stage = stage.model_copy(update={"overwrite": not resume})
            if name == "teach":
                distill.check_recipe(stages)
            seconds = run_one_stage(name, stage, overrides, launch)
        records[name] = {"out": str(stage.out), "seconds": seconds}
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / RECIPE, {"name": config.name, "seed": config.seed, "stages": records})


def check_verdicts(stages: Mapping[str, Any]) -> None:
    """Raises `InputError` if GRPO's reward needs verdicts that the reasoning of this recipe does not state."""
    if "grpo" not in stages:
        return
    causes = {
        "stages.traces.refine=true": "traces" in stages and stages["traces"].refine,
        "stages.sft.think=false": "sft" in stages and not stages["sft"].think,
        "stages.grpo.think=false": not stages["grpo"].think,
    }
    for cause, no_verdicts in causes.items():
        verdicts = False if no_verdicts else None
        stages["grpo"].reward.check_verdicts(verdicts, f"the model of this recipe ({cause})")


def show_forecast(stages: Mapping[str, Any], paid: bool) -> None:
    """Prints how many examples SFT and GRPO get.

    `paid`: the traces stage runs next. Raises `InputError` if it would pay a teacher although SFT or GRPO gets
    fewer examples than the recipe wants.
    """
    found = forecasts(stages)
    for name, forecast in found.items():
        print(f"examples of {name}: {forecast}", flush=True)
    short = [forecast for forecast in found.values() if forecast.is_short]
    if short and paid and stages["traces"].teacher.name == "openai":
        accepted = " ".join(f"{forecast.setting}={forecast.available.number}" for forecast in short)
        problems = "; ".join(map(str, short))
        raise InputError(
            f"before the teacher is paid: {problems}. Change stages.candidates, or accept it with {accepted}"
        )


def run_one_stage(name: str, stage: StageConfig, overrides: list[str], launch: Path | None) -> float:
    """Prints a stage's command and runs it, in this process or under `accelerate launch`. Returns the seconds."""
    module = STAGES[name].module
    started = time.monotonic()
    if launch and is_launched(name, stage):
        command = ["accelerate.commands.launch", "--config_file", str(launch)]
        command += ["--multi_gpu"] if name in SHARED else []
        command += ["-m", module.__name__, *overrides, to_override("overwrite", stage.overwrite)]
        print(f"\n{name}: {shlex.join(['python', '-m', *command])}", flush=True)
        process = subprocess.run([sys.executable, "-m", *command])
        if process.returncode:
            raise InputError(f"{name}: failed with exit code {process.returncode}; see its message above")
    else:
        print(f"\n{name}: {shlex.join(['python', '-m', module.__name__, *overrides])}", flush=True)
        module.main(stage)
    return round(time.monotonic() - started, 1)


def is_launched(name: str, stage: StageConfig) -> bool:
    """Whether a stage runs in the processes of a launch: it runs a model, and not one that needs all GPUs."""
    if isinstance(stage, select.SelectStage):
        return stage.difficulty is not None and stage.difficulty.rollouts is None
    model = getattr(stage, "model", None)
    return name in (*LAUNCHED, *SHARED) and (model is None or model.device_map is None)


def launch_file(name: str) -> Path:
    """accelerate's config: an option of configs/accelerate, or a file. Raises `InputError` if it is neither."""
    path = config_path("accelerate", name) or Path(name)
    if not path.is_file():
        raise InputError(f"launch: no such file as {name} (choices: {group_choices('accelerate')}, or a file)")
    return path


def _recorded_seconds(path: Path) -> dict[str, float]:
    """Output folder → seconds of the stage, from the recipe.json of an earlier run; empty without one."""
    if not path.is_file():
        return {}
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return {record["out"]: record["seconds"] for record in stages.values()}


def is_up_to_date(stage: StageConfig) -> bool:
    """Whether the stage's folder holds the finished result of this config, and the input files are unchanged."""
    try:
        manifest = read_manifest(stage.out)
    except InputError:
        return False
    return stage.wrote(manifest) and all(
        Path(path).is_file() and file_hash(Path(path)) == digest for path, digest in manifest["inputs"].items()
    )


def departures(config: RecipeStage) -> Iterator[str]:
    """Yields a line for each setting of the recipe that differs from MM-R5's."""
    mm_r5 = compose_stage(RecipeStage, "recipe", [to_override("out", str(config.out))])
    return find_departures(stage_settings(config), stage_settings(mm_r5))


def stage_settings(config: RecipeStage) -> Settings:
    """All settings of each stage that runs, with those of its checkpoint and TRL's defaults, and of the launch."""
    settings = {"launch": launch_settings(launch_file(config.launch) if config.launch else None)}
    stages = inherit_settings(compose_stages(stage_overrides(config)))
    return settings | {name: resolved_settings(name, stage) for name, stage in stages.items()}


def compose_stages(overrides_by_stage: Mapping[str, list[str]]) -> dict[str, StageConfig]:
    """The config of each stage that runs."""
    return {
        name: compose_stage(STAGES[name].model, STAGES[name].entry, overrides)
        for name, overrides in overrides_by_stage.items()
    }


if __name__ == "__main__":
    run_stage(main, RecipeStage, "recipe")
