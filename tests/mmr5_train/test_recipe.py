"""Recipes: composing the stages, reporting departures from the paper, skipping stages that are up to date."""

from pathlib import Path

import pytest

from mmr5_train import sft
from mmr5_train.common.config import CONFIGS, USER_CONFIGS, compose_stage
from mmr5_train.common.files import InputError, write_json
from mmr5_train.ranking.prompt import read_prompt
from mmr5_train.recipe import (
    STAGES,
    RecipeStage,
    departures,
    launch_file,
    main,
    stage_overrides,
    stage_settings,
    to_override,
)

EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("experiment/*.yaml"))
SMALL = [
    "size=tiny",
    "stages.corpus.documents=10",
    "+stages.corpus.workers=1",
    "stages.sft.trainer={max_steps:2,per_device_train_batch_size:2,warmup_steps:0}",
    "stages.grpo.trainer={max_steps:1,per_device_train_batch_size:4,num_generations:2,max_completion_length:16}",
    "stages.evaluate={limit:6,max_new_tokens:16,samples:0}",
    "+stages.report.questions=3",
]


def compose(*overrides):
    return compose_stage(RecipeStage, "recipe", overrides)


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment, size):
    config = compose(f"experiment={experiment}", *(["size=tiny"] if size == "tiny" else []))
    assert config.name == experiment
    settings = stage_settings(config)
    assert list(settings) == [name for name in STAGES if name in settings]
    trained = {f"{settings[stage]['out']}/model" for stage in ("sft", "grpo") if stage in settings}
    assert {value for key, value in settings["evaluate"].items() if key.startswith("systems.")} == trained


def test_mm_r5_has_no_departures():
    assert list(departures(compose("experiment=mm_r5", "out=elsewhere", "seed=7"))) == []


def test_mm_r5_has_the_settings_of_the_paper():
    """Section "Implementation details" of MM-R5 (arXiv 2506.12364v2)."""
    settings = stage_settings(compose("experiment=mm_r5"))
    sft, grpo = settings["sft"], settings["grpo"]
    assert (sft["model.lora.r"], sft["model.lora.alpha"], sft["model.lora.plus_ratio"]) == (8, 32, 16)
    assert (grpo["model.lora.r"], grpo["model.lora.alpha"]) == (64, 128)
    assert (sft["trainer.learning_rate"], sft["trainer.warmup_steps"]) == (1e-4, 0.05)
    assert (grpo["trainer.learning_rate"], grpo["trainer.beta"], grpo["trainer.epsilon"]) == (1e-5, 0.04, 0.2)
    assert (grpo["trainer.num_generations"], grpo["trainer.num_iterations"]) == (4, 2)
    assert (settings["select"]["balanced.count"], settings["select"]["balanced.groups"]) == (3000, 10)
    assert grpo["reward.weights.reranking"] == grpo["reward.weights.template"] == 1
    assert (sft["limit"], sft["model.freeze_vision"], grpo["model.freeze_vision"]) == (7200, True, True)


def test_departures_list_changed_settings_and_stages():
    lines = list(departures(compose("experiment=[recommended,no_think]")))
    assert "sft.think: False (MM-R5: True)" in lines
    assert "grpo.reward.name: gated (MM-R5: mm_r5)" in lines
    assert "grpo: left out" in list(departures(compose("experiment=sft_only")))


def test_experiments_and_overrides_combine():
    config = compose("experiment=[recommended,rl_only]", "size=tiny", "stages.grpo.trainer.beta=0.1")
    settings = stage_settings(config)
    assert "sft" not in settings
    assert settings["grpo"]["reward.name"] == "gated"
    assert settings["grpo"]["trainer.beta"] == 0.1
    assert settings["grpo"]["model.path"] == "tiny"


VALUES = [True, 3, 1e-4, "a", "a/b c.jsonl", "it's", "x,y={}", [1, "b c"], {"a": [2], "b+c": "d"}]


@pytest.mark.parametrize("value", VALUES)
def test_to_override_is_parsed_back_by_hydra(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [override] = OverridesParser.create().parse_overrides([to_override("key", value)])
    assert override.value() == value


def test_unknown_stage_is_an_error():
    with pytest.raises(InputError, match="stages: no stage is called sftt"):
        stage_overrides(compose("+stages.sftt={think:true}"))
    with pytest.raises(InputError, match="leave_out: no stage is called reprot"):
        stage_overrides(compose("leave_out=[reprot]"))


def test_stages_that_are_up_to_date_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shared = [f"out={tmp_path}/a", f"shared={tmp_path}/shared", "seed=5", *SMALL]
    main(compose("experiment=[recommended,sft_only]", *shared))
    output = capsys.readouterr().out
    assert "already" not in output
    assert (tmp_path / "a/report/report.html").is_file()
    weights = tmp_path / "shared/sft/model/model.safetensors"
    first = weights.stat().st_mtime_ns

    main(compose("experiment=recommended", *shared, f"out={tmp_path}/b"))
    output = capsys.readouterr().out
    for stage in ("corpus", "candidates", "traces", "sft"):
        assert f"{stage}: already in {tmp_path}/shared" in output
    assert weights.stat().st_mtime_ns == first
    assert (tmp_path / "b/grpo/model/model.safetensors").is_file()

    # A changed setting or input file makes the stage and all later ones run again.
    main(compose("experiment=recommended", *shared, f"out={tmp_path}/b", "stages.grpo.trainer.beta=0.1"))
    output = capsys.readouterr().out
    assert "select: already" in output
    assert "grpo: already" not in output
    assert "report: already" not in output
    write_json(tmp_path / "b/grpo/manifest.json", {"finished": False})
    main(compose("experiment=recommended", *shared, f"out={tmp_path}/b", "stages.grpo.trainer.beta=0.1"))
    assert "evaluate: already" not in capsys.readouterr().out


def test_recipe_can_use_user_options(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nstages:\n  sft: {prompt: mine}\n", encoding="utf-8"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [tiny, _self_]\nmax_pixels: 8000\n", encoding="utf-8")
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "mine.yaml").write_text(
        "name: mine\nsystem: Rank.\nquestion: '{query}'\nimage_label: ''\n", encoding="utf-8"
    )
    monkeypatch.setenv(USER_CONFIGS, str(tmp_path))
    config = compose_stage(RecipeStage, "recipe", ["experiment=mine", "size=tiny", "stages.sft.model=mine"])
    stage = compose_stage(sft.SftStage, "sft", stage_overrides(config)["sft"])
    assert (stage.model.path, stage.model.max_pixels, stage.prompt.name) == ("tiny", 8000, "mine")
    assert read_prompt("mine").system == "Rank."


def test_launch_accepts_an_option_or_a_file(tmp_path):
    assert launch_file("zero2") == CONFIGS / "accelerate" / "zero2.yaml"
    file = tmp_path / "four.yaml"
    file.touch()
    assert launch_file(str(file)) == file
    with pytest.raises(InputError, match=r"launch: no such file as zero9 \(choices: cpu, ddp, "):
        launch_file("zero9")
