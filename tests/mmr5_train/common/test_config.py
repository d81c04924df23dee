import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hydra import compose, initialize_config_dir
from pydantic import BaseModel, ConfigDict, Field

import mmr5_train.common.config
from mmr5_train.common.config import OWN_CONFIGS, StageConfig, compose_stage, run_stage, validate
from mmr5_train.common.files import InputError

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
ENTRIES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "quiet")

ENTRY = """
defaults:
  - quiet
  - teacher: offline
  - _self_
out: ???
overwrite: false
seed: 42
steps: 3
order: score
"""


class Teacher(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: str
    words: int = 40
    url: str | None = None


class Stage(StageConfig):
    teacher: Teacher
    steps: int = Field(ge=1)
    order: Literal["score", "shuffled"] = "score"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a small stage with a command line. Returns exit status, standard output and standard error."""
    configs = tmp_path / "configs"
    (configs / "teacher").mkdir(parents=True)
    (configs / "quiet.yaml").write_text((CONFIGS / "quiet.yaml").read_text())
    (configs / "stage.yaml").write_text(ENTRY)
    (configs / "teacher" / "offline.yaml").write_text("kind: offline\nwords: 40\n")
    (configs / "teacher" / "server.yaml").write_text("kind: server\nurl: ???\n")
    monkeypatch.setattr(mmr5_train.common.config, "CONFIGS", configs)
    monkeypatch.setenv(OWN_CONFIGS, "")  # restored after the test, whatever the stage sets
    monkeypatch.chdir(tmp_path)

    def call(*arguments, main=print):
        monkeypatch.setattr(sys, "argv", ["stage.py", *arguments])
        status = 0
        try:
            run_stage(main, Stage, "stage")
        except SystemExit as stop:
            status = stop.code or 0
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


def test_a_stage_gets_its_checked_config_and_leaves_nothing_of_hydra(run, tmp_path):
    given = []
    status, out, err = run("out=made", "steps=5", "teacher.words=10", main=given.append)
    assert (status, out, err) == (0, "", "")
    teacher = Teacher(kind="offline", words=10)
    assert given == [Stage(out=Path("made"), seed=42, steps=5, teacher=teacher)]
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


def test_help_shows_the_fields_and_the_choices_of_a_group(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert "teacher: offline, server" in out
    assert "steps: 3" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stepz=4"],
            "stepz: no such field; did you mean steps? (choices: order, out, overwrite, seed, steps, teacher)",
        ),
        (["+stepz=4"], "stepz: no such field; did you mean steps? (choices: order, out, overwrite, "),
        (["teacher.wrds=4"], "teacher.wrds: no such field; did you mean words? (choices: kind, words)"),
        (["+teacher.wrds=4"], "teacher.wrds: no such field; did you mean words? (choices: kind, url, words)"),
        (
            ["teacher=server", "teacher.urll=x"],
            "teacher.urll: no such field; did you mean url? (choices: kind, url)",
        ),
        (
            ["steps=many"],
            "steps: Input should be a valid integer, unable to parse string as an integer, found 'many'",
        ),
        (["steps=0"], "steps: Input should be greater than or equal to 1, found 0"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0, found -1"),
        (["teacher.words=[1]"], "teacher.words: Input should be a valid integer, found [1]"),
        (["order=random"], "order: Input should be 'score' or 'shuffled', found 'random'"),
        (["~steps"], "steps: Field required"),
        (["teacher=gpt"], "Could not find 'teacher/gpt'\nAvailable options in 'teacher':\n\toffline\n\tserver\n"),
        (["teacher=null"], "teacher: needs one of its options, found null (choices: offline, server)"),
        (["teacher=5"], "teacher: needs one of its options, found 5 (choices: offline, server)"),
        (["teacher=server"], "no value for teacher.url; add teacher.url=…"),
        (["out=${nothing}"], "out: Interpolation key 'nothing' not found"),
        (["steps"], "Error parsing override 'steps'"),
        (["steps=[1"], "no viable alternative at input '[1'"),
    ],
)
def test_a_wrong_command_line_is_named_with_the_choices(run, arguments, message):
    status, out, err = run("out=made", *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert "Error executing job" not in err


def test_every_wrong_field_is_named_at_once(run):
    _, _, err = run("out=made", "steps=0", "order=random", "teacher.words=few")
    assert err.startswith("error: the config does not fit:\n  ")
    assert all(f"\n  {field}: " in err for field in ("steps", "order", "teacher.words"))


def test_a_field_without_a_value_is_asked_for(run):
    status, _, err = run(main=lambda config: pytest.fail("the stage ran without an output folder"))
    assert (status, err) == (2, "error: no value for out; add out=…\n")


def test_an_input_error_of_the_stage_is_its_message_alone(run):
    def main(config):
        raise InputError("tasks.jsonl, line 3: not valid JSON")

    assert run("out=made", main=main) == (2, "", "error: tasks.jsonl, line 3: not valid JSON\n")


def test_a_defect_of_the_stage_is_not_hidden(run):
    def main(config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run("out=made", main=main)


def test_compose_stage_is_the_command_line_in_process(run):
    config = compose_stage(Stage, "stage", ["out=made", "teacher=server", "teacher.url=http://x"])
    assert config.teacher == Teacher(kind="server", url="http://x")
    for overrides, message in [
        ([], "no value for out"),
        (["out=x", "steps=0"], "steps: Input should be greater"),
        (["out=x", "teacher=server", "teacher.urll=x"], r"choices: kind, url\)"),
        (["out=x", "teacher=gpt"], "Available options"),
    ]:
        with pytest.raises(InputError, match=message):
            compose_stage(Stage, "stage", overrides)


def test_a_stage_can_compose_another(run):
    composed = []
    status, _, err = run("out=a", main=lambda _: composed.append(compose_stage(Stage, "stage", ["out=b"])))
    assert (status, err) == (0, "")
    assert composed[0].out == Path("b")


def test_validate_names_fields_of_nested_optional_models():
    class Outer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        teacher: Teacher | None = None

    with pytest.raises(InputError, match=r"teacher\.word: no such field; did you mean words\?"):
        validate(Outer, {"teacher": {"kind": "a", "word": 1}})
    with pytest.raises(InputError, match=r"zzz: no such field \(choices: teacher\)"):
        validate(Outer, {"zzz": 1})


@pytest.fixture
def own_configs(tmp_path):
    """A user's folder with one teacher."""
    folder = tmp_path / "own configs"
    (folder / "teacher").mkdir(parents=True)
    (folder / "teacher" / "mine.yaml").write_text("kind: mine\nwords: 7\n")
    return folder


@pytest.mark.parametrize("way", ["flag", "flag with =", "variable"])
def test_own_options_are_found_and_listed(run, own_configs, monkeypatch, way):
    flags = {"flag": ["--config-dir", str(own_configs)], "flag with =": [f"--config-dir={own_configs}"]}.get(
        way, []
    )
    if way == "variable":
        monkeypatch.setenv(OWN_CONFIGS, str(own_configs))
    given = []
    assert run(*flags, "out=made", "teacher=mine", main=given.append)[0] == 0
    assert given[0].teacher == Teacher(kind="mine", words=7)
    assert "teacher: mine, offline, server" in run(*flags, "--help")[1]
    assert "\tmine\n\toffline\n" in run(*flags, "out=made", "teacher=gpt")[2]
    assert "(choices: mine, offline, server)" in run(*flags, "out=made", "teacher=null")[2]
    assert "teacher.wrds: no such field; did you mean words?" in run(*flags, "teacher=mine", "teacher.wrds=1")[2]


def test_stages_started_by_a_stage_find_own_options(run, own_configs):
    composed = []

    def main(config):
        composed.append(compose_stage(Stage, "stage", ["out=b", "teacher=mine"]))

    assert run("--config-dir", "own configs", "out=a", main=main)[0] == 0
    composed.append(
        compose_stage(Stage, "stage", ["out=b", "teacher=mine"])
    )  # another process, through the variable
    assert [config.teacher.words for config in composed] == [7, 7]


def test_own_folder_that_cannot_be_used_is_an_error(run, own_configs):
    status, _, err = run("--config-dir", "nowhere", "out=a")
    assert status == 2
    assert err.endswith("nowhere: no such folder; --config-dir and MMR5_CONFIGS name a folder of configs\n")
    (own_configs / "teacher" / "server.yaml").write_text("kind: mine\n")
    status, _, err = run("--config-dir", str(own_configs), "out=a")
    assert status == 2
    assert err.endswith("server.yaml: the project has an option teacher/server too; rename this file\n")


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_config_composes_and_is_quiet(entry):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose(entry, return_hydra_config=True)
    assert config.hydra.output_subdir is None
    assert config.hydra.job.chdir is False
    if entry not in ("download", "publish", "serve"):  # they add to what is there, or write nothing
        assert {"out", "overwrite", "seed"} <= set(config)


def stage(*arguments):
    command = [sys.executable, "-m", "data_construction.synthetic", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_real_stage_from_the_command_line(tmp_path):
    shown = stage("--help")
    assert shown.returncode == 0
    assert "seed: " in shown.stdout
    wrong = stage(f"out={tmp_path / 'made'}", "sed=3")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: sed: no such field; did you mean seed? (choices: ")
    assert not (tmp_path / "made").exists()
