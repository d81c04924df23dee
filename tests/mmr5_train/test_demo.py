"""The demo at a very small size: every stage reads the output of the previous one."""

import json

import pytest

from mmr5_train import demo
from mmr5_train.common.config import compose_stage
from mmr5_train.recipe import RecipeStage

SMALL = [
    "stages.corpus.documents=10",
    "+stages.corpus.workers=1",
    "stages.sft.trainer={max_steps:2,per_device_train_batch_size:2,warmup_steps:0}",
    "stages.grpo.trainer={max_steps:1,per_device_train_batch_size:4,num_generations:2,max_completion_length:16}",
    "stages.teach.skip=4",
    "+stages.teach.limit=4",
    "stages.calibrate={limit:4,max_new_tokens:32}",
    "+stages.teach.constrain=true",
    "+stages.distill.trainer.max_steps=1",
    "stages.distill.trainer.per_device_train_batch_size=2",
    "stages.modes={limit:6,max_new_tokens:32}",
    "stages.evaluate={limit:6,max_new_tokens:16,samples:2}",
    "+stages.report.questions=3",
]


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    demo.main(compose_stage(RecipeStage, "demo", [f"out={out}", "seed=5", *SMALL]))
    return out


def add_modes(out):
    demo.main(
        compose_stage(RecipeStage, "demo", [f"out={out}", "seed=5", *SMALL, "overwrite=false", "leave_out=[]"])
    )


def test_results_have_every_figure(demo_folder):
    results = json.loads((demo_folder / "results.json").read_text())
    assert results["seed"] == 5
    assert results["seconds"] > 0
    systems = ["first_stage", "base", "sft", "sft+grpo"]
    assert [(row["population"], row["system"]) for row in results["rows"]] == [
        (population, system) for population in demo.POPULATIONS for system in systems
    ]
    for row in results["rows"]:
        assert row["questions"] == 2
        assert 0 <= row["recall@1"] <= row["recall@3"] <= row["recall@5"] <= 1
        assert 0 <= row["recall@1_sampled"] <= 1
        if row["system"] != "first_stage":
            assert 0 <= row["complete_permutations"] <= 1
            assert 0 <= row["true_descriptions"] <= 1
    rows = {(row["population"], row["system"]): row for row in results["rows"]}
    for population, figures in results["grpo_minus_sft"].items():
        for name in ("recall@1", "recall@1_sampled"):
            difference = figures[name]
            assert difference["low"] <= difference["mean"] <= difference["high"]
            after, before = rows[population, "sft+grpo"], rows[population, "sft"]
            assert difference["mean"] == pytest.approx(after[name] - before[name])


def test_report_is_self_contained(demo_folder):
    html = (demo_folder / "report.html").read_text()
    assert "<html" in html
    assert "sft+grpo" in html
    assert 'src="http' not in html
    assert html.count("data:image/jpeg;base64") >= 3


def test_training_data_excludes_held_out_documents(demo_folder):
    def documents(path):
        return {
            page["doc_name"]
            for line in path.read_text().splitlines()
            for page in (json.loads(line).get("candidates") or json.loads(line)["shown"])
        }

    heldout = documents(demo_folder / "data/heldout.jsonl")
    assert heldout
    assert not heldout & documents(demo_folder / "traces/traces.jsonl")
    assert not heldout & documents(demo_folder / "select/questions.jsonl")


def test_second_run_adds_modes_and_keeps_earlier_stages(demo_folder):
    stages = ("traces", "sft", "grpo", "evaluation")
    before = json.loads((demo_folder / "results.json").read_text())
    times = [(demo_folder / stage / "manifest.json").stat().st_mtime_ns for stage in stages]
    assert "modes" not in before
    add_modes(demo_folder)
    assert times == [(demo_folder / stage / "manifest.json").stat().st_mtime_ns for stage in stages]
    results = json.loads((demo_folder / "results.json").read_text())
    assert {name: results[name] for name in ("seed", "rows", "grpo_minus_sft")} == {
        name: before[name] for name in ("seed", "rows", "grpo_minus_sft")
    }
    assert results["seconds"] > before["seconds"]
    assert [row["system"] for row in results["modes"]] == ["direct", "adaptive", "reason", "logits"]
    for row in results["modes"]:
        assert row["questions"] == 6
        assert row["seconds_per_question"] > 0
    _, adaptive, reason, logits = (row["recall@1"] for row in results["modes"])
    assert results["logits_minus_reason"]["recall@1"]["mean"] == pytest.approx(logits - reason)
    assert results["adaptive_minus_reason"]["recall@1"]["mean"] == pytest.approx(adaptive - reason)
    assert "milliseconds per question" in (demo_folder / "report.html").read_text()


def test_seconds_are_null_if_those_of_a_stage_are_unknown(demo_folder):
    recipe = json.loads((demo_folder / "recipe.json").read_text())
    recipe["stages"]["sft"]["seconds"] = None
    (demo_folder / "recipe.json").write_text(json.dumps(recipe))
    config = compose_stage(RecipeStage, "demo", [f"out={demo_folder}", "seed=5", *SMALL, "overwrite=false"])
    demo.main(config)
    assert json.loads((demo_folder / "results.json").read_text())["seconds"] is None
