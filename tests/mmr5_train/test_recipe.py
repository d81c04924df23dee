"""Recipes: composing the stages, reporting departures from the paper, skipping stages that are up to date."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from trl import GRPOConfig

from mmr5_train import distill, evaluate, plan, recipe, sft
from mmr5_train.common.config import CONFIGS, USER_CONFIGS, compose_stage
from mmr5_train.common.files import InputError, write_json, write_records
from mmr5_train.evaluation.published_settings import FACTS, VLM_R1
from mmr5_train.ranking.prompt import read_prompt
from mmr5_train.recipe import (
    STAGES,
    RecipeStage,
    check_verdicts,
    compose_stages,
    departures,
    is_launched,
    launch_file,
    main,
    run_one_stage,
    stage_overrides,
    stage_settings,
    to_override,
)
from mmr5_train.recipes.departures import departures as find_departures
from mmr5_train.recipes.departures import resolved_settings, trainer_defaults
from mmr5_train.recipes.inherited import inherit_settings

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


@pytest.mark.parametrize("size", ["full", pytest.param("tiny", marks=pytest.mark.long)])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment, size):
    config = compose(f"experiment={experiment}", *(["size=tiny"] if size == "tiny" else []))
    assert config.name == experiment
    settings = stage_settings(config)
    assert list(settings) == ["launch", *(name for name in STAGES if name in settings)]
    trained = {f"{settings[stage]['out']}/model" for stage in ("sft", "grpo") if stage in settings}
    expected = trained or {"tiny" if size == "tiny" else "Qwen/Qwen2.5-VL-7B-Instruct"}  # base_only trains nothing
    assert {value for key, value in settings["evaluate"].items() if key.startswith("systems.")} == expected


@pytest.fixture(scope="module")
def mm_r5():
    """All settings of the recipe `mm_r5`."""
    return stage_settings(compose("experiment=mm_r5"))


def test_every_ablation_changes_a_setting_also_at_the_small_size():
    """A recipe whose settings `size=tiny` replaces again would repeat another row of the table."""
    script = (Path(__file__).parents[2] / "scripts/ablations.sh").read_text(encoding="utf-8")
    names = re.search(r'ALL="([^"]+)"', script)[1].replace("\\\n", " ").split()
    assert len(names) > 10
    seen = {}
    for name in ["", *names, "sft_users"]:
        experiment = f"experiment=[recommended{name and ','}{name}]"
        overrides = stage_overrides(compose(experiment, "size=tiny", "out=OUT", "shared=SHARED"))
        if name == "sft_continued":  # scripts/ablations.sh sets its number of steps
            overrides["sft"].append("more steps")
        settings = {
            stage: tuple(value for value in values if "OUT" not in value and "SHARED" not in value)
            for stage, values in overrides.items()
            if stage != "report"
        }
        same = [other for other, known in seen.items() if known == settings]
        assert not same, f"{name} is the same as {same[0] or 'recommended'}"
        seen[name] = settings


def test_departures_of_mm_r5_are_listed_with_their_reasons(mm_r5):
    """`experiment=mm_r5` is not the paper to the letter. Each difference has a reason."""
    lines = list(find_departures(mm_r5, mm_r5))
    assert [line.partition(":")[0] for line in lines] == [
        "launch.processes",
        "launch.zero_stage",
        "heldout.n_heldout",
        "candidates.retriever.model",
        "candidates.split.train",
        "sft.model.attention",
        "sft.prompt.name",
        "grpo.model.attention",
        "grpo.model.lora.dropout",
        "grpo.model.lora.target_modules",
        "grpo.prompt.images_first",
        "grpo.prompt.name",
        "grpo.trainer.top_k",
        "evaluate.decoding",
        "evaluate.max_new_tokens",
    ]
    assert all(re.search(r"\(MM-R5: .+\): \w.+", line) for line in lines)
    assert any(line.startswith("evaluate.decoding: greedy (MM-R5: temperature 0.3, paper): ") for line in lines)


def test_mm_r5_resolves_to_every_published_setting(mm_r5):
    """Section "Implementation details" of MM-R5 (arXiv 2506.12364v2), and its frameworks' defaults."""
    for fact in FACTS:
        if not fact.reason:
            value = mm_r5[fact.stage][fact.field]
            assert (len(value) if isinstance(value, list) else value) == fact.value, fact
    values = {(fact.stage, fact.field): fact.value for fact in FACTS}
    assert values["sft", "trainer.adam_beta2"] == 0.95
    assert values["sft", "trainer.weight_decay"] == 0.1
    assert values["grpo", "trainer.adam_beta2"] == 0.999
    assert values["select", "balanced.count"] == 3000


