"""Configs of the stages: compose them with Hydra, validate them with pydantic, and explain errors in them.

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
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmr5_train.common.files import InputError

# A wheel has configs/ inside the package. A checkout, and so an editable install, has it next to the package.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
USER_CONFIGS = "MMR5_CONFIGS"
"""Environment variable with a folder of the user's own options, with the same structure as configs/."""


class StageConfig(BaseModel):
    """The fields that all stages have. Undeclared fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path = Field(description="output folder")
    overwrite: bool = Field(default=False, description="empty the output folder first, if a stage wrote it")
    seed: int = Field(default=42, ge=0, description="seed of all random draws")

    def wrote(self, manifest: dict[str, Any]) -> bool:
        """Whether a stage with these settings wrote the manifest (`overwrite` does not count)."""
        recorded = {key: value for key, value in manifest["config"].items() if key != "overwrite"}
        return recorded == self.model_dump(mode="json", exclude={"overwrite"})


StageT = TypeVar("StageT", bound=BaseModel)


def run_stage(main: Callable[[StageT], None], model: type[StageT], config_name: str) -> None:
    """Runs a stage with the overrides of the command line.

    A user error ends the process with exit code 2 and a message on stderr, without a traceback.
    """
    # By default Hydra prints an error and exits. With this variable it raises, and `_explain` can add the choices.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # these warnings are for library developers

    def task(config: DictConfig) -> None:
        try:
            main(validate(model, _resolve(config)))
        except InputError as error:
            _exit(f"error: {error}")  # exits here, because Hydra would print its own message first

    task.__module__ = f"mmr5.{config_name}"  # Hydra's --help shows this name
    try:
        _use_user_configs()
        _check_flags(model, sys.argv[1:])
        _check_groups(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()
    except InputError as error:
        _exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        _exit(f"error: {_explain(error, config_name, sys.argv[1:])}")
    except KeyboardInterrupt:
        _exit("stopped")


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def _resolve(config: DictConfig) -> Any:
    """The config as plain values. Raises `InputError` for a missing value ("???") or a bad interpolation."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {_first_line(error)}") from None
    if missing:
        raise InputError(f"no value for {', '.join(missing)}; add {' '.join(f'{key}=…' for key in missing)}")
    return values


def validate(model: type[StageT], values: Any) -> StageT:
    """The validated config of a stage. Raises `InputError` that names each invalid field and its choices."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_explain_field(model, problem)}" for problem in error.errors()]
        raise InputError("the config is not valid:\n" + "\n".join(lines)) from None


def compose_stage(model: type[StageT], config_name: str, overrides: Sequence[str]) -> StageT:
    """The config that a stage gets from the command line `config_name` with these overrides.

    Raises:
        InputError: for an invalid override or field, or a field without a value.
    """
    _check_groups(overrides)
    try:
        return validate(model, _resolve(_compose(config_name, overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error, config_name, overrides)) from None


def config_folders() -> list[Path]:
    """The folders that contain configs: the project's, then the user's (MMR5_CONFIGS) if it is set.

    Raises:
        InputError: if the user's folder does not exist, or has a file that the project's folder also has. Hydra
            would silently read the project's file.
    """
    user_folder = os.environ.get(USER_CONFIGS)
    if not user_folder or Path(user_folder).resolve() == CONFIGS:
        return [CONFIGS]
    folder = Path(user_folder).resolve()
    if not folder.is_dir():
        raise InputError(f"{user_folder}: no such folder; give --config-dir or {USER_CONFIGS} a folder of configs")
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        if (CONFIGS / name).is_file():
            raise InputError(f"{path}: the project also has an option {name.with_suffix('')}; rename this file")
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


def _use_user_configs() -> None:
    """Gives `--config-dir DIR` and MMR5_CONFIGS=DIR the same effect: each sets the other.

    Hydra reads the flag. The processes that this one starts, such as the stages of a recipe, read the variable.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    flag = parser.parse_known_args(sys.argv[1:])[0].config_dir
    if flag is not None:
        os.environ[USER_CONFIGS] = str(Path(flag).resolve())
        config_folders()
    elif len(folders := config_folders()) > 1:
        sys.argv[1:1] = ["--config-dir", str(folders[1])]


