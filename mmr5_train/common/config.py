"""Hydra for every stage: compose, check against the stage's model, run, and speak plainly about errors.

A stage is a function of one validated config:

    if __name__ == "__main__":
        run_stage(main, SftStage, config_name="sft")
"""

from __future__ import annotations

import argparse
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

# A wheel carries configs/ inside the package. A checkout, and so an editable install, has it beside the package.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
OWN_CONFIGS = "MMR5_CONFIGS"  # environment variable: a folder with the user's own options, laid out as configs/


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

    def task(config: DictConfig) -> None:
        try:
            main(validate(model, _resolved(config)))
        except InputError as error:
            _stop(f"error: {error}")  # here already: Hydra would put a line of its own in front

    task.__module__ = f"mmr5.{config_name}"  # Hydra takes the name in its --help from here
    try:
        _use_own_configs()
        _check_groups(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()
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


def config_folders() -> list[Path]:
    """The folders in which configs are looked up: the project's, then the user's own (MMR5_CONFIGS) if it is set.

    Raises `InputError` if the user's folder does not exist, or has a file that the project's folder has too: Hydra
    would silently read the project's.
    """
    own = os.environ.get(OWN_CONFIGS)
    if not own or Path(own).resolve() == CONFIGS:
        return [CONFIGS]
    folder = Path(own).resolve()
    if not folder.is_dir():
        raise InputError(f"{own}: no such folder; --config-dir and {OWN_CONFIGS} name a folder of configs")
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        if (CONFIGS / name).is_file():
            raise InputError(f"{path}: the project has an option {name.with_suffix('')} too; rename this file")
    return [CONFIGS, folder]


def config_path(group: str, option: str) -> Path | None:
    """The file of an option of a config group, or None if the group has no such option."""
    paths = [folder / group / f"{option}.yaml" for folder in config_folders()]
    return next((path for path in paths if path.is_file()), None)


def group_choices(group: str) -> str:
    """The options of a config group, separated by commas; empty if there is no such group."""
    return ", ".join(sorted(path.stem for folder in config_folders() for path in (folder / group).glob("*.yaml")))


def _is_group(name: str) -> bool:
    return any((folder / name).is_dir() for folder in config_folders())


def _use_own_configs() -> None:
    """Makes `--config-dir DIR` and MMR5_CONFIGS=DIR the same: each sets the other.

    Hydra reads the flag. The variable reaches the processes that this one starts, such as a recipe's stages.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    flag = parser.parse_known_args(sys.argv[1:])[0].config_dir
    if flag is not None:
        os.environ[OWN_CONFIGS] = str(Path(flag).resolve())
        config_folders()
    elif len(folders := config_folders()) > 1:
        sys.argv[1:1] = ["--config-dir", str(folders[1])]


def _check_groups(overrides: Sequence[str]) -> None:
    """Raises `InputError` for a group without an option, such as prompt=null: Hydra would show a traceback."""
    for override in overrides:
        group, _, option = override.lstrip("+").partition("=")
        if re.fullmatch(r"null|true|false|[+-]?[\d.]+", option, re.IGNORECASE) and _is_group(group):
            raise InputError(
                f"{group}: needs one of its options, found {option} (choices: {group_choices(group)})"
            )


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():  # inside another stage
        return hydra.compose(config_name, list(overrides))
    own = [f'hydra.searchpath=["file://{folder}"]' for folder in config_folders()[1:]]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return hydra.compose(config_name, [*overrides, *own])


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
    chosen = [o for o in overrides if "=" in o and _is_group(o.lstrip("+").partition("=")[0])]
    here = _compose(config_name, chosen)
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(here, parent) if parent else here
    if node is None:
        return f"{key}: {parent} is null; give its fields together: '{parent}={{{last}:…}}'"
    names = [str(k) for k in node] if isinstance(node, DictConfig) else []
    return f"{key}: no such field{_nearest(last, names)}"
