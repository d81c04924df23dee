"""Compares recipes over several seeds, with differences from a baseline.

    python -m mmr5_train.compare folder=outputs/ablations baseline=recommended

Reads every recipe.json under the folder, and the rankings of the last system that each recipe evaluated. Writes
compare.json, table.md and compare.html. They hold for each recipe the mean and standard deviation over seeds, the
paired difference from the baseline, and the training time. A pair is the same question under the same seed, and
the bootstrap resamples questions within a seed. `question_types` adds a table of the questions of each type. If a
recipe reproduces a published row, the output also holds the published tables with that recipe's figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import (
    RECIPE,
    InputError,
    atomic_write,
    open_output,
    read_manifest,
    read_records,
    write_json,
    write_manifest,
)
from mmr5_train.evaluation import paper_table, published
from mmr5_train.evaluation.metrics import Interval, Values, bootstrap_mean, paired_bootstrap, question_table
from mmr5_train.evaluation.scoring import question_values
from mmr5_train.ranking.records import Page, Ranking
from mmr5_train.reporting.comparison import comparison_page

# figure → its heading in the table
FIGURES = {
    "recall@1": "recall@1",
    "recall@3": "recall@3",
    "recall@1_sampled": "sampled recall@1",
    "complete_permutations": "complete orders",
    "true_descriptions": "true descriptions",
}


class CompareStage(StageConfig):
    """Config of `python -m mmr5_train.compare` (configs/compare.yaml)."""

    folder: Path = Field(description="folder with recipe folders at any depth")
    baseline: str = Field(description="recipe that the others are compared with")
    question_types: list[str] = Field(
        default=[], description="question types that also get a table of their own, e.g. [catalogue,users]"
    )


@dataclass(frozen=True)
class Run:
    """One recipe under one seed."""

    name: str
    seed: int
    query_ids: list[str]
    domains: list[str]  # one per question
    types: list[tuple[str, ...]]  # the question types of each question
    values: Mapping[str, Values]  # figure → one value per question
    data: str  # file of the evaluated questions
    seconds: float  # of SFT and GRPO, even if another recipe ran them

    def of_type(self, name: str) -> Run:
        """The run on the questions of one type."""
        chosen = [i for i, types in enumerate(self.types) if name in types]
        return replace(
            self,
            query_ids=[self.query_ids[i] for i in chosen],
            domains=[self.domains[i] for i in chosen],
            types=[self.types[i] for i in chosen],
            values={figure: values[chosen] for figure, values in self.values.items()},
        )


def main(config: CompareStage) -> None:
    runs = read_runs(config.folder)
    if config.baseline not in {run.name for run in runs}:
        names = ", ".join(sorted({run.name for run in runs}))
        raise InputError(f"baseline: no recipe under {config.folder} is called {config.baseline} (found: {names})")
    selected = {name: runs_of_type(runs, name) for name in config.question_types}
    out = open_output(config.out, config.overwrite)
    rows = compare(runs, config.baseline, config.seed)
    rows_by_type = {name: compare(group, config.baseline, config.seed) for name, group in selected.items()}
    write_json(out / "compare.json", {"baseline": config.baseline, "rows": rows, "by_question_type": rows_by_type})
    published_blocks = published_tables(rows)
    tables = [markdown(rows), *(f"{name} questions:\n\n{markdown(r)}" for name, r in rows_by_type.items())]
    table = "\n".join([*tables, *([paper_table.markdown(published_blocks)] if published_blocks else [])])
    with atomic_write(out / "table.md", "w") as stream:
        stream.write(table)
    with atomic_write(out / "compare.html") as stream:
        stream.write(comparison_page(rows, rows_by_type, FIGURES, runs[0].data, published_blocks))
    write_manifest(out, stage="compare", config=config.model_dump(mode="json"), counts={"runs": len(runs)})
    print(table)
    print(f"compare: {len(rows)} recipes, {len(runs)} runs in {out / 'compare.html'}")


def read_runs(folder: Path) -> list[Run]:
    """All finished recipes under a folder that include an evaluation. Raises `InputError` if there are none."""
    recipes = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob(RECIPE))}
    # The duration of a shared stage is in the recipe.json of the recipe that ran it.
    seconds = {
        stage["out"]: stage["seconds"]
        for recipe in recipes.values()
        for stage in recipe["stages"].values()
        if stage["seconds"]
    }
    runs = [read_run(recipe, seconds) for recipe in recipes.values() if "evaluate" in recipe["stages"]]
    if not runs:
        raise InputError(f"{folder}: no recipe.json of a recipe with an evaluation; run mmr5_train.recipe first")
    return runs


def runs_of_type(runs: Sequence[Run], name: str) -> list[Run]:
    """The runs on the questions of one type. Raises `InputError` if a run has none."""
    selected = [run.of_type(name) for run in runs]
    for run, all_questions in zip(selected, runs, strict=True):
        if not run.query_ids:
            found = sorted({t for types in all_questions.types for t in types})
            raise InputError(
                f"question_types: {run.name}, seed {run.seed}, evaluated no question of the type {name!r} "
                f"(types found: {', '.join(found)})"
            )
    return selected


def read_run(recipe: Mapping[str, Any], seconds: Mapping[str, float]) -> Run:
    """The run that a recipe.json describes. `seconds` maps a stage's output folder to its duration."""
    stages = recipe["stages"]
    folder = Path(stages["evaluate"]["out"])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    system = results["rows"][-1]["system"]
    rankings = read_records(folder / "rankings" / f"{system}.jsonl", Ranking)
    pages = read_records(folder / "pages.jsonl", Page, unique="id")
    descriptions = {page.id: page.description for page in pages if page.description}
    return Run(
        name=recipe["name"],
        seed=recipe["seed"],
        query_ids=[ranking.query_id for ranking in rankings],
        domains=[ranking.domain for ranking in rankings],
        types=[ranking.question_types for ranking in rankings],
        values=question_values(rankings, question_table(rankings), descriptions),
        data=read_manifest(folder)["config"]["data"],
        seconds=sum(seconds.get(stages[name]["out"], 0.0) for name in ("sft", "grpo") if name in stages),
    )


