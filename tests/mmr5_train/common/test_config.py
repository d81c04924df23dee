import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hydra import compose, initialize_config_dir
from pydantic import BaseModel, ConfigDict, Field

import mmr5_train.common.config
from mmr5_train.common.config import USER_CONFIGS, StageConfig, compose_stage, run_stage, validate
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
tags: []
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
    tags: tuple[str, ...] = ()


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
    monkeypatch.setenv(USER_CONFIGS, "")  # so that monkeypatch restores it after the test
    monkeypatch.chdir(tmp_path)

    def call(*arguments, main=print):
        monkeypatch.setattr(sys, "argv", ["stage.py", *arguments])
        status = 0
        try:
            run_stage(main, Stage, "stage")
        except SystemExit as stop:
            status = stop.code or 0
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def test_stage_gets_its_validated_config_and_hydra_writes_no_files(run, tmp_path):
    configs = []
    status, out, err = run("out=results", "steps=5", "teacher.words=10", main=configs.append)
    assert (status, out, err) == (0, "", "")
    teacher = Teacher(kind="offline", words=10)
    assert configs == [Stage(out=Path("results"), seed=42, steps=5, teacher=teacher)]
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


def test_help_shows_the_fields_and_the_options_of_a_group(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert "teacher: offline, server" in out
    assert "steps: 3" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stepz=4"],
            "stepz: no such field; did you mean steps? "
            "(choices: order, out, overwrite, seed, steps, tags, teacher)",
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
        (["teacher=gpt"], "error: teacher=gpt: no such option (choices: offline, server)\n"),
        (["teacher=ofline"], "teacher=ofline: no such option; did you mean offline? (choices: offline, server)"),
        (["teacher=null"], "teacher: expected one of its options, found null (choices: offline, server)"),
        (["teacher=5"], "teacher: expected one of its options, found 5 (choices: offline, server)"),
        (["teacher=server"], "no value for teacher.url; add teacher.url=…"),
        (["out=${nothing}"], "out: Interpolation key 'nothing' not found"),
        (["steps"], "steps: can't be read as an override (missing EQUAL at '<EOF>'); write field=value or group="),
        (["steps=[1"], "steps=[1: can't be read as an override (no viable alternative at input '[1'); write "),
        (["out=a=b"], "out=a=b: can't be read as an override (mismatched input '=' expecting <EOF>); write "),
        (["seed=null"], "seed: Input should be a valid integer, found null"),
        (["tags=x"], "tags: Input should be a list, such as tags=[a,b], found 'x'"),
        (["--steps", "3"], "--steps: fields are not flags; write steps=…"),
        (["--teacher.words=3"], "--teacher.words=3: fields are not flags; write teacher.words=…"),
        (["steps.few=1"], "steps.few: no such field; steps is a single value"),
    ],
)
def test_invalid_override_gives_a_message_with_the_choices(run, arguments, message):
    status, out, err = run("out=results", *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert "Error executing job" not in err


def test_message_names_all_invalid_fields(run):
    _, _, err = run("out=results", "steps=0", "order=random", "teacher.words=few")
    assert err.startswith("error: the config is not valid:\n  ")
    assert all(f"\n  {field}: " in err for field in ("steps", "order", "teacher.words"))


def test_field_without_a_value_is_an_error(run):
    status, _, err = run(main=lambda config: pytest.fail("the stage ran without an output folder"))
    assert (status, err) == (2, "error: no value for out; add out=…\n")


def test_input_error_of_a_stage_is_printed_without_traceback(run):
    def main(config):
        raise InputError("tasks.jsonl, line 3: not valid JSON")

    assert run("out=results", main=main) == (2, "", "error: tasks.jsonl, line 3: not valid JSON\n")


def test_other_exceptions_of_a_stage_are_not_caught(run):
    def main(config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run("out=results", main=main)


def test_compose_stage_gives_the_config_and_the_messages_of_the_command_line(run):
    config = compose_stage(Stage, "stage", ["out=results", "teacher=server", "teacher.url=http://x"])
    assert config.teacher == Teacher(kind="server", url="http://x")
    for overrides, message in [
        ([], "no value for out"),
        (["out=x", "steps=0"], "steps: Input should be greater"),
        (["out=x", "teacher=server", "teacher.urll=x"], r"choices: kind, url\)"),
        (["out=x", "teacher=gpt"], "teacher=gpt: no such option"),
    ]:
        with pytest.raises(InputError, match=message):
            compose_stage(Stage, "stage", overrides)


def test_stage_can_compose_the_config_of_another(run):
    composed = []
    status, _, err = run("out=a", main=lambda _: composed.append(compose_stage(Stage, "stage", ["out=b"])))
    assert (status, err) == (0, "")
    assert composed[0].out == Path("b")


def test_validate_suggests_fields_of_nested_optional_models():
    class Outer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        teacher: Teacher | None = None

    with pytest.raises(InputError, match=r"teacher\.word: no such field; did you mean words\?"):
        validate(Outer, {"teacher": {"kind": "a", "word": 1}})
    with pytest.raises(InputError, match=r"zzz: no such field \(choices: teacher\)"):
        validate(Outer, {"zzz": 1})


@pytest.fixture
def user_configs(tmp_path):
    """A user's config folder with one teacher."""
    folder = tmp_path / "user configs"
    (folder / "teacher").mkdir(parents=True)
    (folder / "teacher" / "mine.yaml").write_text("kind: mine\nwords: 7\n")
    return folder


@pytest.mark.parametrize("method", ["flag", "flag with =", "variable"])
def test_user_options_are_found_and_listed(run, user_configs, monkeypatch, method):
    flags = {"flag": ["--config-dir", str(user_configs)], "flag with =": [f"--config-dir={user_configs}"]}.get(
        method, []
    )
    if method == "variable":
        monkeypatch.setenv(USER_CONFIGS, str(user_configs))
    configs = []
    assert run(*flags, "out=results", "teacher=mine", main=configs.append)[0] == 0
    assert configs[0].teacher == Teacher(kind="mine", words=7)
    assert "teacher: mine, offline, server" in run(*flags, "--help")[1]
    assert "(choices: mine, offline, server)" in run(*flags, "out=results", "teacher=gpt")[2]
    assert "(choices: mine, offline, server)" in run(*flags, "out=results", "teacher=null")[2]
    assert "teacher.wrds: no such field; did you mean words?" in run(*flags, "teacher=mine", "teacher.wrds=1")[2]


def test_stages_started_by_a_stage_find_user_options(run, user_configs):
    composed = []

    def main(config):
        composed.append(compose_stage(Stage, "stage", ["out=b", "teacher=mine"]))

    assert run("--config-dir", "user configs", "out=a", main=main)[0] == 0
    composed.append(
        compose_stage(Stage, "stage", ["out=b", "teacher=mine"])
    )  # another process, through the variable
    assert [config.teacher.words for config in composed] == [7, 7]


def test_unusable_user_folder_is_an_error(run, user_configs):
    status, _, err = run("--config-dir", "nowhere", "out=a")
    assert status == 2
    assert err.endswith("nowhere: no such folder; give --config-dir or MMR5_CONFIGS a folder of configs\n")
    (user_configs / "teacher" / "server.yaml").write_text("kind: mine\n")
    status, _, err = run("--config-dir", str(user_configs), "out=a")
    assert status == 2
    assert err.endswith("server.yaml: the project also has an option teacher/server; rename this file\n")


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_config_composes_and_writes_no_hydra_files(entry):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose(entry, return_hydra_config=True)
    assert config.hydra.output_subdir is None
    assert config.hydra.job.chdir is False
    if entry not in ("download", "mcp", "publish", "serve"):  # these add to a folder, or write none
        assert {"out", "overwrite", "seed"} <= set(config)


def run_synthetic(*arguments):
    command = [sys.executable, "-m", "data_construction.synthetic", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_real_stage_prints_its_help_and_errors(tmp_path):
    help_run = run_synthetic("--help")
    assert help_run.returncode == 0
    assert "seed: " in help_run.stdout
    invalid_run = run_synthetic(f"out={tmp_path / 'results'}", "sed=3")
    assert invalid_run.returncode == 2
    assert invalid_run.stderr.startswith("error: sed: no such field; did you mean seed? (choices: ")
    assert not (tmp_path / "results").exists()
