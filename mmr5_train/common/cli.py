"""The console command `mmr5`. `mmr5 sft …` runs `python -m mmr5_train.sft …`.

This module imports none of the commands, so `mmr5 --help` does not load torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.resources
import runpy
import sys

from mmr5_train.common.config import CONFIGS

# Group → command → module. `mmr5 --help` shows the first line of the module's docstring.
COMMANDS: dict[str, dict[str, str]] = {
    "data": {
        "synthetic": "data_construction.synthetic",
        "download": "data_construction.download",
        "candidates": "data_construction.candidates",
        "traces": "data_construction.traces",
        "data-report": "data_construction.report",
    },
    "train": {name: f"mmr5_train.{name}" for name in ("sft", "select", "grpo", "distill", "calibrate")},
    "evaluate": {name: f"mmr5_train.{name}" for name in ("evaluate", "mteb", "report", "compare", "tables")},
    "use": {name: f"mmr5_train.{name}" for name in ("recipe", "demo", "plan", "publish", "serve", "mcp")},
}
MODULES = {command: module for group in COMMANDS.values() for command, module in group.items()}

USAGE = """\
usage: mmr5 COMMAND [group=option] [field=value] …
       mmr5 COMMAND --help     the command's fields, and the options of each group
       mmr5 --version
       mmr5 --configs          print the folder of the configs that come with the package
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the first argument names, with the other arguments.

    For an unknown command, prints the known ones and exits with code 2.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h"):
        print(help_text())
    elif command == "--version":
        print(f"mmr5-train {importlib.metadata.version('mmr5-train')}")
    elif command == "--configs":
        print(CONFIGS)
    elif command in MODULES:
        sys.argv = [f"mmr5 {command}", *rest]
        runpy.run_module(MODULES[command], run_name="__main__", alter_sys=True)
    else:
        similar = difflib.get_close_matches(command, MODULES, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        print(f"error: no command {command}{hint} (choices: {', '.join(MODULES)})", file=sys.stderr)
        sys.exit(2)


def help_text() -> str:
    """The usage, and the commands by group with a summary of each."""
    lines = [USAGE]
    for group, commands in COMMANDS.items():
        lines += [f"{group}:", *(f"  {name:<12}{summary(module)}" for name, module in commands.items()), ""]
    return "\n".join(lines).rstrip()


def summary(module: str) -> str:
    """The first line of a module's docstring. Parses the module, because an import could load torch."""
    source = importlib.resources.files(module.rpartition(".")[0]) / f"{module.rpartition('.')[2]}.py"
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


if __name__ == "__main__":
    main()