def compare(runs: Sequence[Run], baseline: str, seed: int) -> list[dict[str, Any]]:
    """One row per recipe, the baseline first."""
    baseline_runs = {run.seed: run for run in runs if run.name == baseline}
    names = [baseline, *(name for name in dict.fromkeys(run.name for run in runs) if name != baseline)]
    rows = []
    for name in names:
        recipe_runs = [run for run in runs if run.name == name]
        row: dict[str, Any] = {"recipe": name, "seeds": [run.seed for run in recipe_runs]}
        for figure in FIGURES:
            means = [float(np.nanmean(run.values[figure])) for run in recipe_runs if figure in run.values]
            if means:
                deviation = float(np.std(means, ddof=1)) if len(means) > 1 else None
                row[figure] = {"mean": float(np.mean(means)), "deviation": deviation}
                if name != baseline:
                    row[figure]["difference"] = difference(recipe_runs, baseline_runs, figure, seed)
        row["questions"] = len(recipe_runs[0].query_ids)
        row["paper_figures"] = {f: over_seeds(recipe_runs, f, seed).model_dump() for f in published.FIGURES}
        row["seconds"] = float(np.mean([run.seconds for run in recipe_runs]))
        rows.append(row)
    return rows


def over_seeds(runs: Sequence[Run], figure: str, seed: int) -> Interval:
    """A figure of the published tables, mean over seeds. Resamples questions within their seed (and domain)."""
    kind, _, metric = figure.partition(" ")
    groups = [f"{run.seed}/{domain if kind == 'macro' else ''}" for run in runs for domain in run.domains]
    return bootstrap_mean(np.concatenate([run.values[metric] for run in runs]), seed=seed, groups=groups)


def difference(
    runs: Sequence[Run], baseline_runs: Mapping[int, Run], figure: str, seed: int
) -> dict[str, float] | None:
    """Paired difference of a recipe from the baseline over their common seeds; None if they have none."""
    a, b, groups = [], [], []
    for run in runs:
        baseline = baseline_runs.get(run.seed)
        if baseline is None or figure not in baseline.values:
            continue
        if run.query_ids != baseline.query_ids:
            raise InputError(f"{run.name} and {baseline.name}, seed {run.seed}: evaluated on different questions")
        defined = ~np.isnan(run.values[figure]) & ~np.isnan(baseline.values[figure])
        a.append(run.values[figure][defined])
        b.append(baseline.values[figure][defined])
        groups += [str(run.seed)] * int(defined.sum())
    if not groups:
        return None
    return paired_bootstrap(np.concatenate(a), np.concatenate(b), seed=seed, groups=groups).model_dump()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown: mean ± deviation over seeds, and difference from the first row with its interval."""
    figures = [figure for figure in FIGURES if any(figure in row for row in rows)]
    head = ["recipe", "seeds", *(part for f in figures for part in (FIGURES[f], "difference")), "training, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["recipe"], str(len(row["seeds"]))]
        for figure in figures:
            value = row.get(figure)
            cells.append("–" if value is None else spread(value))
            cells.append(signed(value["difference"]) if value and value.get("difference") else "–")
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def published_tables(rows: Sequence[Mapping[str, Any]]) -> list[list[paper_table.Row]]:
    """The published tables with the recipes that reproduce a published row; empty if no recipe does."""
    measured = [
        paper_table.Measured(
            name=row["recipe"],
            first_stage=published.RECIPES[row["recipe"]].partition(" + ")[0],
            published=published.RECIPES[row["recipe"]],
            questions=row["questions"],
            figures={figure: Interval(**value) for figure, value in row["paper_figures"].items()},
        )
        for row in rows
        if row["recipe"] in published.RECIPES
    ]
    return paper_table.paper_table(measured) if measured else []


def spread(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.3f}")


def signed(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


if __name__ == "__main__":
    run_stage(main, CompareStage, "compare")
