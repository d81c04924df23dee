"""Targets and false alarms of the ablations, from the files that the recipes and `compare` write."""

import json

import bench_ablations
import pytest

SEEDS = [10, 11, 12]


def row(recipe, recall, complete=0.99, true=0.97, seeds=SEEDS):
    figures = {"recall@1": recall, "complete_permutations": complete, "true_descriptions": true}
    return {"recipe": recipe, "seeds": seeds, **{name: {"mean": value} for name, value in figures.items()}}


def compared(**recommended):
    rows = [row("recommended", 0.8, **recommended), row("reward_gated", 0.79)]
    return {"rows": rows, "by_question_type": {"catalogue": rows, "users": rows}}


def unmet(*args):
    return [target["name"] for target in bench_ablations.targets(*args) if not target["met"]]


def test_targets_of_a_good_and_of_a_bad_table():
    assert unmet(compared(), 80) == []
    assert unmet(compared(complete=0.97, true=0.94, seeds=[10]), 100) == [
        "minutes",
        "recipes with fewer than 3 seeds",
        "recommended, complete orders, catalogue",
        "recommended, true descriptions, catalogue",
        "recommended, complete orders, users",
        "recommended, true descriptions, users",
    ]
    worse = compared()
    worse["rows"][1]["recall@1"]["mean"] = 0.82
    assert unmet(worse, 80) == [
        f"recommended − better of gated and true_reasoning, recall@1, {name}" for name in ("catalogue", "users")
    ]


def test_an_unknown_time_does_not_meet_its_target():
    assert unmet(compared(), None) == ["minutes"]


def test_order_of_the_paper_holds_pair_by_pair():
    rows = [row("recommended", 0.8), row("sft_only", 0.6), row("rl_only", 0.7), row("base_only", 0.3)]
    assert bench_ablations.holds(rows) == {
        "base_only < rl_only": True, "rl_only < sft_only": False, "sft_only < recommended": True,
    }  # fmt: skip


@pytest.mark.parametrize(("complete", "false"), [(0.98, []), (0.99, ["10/recommended"])])
def test_an_alarm_is_false_if_the_run_ended_no_worse_than_it_started(tmp_path, complete, false):
    for recipe, figure in (("sft_only", 0.985), ("recommended", complete)):
        folder = tmp_path / "10" / recipe / "evaluation"
        folder.mkdir(parents=True)
        rows = [{"system": recipe, "recall@1_sampled": 0.7, "complete_permutations": figure}]
        (folder / "results.json").write_text(json.dumps({"rows": rows}))
    grpo = tmp_path / "10/recommended/grpo"
    grpo.mkdir()
    (grpo / "manifest.json").write_text("{}")
    assert bench_ablations.alarm_counts(tmp_path) == {"runs": 1, "with_alarm": {}, "false": []}
    (grpo / "alarms.json").write_text(json.dumps([{"name": "kl", "step": 40, "seen": "x", "knob": "y"}]))
    assert bench_ablations.alarm_counts(tmp_path) == {
        "runs": 1, "with_alarm": {"10/recommended": ["kl"]}, "false": false,
    }  # fmt: skip