def _check_flags(model: type[BaseModel], arguments: Sequence[str]) -> None:
    """Raises `InputError` for a field that is written as a flag, as in --seed 3."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name.partition(".")[0] in model.model_fields:
            raise InputError(f"{argument}: fields are not flags; write {name}=…")


def _check_groups(overrides: Sequence[str]) -> None:
    """Raises `InputError` for a group that is set to a plain value, as in prompt=null. Hydra shows a traceback."""
    for override in overrides:
        group, _, option = override.lstrip("+").partition("=")
        if re.fullmatch(r"null|true|false|[+-]?[\d.]+", option, re.IGNORECASE) and _is_group(group):
            raise InputError(
                f"{group}: expected one of its options, found {option} (choices: {group_choices(group)})"
            )


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():  # called inside a running stage, such as a recipe
        return hydra.compose(config_name, list(overrides))
    search_path = [f'hydra.searchpath=["file://{folder}"]' for folder in config_folders()[1:]]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return hydra.compose(config_name, [*overrides, *search_path])


def _explain_field(model: type[BaseModel], problem: Any) -> str:
    """One problem of a pydantic error: the field, what is wrong, and the value or the choices."""
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{name}: no such field{_suggestion(path[-1], _fields_at(model, path[:-1]))}"
    if problem["type"] == "missing":
        return f"{name}: {problem['msg']}"
    value = "null" if problem["input"] is None else repr(problem["input"])
    if problem["type"] in ("tuple_type", "list_type"):
        return f"{name}: Input should be a list, such as {name}=[a,b], found {value}"
    return f"{name}: {problem['msg']}, found {value}"


def _fields_at(model: Any, path: Sequence[str]) -> list[str]:
    """The field names of the model at a dotted path, or an empty list if there is no model at that path."""
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        types = [field.annotation, *get_args(field.annotation)]
        model = next((kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return list(getattr(model, "model_fields", {}))


def _suggestion(name: str, choices: Sequence[str]) -> str:
    """The end of a message about an unknown name: the most similar choice, if there is one, and all choices."""
    if not choices:
        return ""
    similar = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return f"{hint} (choices: {', '.join(sorted(choices))})"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _explain(error: Exception, config_name: str, overrides: Sequence[str]) -> str:
    """The message for an error of Hydra or OmegaConf: the override, what is wrong with it, and the choices."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and cause.options:
            group, _, option = cause.missing_cfg_file.rpartition("/")
            return f"{group}={option}: no such option{_suggestion(option, cause.options)}"
        if isinstance(cause, OverrideParseException):
            lines = [line for line in str(cause).splitlines() if not line.startswith("Error parsing override")]
            return (
                f"{cause.override}: can't be read as an override ({lines[0]}); write field=value or group=option, "
                "and put quotes around a value with special characters: 'field=\"value\"'"
            )
    key = next((str(key) for key in (getattr(cause, "full_key", None) for cause in causes) if key), None)
    if key is None or "not in struct" not in (str(causes[-1]) or str(error)):
        message = str(error).partition("Config search path:")[0]  # the search path does not help a user
        return "\n".join(line for line in message.splitlines() if line and "full_key" not in line)
    return _explain_key(key, config_name, overrides)


def _explain_key(key: str, config_name: str, overrides: Sequence[str]) -> str:
    """The message for an override of a field that does not exist."""
    # Compose with the group options that the user chose: their fields are the choices.
    group_overrides = [o for o in overrides if "=" in o and _is_group(o.lstrip("+").partition("=")[0])]
    config = _compose(config_name, group_overrides)
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if node is None:
        return f"{key}: {parent} is null; set all its fields together: '{parent}={{{name}:…}}'"
    if not isinstance(node, DictConfig):
        return f"{key}: no such field; {parent} is a single value"
    return f"{key}: no such field{_suggestion(name, [str(field) for field in node])}"
