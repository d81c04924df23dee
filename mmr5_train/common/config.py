"""Hydra for every stage: compose, check against the stage's model, run, and speak plainly about errors.

A stage is a function of one validated config:

    if __name__ == "__main__":
        run_stage(main, SftStage, config_name="sft")
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmr5_train.common.files import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class StageConfig(BaseModel):
    """What every stage has. A field that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path = Field(description="output folder")
    overwrite: bool = Field(default=False, description="empty the output folder first, if a stage wrote it")
    seed: int = Field(default=42, ge=0)


StageT = TypeVar("StageT", bound=BaseModel)


def run_stage(main: Callable[[StageT], None], model: type[StageT], config_name: str) -> None:
    """Runs a stage from the command line. Exits with 2 and a message, not a traceback, on the user's errors."""
    # Hydra prints its own reading of an error and exits unless told to raise; the reading here names choices.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell their developers, not their users

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def task(config: DictConfig) -> None:
        try:
            main(validate(model, _resolved(config)))
        except InputError as error:
            _stop(f"error: {error}")  # here already: Hydra would put a line of its own in front

    try:
        _check_groups(sys.argv[1:])
        task()
    except InputError as error:
        _stop(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        _stop(f"error: {_explain(error, config_name, sys.argv[1:])}")
    except KeyboardInterrupt:
        _stop("stopped")


def _stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def _resolved(config: DictConfig) -> Any:
    """The config as plain values. A field that is still "???" has no value yet, and is an error."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).partition(chr(10))[0]}") from None
    if missing:
        raise InputError(f"no value for {', '.join(missing)}; add {' '.join(f'{key}=…' for key in missing)}")
    return values


def validate(model: type[StageT], values: Any) -> StageT:
    """The config as the stage's model. Raises `InputError` naming each wrong field and the choices."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            lines.append("  " + _problem(model, values, problem))
        raise InputError("the config does not fit:\n" + "\n".join(lines)) from None


def compose_stage(model: type[StageT], config_name: str, overrides: Sequence[str]) -> StageT:
    """The config that the command line `config_name` with these overrides gives."""
    _check_groups(overrides)
    try:
        return validate(model, _resolved(_compose(config_name, overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error, config_name, overrides)) from None


def group_choices(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))


def _check_groups(overrides: Sequence[str]) -> None:
    """Raises `InputError` for a group without an option, such as prompt=null: Hydra would show a traceback."""
    for override in overrides:
        group, _, option = override.lstrip("+").partition("=")
        folder = CONFIGS / group
        if re.fullmatch(r"null|true|false|[+-]?[\d.]+", option, re.IGNORECASE) and folder.is_dir():
            raise InputError(
                f"{group}: needs one of its options, found {option} (choices: {group_choices(group)})"
            )


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():  # inside another stage
        return hydra.compose(config_name, list(overrides))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return hydra.compose(config_name, list(overrides))


def _problem(model: type[BaseModel], values: Any, problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    found = f", found {problem['input']!r}" if problem["type"] != "missing" else ""
    if problem["type"] == "extra_forbidden":
        return f"{name}: no such field{_nearest(path[-1], _fields_at(model, path[:-1]))}"
    return f"{name}: {problem['msg']}{found}"


def _fields_at(model: Any, path: list[str]) -> list[str]:
    """Names of the fields of the model at a dotted path, empty where that is not a model."""
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return list(getattr(model, "model_fields", {}))


def _nearest(name: str, choices: list[str]) -> str:
    if not choices:
        return ""
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint} (choices: {', '.join(sorted(choices))})"


def _explain(error: Exception, config_name: str, overrides: Sequence[str]) -> str:
    """One message for an override that Hydra can't apply: its reason, and the fields there are."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = str(causes[-1] if str(causes[-1]) else error).strip()
    key = next((str(k) for k in (getattr(cause, "full_key", None) for cause in causes) if k), None)
    said = str(error).partition("Config search path:")[0]  # Hydra's folders say nothing to a user
    first = "\n".join(line for line in said.splitlines() if line and "full_key" not in line)
    if key is None or "not in struct" not in text:
        return first
    # The same choices of groups, so that the fields are those of the option the user chose.
    chosen = [o for o in overrides if "=" in o and (CONFIGS / o.lstrip("+").partition("=")[0]).is_dir()]
    here = _compose(config_name, chosen)
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(here, parent) if parent else here
    if node is None:
        return f"{key}: {parent} is null; give its fields together: '{parent}={{{last}:…}}'"
    names = [str(k) for k in node] if isinstance(node, DictConfig) else []
    return f"{key}: no such field{_nearest(last, names)}"
