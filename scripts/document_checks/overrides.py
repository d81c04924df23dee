"""Checks of the overrides of a stage: the stage's config is composed and validated with them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from document_checks.project import DocumentError, in_project, selects_ignored_option
from mmr5_train.common.config import USER_CONFIGS, compose_stage
from mmr5_train.common.files import InputError

TRAINER_CONFIGS = {"sft": "SFTConfig", "grpo": "GRPOConfig"}
# Documents may name inputs that do not exist here, and omit required fields.
_EXPECTED_ERRORS = re.compile("no such file|no such folder|no value for")


def check_stage_command(module: str, words: Sequence[str], config_root: Path) -> None:
    """Composes the config of a stage as the stage does before it runs. Ignores modules of other projects.

    Args:
        module: dotted name after `python -m`.
        words: the rest of the command: overrides, `…`, `--help`, `-m` and `--config-dir DIR`.
        config_root: folder that holds the YAML blocks of the document, see `write_config_block`.

    Raises:
        DocumentError: if the module is not a command, or its config is not valid with these overrides.
    """
    if not in_project(module) or module.endswith(".NAME"):
        return
    stage = find_stage(module)
    if stage is None:
        return
    config_model, config_name = stage
    with user_configs(words, config_root) as remaining_words:
        overrides = [word.replace("…", "x") for word in remaining_words if is_checked_word(word)]
        if "-m" in remaining_words:
            overrides = first_job_of_sweep(overrides)
        for override in overrides:
            if "=" not in override:
                raise DocumentError(f"{module}: not an override: {override}")
        try:
            config = compose_stage(config_model, config_name, overrides)
        except InputError as error:
            if not _EXPECTED_ERRORS.search(str(error)):
                raise DocumentError(f"{module}: {error}") from None
        else:
            check_trainer_fields(config_name, config)


def is_checked_word(word: str) -> bool:
    return word not in ("…", "--help", "-m") and not selects_ignored_option(word)


def first_job_of_sweep(overrides: Sequence[str]) -> list[str]:
    """The overrides of the first job of a Hydra multirun: the first of the values that an override sweeps over."""
    return [
        f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in OverridesParser.create().parse_overrides(list(overrides))
    ]


def check_trainer_fields(config_name: str, config: Any) -> None:
    """Checks the fields under `trainer`, which the stage passes to TRL's config without a schema of its own."""
    if config_name not in TRAINER_CONFIGS:
        return
    trainer_config = getattr(importlib.import_module("trl"), TRAINER_CONFIGS[config_name])
    known_fields = {field.name for field in dataclasses.fields(trainer_config)}
    for name in config.trainer:
        if name not in known_fields:
            raise DocumentError(f"trainer.{name}: trl.{trainer_config.__name__} has no such field")


@contextmanager
def user_configs(words: Sequence[str], config_root: Path) -> Iterator[Sequence[str]]:
    """Removes `--config-dir DIR` from the words, and makes DIR the user's config folder within the context."""
    if "--config-dir" not in words:
        yield words
        return
    position = words.index("--config-dir")
    name = words[position + 1]
    if not (config_root / name).is_dir():
        raise DocumentError(f"--config-dir {name}: no YAML block above starts with '# {name}/GROUP/OPTION.yaml'")
    os.environ[USER_CONFIGS] = str(config_root / name)
    try:
        yield [*words[:position], *words[position + 2 :]]
    finally:
        del os.environ[USER_CONFIGS]


def write_config_block(block: str, config_root: Path) -> None:
    """Writes a YAML block below `config_root`, if its first line is a comment `# DIR/GROUP/OPTION.yaml`."""
    if match := re.match(r"# (\S+\.yaml)\n", block):
        path = config_root / match[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block, encoding="utf-8")


@cache
def find_stage(module: str) -> tuple[Any, str] | None:
    """The config model and config name of a stage, from `run_stage(main, MODEL, NAME)` in its source.

    Returns None for a module that is a command, but not a stage.

    Raises:
        DocumentError: if the module does not exist or is not a command.
    """
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError:
        raise DocumentError(f"no such module: {module}") from None
    source = inspect.getsource(loaded)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_stage":
            _, config_model, config_name = node.args
            return getattr(loaded, ast.unparse(config_model)), ast.literal_eval(config_name)
    if '__name__ == "__main__"' in source:
        return None
    raise DocumentError(f"{module} is not a command")
