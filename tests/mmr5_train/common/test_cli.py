import importlib.resources
import subprocess
import sys

import pytest

from mmr5_train.common import cli
from mmr5_train.common.config import CONFIGS


def test_help_shows_a_summary_of_each_command(capsys):
    cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for command in cli.MODULES:
        (line,) = [line for line in lines if line.startswith(f"  {command} ")]
        assert len(line.split()) > 3
        assert len(cli.summary(cli.MODULES[command])) < 80
    cli.main([])
    assert capsys.readouterr().out.splitlines() == lines


def test_unknown_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evalute", "out=x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: no command evalute; did you mean evaluate? (choices: synthetic,"
    )


def test_version_and_configs_are_printed(capsys):
    cli.main(["--version"])
    cli.main(["--configs"])
    version, configs = capsys.readouterr().out.splitlines()
    assert version.startswith("mmr5-train ")
    assert configs == str(CONFIGS)


def run(*arguments):
    command = [sys.executable, "-c", "from mmr5_train.common.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_runs_its_module_with_the_arguments(tmp_path):
    help_run = run("synthetic", "--help")
    assert help_run.returncode == 0
    assert help_run.stdout.startswith("synthetic is powered by Hydra.")
    assert "documents: 260" in help_run.stdout
    invalid_run = run("synthetic", f"out={tmp_path / 'out'}", "documnts=2")
    assert (invalid_run.returncode, invalid_run.stderr.partition(" (")[0]) == (
        2, "error: documnts: no such field; did you mean documents?"
    )  # fmt: skip


def test_help_loads_no_torch():
    code = "import sys; from mmr5_train.common.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("package", ["mmr5_train", "data_construction"])
def test_only_commands_are_directly_in_a_package(package):
    """Libraries are in folders, so that a reader finds the commands at the top."""
    folder = importlib.resources.files(package)
    modules = {f"{package}.{file.name[:-3]}" for file in folder.iterdir() if file.name.endswith(".py")}
    commands = {module for module in cli.MODULES.values() if module.startswith(f"{package}.")}
    assert modules == commands | {f"{package}.__init__"}
