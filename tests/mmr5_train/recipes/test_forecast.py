"""The number of examples that a recipe forecasts: from its rule, the annotations, and the data."""

from __future__ import annotations

import json

import pytest
from bench_amounts import MEASURED, count_examples, recipe_stages, targets
from mmdocir_standin import SUBSETS, write_standin

from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError
from mmr5_train.recipe import STAGES, RecipeStage, show_forecast
from mmr5_train.recipes.forecast import forecasts

SCALE = 0.01


def used(stages):
    return {name: forecast.used for name, forecast in forecasts(stages).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data stages of `mm_r5` on a hundredth of the published files, and what was forecast on the way."""
    folder = tmp_path_factory.mktemp("mmdocir")
    stages = recipe_stages(folder, SCALE)
    forecast = {"no files": used(stages)}
    files = write_standin(folder, SCALE)
    forecast["annotations"] = used(stages)
    for name in MEASURED:
        STAGES[name].module.main(stages[name])
        forecast[name] = used(stages)
    return {"scale": SCALE, "files": files, "stages": [], "forecast": forecast} | count_examples(stages), stages


def test_standin_has_the_published_numbers():
    assert sum(size.documents for size in SUBSETS.values()) == 6_878
    assert sum(size.questions for size in SUBSETS.values()) == 73_843
    mean = sum(size.documents * size.pages for size in SUBSETS.values()) / 6_878
    assert mean == pytest.approx(32.6, abs=0.3)


def test_the_recipe_yields_what_the_paper_used(data):
    """A hundredth of 7,200 traces and 3,000 questions, from files with a hundredth of the published questions."""
    results, _ = data
    assert results["forecast"]["no files"] == {"sft": 72, "grpo": 30}
    missed = [target for target in targets(results) if not target["met"]]
    assert not missed


def test_forecast_names_its_source(data):
    _, stages = data
    found = forecasts(stages)
    assert str(found["sft"]).startswith("72 of ")
    assert str(found["sft"]).endswith(f" traces ({stages['sft'].data})")
    without = recipe_stages(stages["candidates"].out / "nothing")
    assert str(forecasts(without)["sft"]).startswith(
        "7,200 of at most 8,400 traces (7 subsets × 1,200; no corpus yet;"
    )
    assert str(forecasts(without)["grpo"]) == "at most 3,000 questions (no corpus yet)"


def test_data_of_other_settings_do_not_count(data):
    _, stages = data
    candidates = stages["candidates"].model_copy(update={"train_per_domain": 5, "seed": 1})
    changed = {name: stage for name, stage in stages.items() if name != "traces"} | {"candidates": candidates}
    changed["sft"] = stages["sft"].model_copy(update={"data": candidates.out / "other/traces.jsonl"})
    forecast = forecasts(changed)["sft"]
    assert (forecast.available.number, forecast.available.exact) == (35, False)
    assert str(forecast).startswith(
        "at most 35 traces, fewer than stages.sft.limit=72 (annotated train questions in"
    )


def test_a_recipe_that_is_short_of_questions_stops_before_it_pays_a_teacher(data, capsys):
    _, stages = data
    paid = compose_stage(STAGES["traces"].model, "traces", ["teacher=gpt_4o", f"out={stages['sft'].out}/none"])
    short = stages | {"traces": paid, "sft": stages["sft"].model_copy(update={"limit": 500})}
    short["sft"] = short["sft"].model_copy(update={"data": paid.out / "traces.jsonl"})
    with pytest.raises(
        InputError, match=r"before the teacher is paid: at most \d+ traces, fewer than stages.sft.lim"
    ):
        show_forecast(short, paid=True)
    assert "grpo: 30 questions" in capsys.readouterr().out
    show_forecast(short, paid=False)
    show_forecast(stages, paid=True)


def test_the_released_recipe_wants_7200_traces_and_3000_questions():
    config = compose_stage(RecipeStage, "recipe", [])
    assert config.stages["candidates"]["train_per_domain"] == 1200
    assert json.dumps(config.stages["sft"]["limit"]) == "7200"
