"""The targets of the demo's benchmark, from a results.json of the demo."""

import bench_demo

FIGURES = {"recall@1": 0.6, "recall@3": 0.8, "recall@1_sampled": 0.5}


def result(gain, seconds):
    rows = [
        {
            "population": population,
            "system": system,
            **FIGURES,
            "complete_permutations": 0.99,
            "true_descriptions": 0.97,
        }
        for population in ("catalogue", "users")
        for system in ("sft", "sft+grpo")
    ]
    difference = {"mean": gain, "low": gain - 0.1, "high": gain + 0.1}
    differences = {"users": {"recall@1": difference}, "catalogue": {"recall@1": {"mean": -0.005}}}
    return {"seed": 10, "seconds": seconds, "rows": rows, "grpo_minus_sft": differences}


def unmet(results):
    return [target["name"] for target in bench_demo.targets(results) if not target["met"]]


def test_a_target_for_each_figure_of_a_seed():
    assert unmet([result(0.2, 500)]) == []
    assert unmet([result(0.05, 700)]) == [
        "users' questions, GRPO − SFT, seed 10",
        "lower end of its interval, seed 10",
        "seconds, seed 10",
    ]


def test_the_time_of_a_demo_that_was_stopped_is_unknown_and_does_not_meet_its_target():
    assert unmet([result(0.2, None)]) == ["seconds, seed 10"]


def test_the_table_has_a_line_for_each_system_and_population():
    assert bench_demo.table([result(0.2, 500)]).count("\n| 10 |") == 4
