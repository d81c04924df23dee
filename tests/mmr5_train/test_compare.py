"""The compare command: one table over recipes and seeds."""

import json
import shutil

import pytest
from html_reader import Reader
from sample_runs import make_evaluation

from mmr5_train import compare
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import RECIPE, InputError, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recipes with two seeds each. The last system of the second recipe is the weaker one."""
    root = tmp_path_factory.mktemp("ablations")
    for seed in (0, 1):
        make_evaluation(root / str(seed) / "recommended/evaluation", questions=24, seed=seed)
        shutil.copytree(root / str(seed) / "recommended", root / str(seed) / "weaker")
        for name in ("recommended", "weaker"):
            out = root / str(seed) / name
            results = json.loads((out / "evaluation/results.json").read_text())
            if name == "weaker":
                results["rows"] = results["rows"][:-1]
                write_json(out / "evaluation/results.json", results)
            stages = {
                "sft": {"out": f"shared-{seed}/sft", "seconds": 60.0 if name == "recommended" else None},
                "grpo": {"out": str(out / "grpo"), "seconds": 100.0 + seed},
                "evaluate": {"out": str(out / "evaluation"), "seconds": 9.0},
            }
            write_json(out / RECIPE, {"name": name, "seed": seed, "stages": stages})
    return root


def run(folder, out, *overrides):
    compare.main(compose_stage(compare.CompareStage, "compare", [f"folder={folder}", f"out={out}", *overrides]))
    return json.loads((out / "compare.json").read_text())["rows"]


def test_table_has_figures_differences_and_training_seconds(folder, tmp_path, capsys):
    rows = run(folder, tmp_path / "out")
    assert [(row["recipe"], row["seeds"]) for row in rows] == [("recommended", [0, 1]), ("weaker", [0, 1])]
    assert [row["seconds"] for row in rows] == [160.5, 160.5]  # the shared SFT counts for both recipes
    baseline, other = rows
    for figure in compare.FIGURES:
        assert 0 <= other[figure]["mean"] <= 1
        assert other[figure]["deviation"] >= 0
        gap = other[figure]["difference"]
        assert gap["mean"] == pytest.approx(other[figure]["mean"] - baseline[figure]["mean"], abs=1e-6)
        assert gap["low"] <= gap["mean"] <= gap["high"]
    assert baseline["recall@1"]["mean"] > other["recall@1"]["mean"]
    assert "difference" not in baseline["recall@1"]
    table = (tmp_path / "out/table.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| recommended | 2 | {baseline['recall@1']['mean']:.3f} ± " in table


def test_html_shows_each_recipe(folder, tmp_path):
    run(folder, tmp_path / "out")
    text = Reader((tmp_path / "out/compare.html").read_text()).text
    assert "Differences from recommended" in text
    assert text.count("weaker") > 1


def test_each_question_type_has_a_table_of_its_own(folder, tmp_path):
    run(folder, tmp_path / "out", "question_types=[Chart,Table]")
    comparison = json.loads((tmp_path / "out/compare.json").read_text())
    assert list(comparison["by_question_type"]) == ["Chart", "Table"]
    for name, rows in comparison["by_question_type"].items():
        for row in rows:
            means = []
            for seed in (0, 1):
                results = json.loads((folder / str(seed) / row["recipe"] / "evaluation/results.json").read_text())
                means.append(results["rows"][-1]["by_question_type"][name]["recall@1"])
            assert row["recall@1"]["mean"] == pytest.approx(sum(means) / 2)
    assert "Chart questions:" in (tmp_path / "out/table.md").read_text()
    page = Reader((tmp_path / "out/compare.html").read_text()).text
    assert "Questions of type Chart" in page
    with pytest.raises(InputError, match="evaluated no question of the type 'Charts'"):
        run(folder, tmp_path / "wrong", "question_types=[Charts]")


def test_recipes_that_reproduce_the_paper_appear_in_its_tables(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "runs")
    for path in (tmp_path / "runs").rglob(RECIPE):
        recipe = json.loads(path.read_text())
        recipe["name"] = {"recommended": "mm_r5", "weaker": "sft_only"}[recipe["name"]]
        recipe["stages"]["evaluate"]["out"] = str(path.parent / "evaluation")
        write_json(path, recipe)
    rows = run(tmp_path / "runs", tmp_path / "out", "baseline=mm_r5")
    output = capsys.readouterr().out
    page = Reader((tmp_path / "out/compare.html").read_text()).text
    for row, figure, published in ((rows[0], "macro recall@1", 0.6951), (rows[1], "micro recall@5", 0.8746)):
        ours = row["paper_figures"][figure]
        assert ours["low"] <= ours["mean"] <= ours["high"]
        assert f"| {published} |" in output
        assert f"{ours['mean'] - published:+.4f} [{ours['low'] - published:+.4f}, " in output
        assert f"{ours['mean']:.4f} {ours['low']:.4f} – {ours['high']:.4f}" in page
    assert "ColQwen + MM-R5 published" in page
    assert "arXiv 2506.12364v2" in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/table.md").read_text() in output


def test_paper_tables_are_omitted_without_a_matching_recipe(folder, tmp_path, capsys):
    run(folder, tmp_path / "out")
    assert "published" not in capsys.readouterr().out
    assert "published" not in Reader((tmp_path / "out/compare.html").read_text()).text


def test_means_equal_those_of_the_evaluations(folder, tmp_path):
    [ours, _] = run(folder, tmp_path / "out")
    results = [
        json.loads((folder / str(seed) / "recommended/evaluation/results.json").read_text()) for seed in (0, 1)
    ]
    for figure in compare.FIGURES:
        assert ours[figure]["mean"] == pytest.approx(sum(r["rows"][-1][figure] for r in results) / 2)
    for metric in ("recall@1", "recall@3", "recall@5"):
        micro, macro = (ours["paper_figures"][f"{kind} {metric}"]["mean"] for kind in ("micro", "macro"))
        assert micro == pytest.approx(sum(r["rows"][-1][metric] for r in results) / 2)
        domains = [scores[metric] for r in results for scores in r["rows"][-1]["by_domain"].values()]
        assert macro == pytest.approx(sum(domains) / len(domains))


def test_invalid_input_is_an_error(folder, tmp_path):
    with pytest.raises(InputError, match=r"no recipe under .* is called best \(found: recommended, weaker\)"):
        run(folder, tmp_path / "out", "baseline=best")
    with pytest.raises(InputError, match=r"no recipe\.json of a recipe with an evaluation"):
        run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