def test_departures_see_defaults_of_stages_and_of_trl():
    """Fields that neither configs/recipe.yaml nor the stage's config lists; TRL has them. Seeds do not count."""
    overrides = (
        "launch=zero2",
        "+stages.grpo.trainer.weight_decay=0.2",
        "+stages.grpo.trainer.disable_dropout=true",
        "+stages.traces.order=score",
        "+stages.evaluate.samples=4",
        "stages.candidates.train_per_domain=50",
        "stages.grpo.seed=3",
    )
    lines = list(departures(compose("experiment=mm_r5", *overrides)))
    assert not [line for line in lines if line.startswith("launch")]
    own = {
        "candidates.train_per_domain: 50 (MM-R5: 1200, released code)",
        "traces.order: score (MM-R5: shuffled, released code)",
        "grpo.trainer.disable_dropout: True (recipe mm_r5: False)",
        f"grpo.trainer.weight_decay: 0.2 (MM-R5: 0.0, {VLM_R1})",
        "evaluate.samples: 4 (recipe mm_r5: 0)",
    }
    assert {line for line in lines if "): " not in line} == own


def test_another_default_of_trl_is_a_departure(mm_r5, monkeypatch):
    defaults = trainer_defaults(GRPOConfig)
    assert defaults["lr_scheduler_type"] == "linear"
    monkeypatch.setattr(
        "mmr5_train.recipes.departures.trainer_defaults", lambda _: defaults | {"max_grad_norm": 0.2}
    )
    grpo_stage = compose_stages({"grpo": stage_overrides(compose("experiment=mm_r5"))["grpo"]})["grpo"]
    changed = mm_r5 | {"grpo": resolved_settings("grpo", grpo_stage)}
    assert f"grpo.trainer.max_grad_norm: 0.2 (MM-R5: 1.0, {VLM_R1})" in list(find_departures(changed, mm_r5))


@pytest.mark.parametrize("size", [[], ["size=tiny"]])
@pytest.mark.parametrize("experiment", ["no_think", "rl_only", "tokens_512", "distilled"])
def test_stages_inherit_the_settings_of_their_checkpoints(experiment, size):
    stages = inherit_settings(compose_stages(stage_overrides(compose(f"experiment={experiment}", *size))))
    max_pixels = {"no_think": 12_845_056, "rl_only": 12_845_056, "tokens_512": 401_408, "distilled": 12_845_056}
    for name in {"sft", "grpo", "teach", "distill", "modes", "evaluate"} & stages.keys():
        assert stages[name].model.max_pixels == (
            9500 if size and experiment != "tokens_512" else max_pixels[experiment]
        )
        assert stages[name].think == (experiment != "no_think")
        assert stages[name].prompt == read_prompt("default")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+stages.grpo.model.max_pixels=5000",
            r"stages.grpo.model.max_pixels: found 5000, but .*sft/model is .* 9500",
        ),
        (
            "+stages.evaluate.think=false",
            r"stages.evaluate.think: found false, but .*sft/model is trained with true",
        ),
        ("stages.sft.think=false", r"stages.sft.think: found false, but tiny is trained with true"),
    ],
)
def test_a_setting_that_contradicts_a_later_checkpoint_is_refused_at_the_start(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        main(compose("size=tiny", f"out={tmp_path / 'out'}", override))
    assert not (tmp_path / "out").exists()


def test_departures_list_changed_settings_and_stages():
    lines = list(departures(compose("experiment=[recommended,no_think]")))
    assert "sft.think: False (MM-R5: True, paper)" in lines
    assert "grpo.reward.name: gated (recipe mm_r5: mm_r5)" in lines
    assert "grpo.trainer.num_generations: 8 (MM-R5: 4, paper)" in lines
    assert "grpo: left out" in list(departures(compose("experiment=sft_only")))


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (["experiment=mm_r5", "stages.grpo.reward=true_reasoning"], "stages.traces.refine=true"),
        (["experiment=[no_think,reward_true_reasoning]"], "stages.sft.think=false"),
        (["experiment=[reward_true_reasoning,rl_only]", "+stages.grpo.think=false"], "stages.grpo.think=false"),
    ],
)
def test_reward_for_verdicts_is_refused_before_the_traces_are_paid_for(overrides, cause, tmp_path):
    out = tmp_path / "out"
    for command in (main, plan.plan):
        config = compose_stage(plan.PlanStage, "plan", [*overrides, f"out={out}"])
        with pytest.raises(InputError, match=rf"true_reasoning .*the model of this recipe \({cause}\)"):
            command(config)
    assert not out.exists()


@pytest.mark.parametrize("experiment", ["recommended", "reward_true_reasoning", "[recommended,rl_only]"])
def test_reward_for_verdicts_goes_with_the_notes_of_the_teacher(experiment):
    stages = compose_stages(stage_overrides(compose(f"experiment={experiment}")))
    check_verdicts(inherit_settings(stages))


def test_experiments_and_overrides_combine():
    config = compose("experiment=[recommended,rl_only]", "size=tiny", "stages.grpo.trainer.beta=0.1")
    settings = stage_settings(config)
    assert "sft" not in settings
    assert settings["grpo"]["reward.name"] == "true_reasoning"
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


@pytest.mark.long
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


def test_distillation_of_more_pages_than_the_tokenizer_scores_is_refused_before_anything_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(recipe, "run_one_stage", lambda *_: pytest.fail("a stage ran"))
    distilled = ["experiment=[recommended,distilled]", "size=tiny", f"out={tmp_path}/out"]
    with pytest.raises(
        InputError, match=r"stages\.candidates\.candidates=120: prompts have up to 120 pages, .* at most 100"
    ):
        recipe.main(compose(*distilled, "stages.candidates.candidates=120"))


def test_distillation_is_checked_again_with_the_questions_that_teach_ranks(tmp_path, tasks, capsys):
    (tmp_path / "out/data").mkdir(parents=True)
    many = [tasks[0].candidates[0].model_copy(update={"page": i}) for i in range(101)]
    write_records(tmp_path / "out/data/select.jsonl", [tasks[0].model_copy(update={"candidates": tuple(many)})])
    overrides = stage_overrides(compose("experiment=distilled", "size=tiny", f"out={tmp_path}/out"))
    stages = recipe.compose_stages(overrides)
    with pytest.raises(InputError, match=r"select\.jsonl: prompts have up to 101 pages"):
        distill.check_recipe(stages)
    assert not capsys.readouterr().out
    stages["traces"] = stages["traces"].model_copy(update={"refine": True})
    with pytest.raises(InputError):
        distill.check_recipe(stages)
    assert "distill: the reasoning states no verdict on any page" in capsys.readouterr().out


def launched_stages(*overrides):
    """The stages that run under a launcher."""
    stages = stage_overrides(compose("experiment=[recommended,distilled]", *overrides))
    configs = {n: compose_stage(STAGES[n].model, STAGES[n].entry, values) for n, values in stages.items()}
    return {name for name, config in configs.items() if is_launched(name, config)}


def test_all_stages_with_a_model_are_launched():
    launched = launched_stages()
    assert launched == {"sft", "grpo", "evaluate", "teach", "modes"}
    difficulty = "+stages.select.difficulty={checkpoint:outputs/sft/model}"
    assert launched_stages(difficulty) == launched | {"select"}
    assert launched_stages("+stages.select.difficulty={rollouts:outputs/rollouts.jsonl}") == launched
    assert launched_stages("+stages.evaluate={model.device_map:auto}") == launched - {"evaluate"}


def test_a_launched_stage_runs_in_the_processes_of_the_launch_file(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=0)
    )
    overrides = [f"data={tmp_path}/heldout.jsonl", f"out={tmp_path}/out", "systems={a:tiny}"]
    stage = compose_stage(evaluate.EvaluateStage, "evaluate", overrides)
    run_one_stage("evaluate", stage, overrides, launch_file("zero3"))
    [command] = commands
    assert command[1:8] == [
        "-m", "accelerate.commands.launch", "--config_file", str(launch_file("zero3")), "--multi_gpu",
        "-m", "mmr5_train.evaluate",
    ]  # fmt: skip
