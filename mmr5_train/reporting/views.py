"""Data for the report's template: dicts from results, manifests and logs, and the filters that format them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mmr5_train.common.files import InputError, read_manifest
from mmr5_train.evaluation.alarms import read_alarms
from mmr5_train.evaluation.scoring import distinct_ceilings, find_difference, p_text, share_of_ceiling
from mmr5_train.ranking.records import PageId
from mmr5_train.reporting.curves import is_smoothed, read_history, show, training_charts

Results = Mapping[str, Any]

LABELS = {
    "first_stage": "First stage",
    "base": "Base model",
    "sft": "SFT",
    "grpo": "GRPO",
    "sft+grpo": "SFT + GRPO",
}
NAMES = {
    "recall@1_sampled": "Recall@1, sampled",
    "complete_permutations": "Complete orders",
    "true_descriptions": "True descriptions",
    "of_ceiling": "Share of ceiling",
    "mrr": "MRR",
}
SHARES = ("of_ceiling", "complete_permutations", "without_defect", "true_descriptions")
EXTRAS = ("of_ceiling", "recall@1_sampled", "complete_permutations", "true_descriptions")
COMPARED = (
    "recall@1",
    "recall@1_sampled",
    "recall@3",
    "ndcg@5",
    "mrr",
    "complete_permutations",
    "true_descriptions",
)
TABLE = ("recall@1", "recall@3", "recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")
TRAINED_ON = (("traces", "reasoning traces"), ("tasks", "questions"))
STAGES = {
    "synthetic": "Corpus",
    "candidates": "Candidates",
    "traces": "Reasoning traces",
    "select": "Selected questions",
    "sft": "SFT",
    "grpo": "GRPO",
    "evaluate": "Evaluation",
}


def label(system: str) -> str:
    return LABELS.get(system, system)


def metric_name(metric: str) -> str:
    return NAMES.get(
        metric, metric.replace("recall", "Recall").replace("ndcg", "nDCG").replace("_sampled", ", sampled")
    )


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def value_text(value: float | None, metric: str) -> str:
    """A value formatted by metric: shares in percent, others with three decimals."""
    if value is not None and metric in SHARES:
        return f"{100 * value:.1f} %"
    return figure(value)


def signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def page_name(page: PageId) -> str:
    """Document and page number, counted from 1."""
    return f"{page.doc_name}, page {page.page + 1}"


def movement(moved: int) -> str:
    if not moved:
        return "did not move"
    return f"{'up' if moved > 0 else 'down'} {abs(moved)} {'position' if abs(moved) == 1 else 'positions'}"


def words(name: str) -> str:
    return name.replace("_", " ")


FILTERS = {
    "label": label,
    "metric": metric_name,
    "figure": figure,
    "value": value_text,
    "signed": signed,
    "p_value": p_text,
    "ordinal": ordinal,
    "pagename": page_name,
    "movement": movement,
    "words": words,
}


def headline(results: Results) -> dict[str, str]:
    """Title, headline and lede. The headline claims a difference only if it is significant (`is_significant`)."""
    first, last = results["rows"][0], results["rows"][-1]
    questions = f"{results['questions']:,} held-out questions"
    before, after = figure(first["recall@1"]), figure(last["recall@1"])
    if first is last:
        text, rest = f"{label(first['system'])}: recall@1 {before} on {questions}", ""
    else:
        gain = find_difference(results, last["system"], first["system"])["recall@1"]
        name, base = label(last["system"]), label(first["system"]).lower()
        if not is_significant(gain):
            text = (
                f"{name} and the {base} don’t differ significantly on {questions}: recall@1 {after} and {before}"
            )
        else:
            verb = "raises" if gain["mean"] > 0 else "lowers"
            text = f"{name} {verb} recall@1 from {before} to {after} on {questions}"
        interval = f"95 % interval {signed(gain['low'])} to {signed(gain['high'])}"
        rest = f"Paired difference from the {base} {signed(gain['mean'])}, {interval}. "
    ceiling = f"A perfect order of the same candidates would reach {figure(results['ceiling']['recall@1'])}."
    return {"title": text, "headline": text, "lede": rest + ceiling}


def trained_text(sft: Path | None, grpo: Path | None) -> str:
    """A sentence on the training stages and the size of their data; empty if neither stage has a folder."""
    manifests = [(stage, read_manifest(folder)) for stage, folder in (("SFT", sft), ("GRPO", grpo)) if folder]
    if not manifests:
        return ""
    stages = []
    for stage, manifest in manifests:
        counts = manifest.get("counts") or {}
        used = [f"{counts[key]:,} {name}" for key, name in TRAINED_ON if key in counts]
        stages.append(f"{stage} on {used[0]}" if used else stage)
    start = (manifests[0][1].get("config") or {}).get("model", {}).get("path")
    start = "the shipped tiny model" if start == "tiny" else start
    return f"Trained{f' from {start}' if start else ''} by {' and '.join(stages)}. "


def overview(results: Results) -> dict[str, Any]:
    """Data of the results table, the score cards and the forest plot of differences."""
    rows = [{**row, "of_ceiling": share_of_ceiling(row, "recall@1")} for row in results["rows"]]
    metrics = table_metrics(results)
    return {
        "rows": rows,
        "metrics": metrics,
        "extras": [key for key in EXTRAS if any(row[key] is not None for row in rows)],
        "colors": {row["system"]: i % 6 + 1 for i, row in enumerate(rows)},
        "best": {m: _best([row[m] for row in rows]) for m in metrics},
        "ceilings": distinct_ceilings(results),
        "questions": results["questions"],
        "sampled": results["samples"],
        "candidates": f"{results['candidates']:.3g}",
        "steps": {row["system"]: _step(results, i) for i, row in enumerate(rows)},
        **forest(results),
    }


def _best(values: list[float]) -> float | None:
    """The largest value, which the table highlights; None if all are equal."""
    return max(values) if len(set(values)) > 1 else None


def table_metrics(results: Results) -> list[str]:
    """The metrics in the results table. Cutoffs beyond the number of candidates would repeat the same values."""
    metrics = []
    for metric in (m for m in TABLE if m in results["metrics"]):
        cutoff = int(metric.partition("@")[2] or 1)
        if cutoff <= max(5, math.ceil(results["candidates"])):
            metrics.append(metric)
    return metrics


def _step(results: Results, index: int) -> dict[str, Any] | None:
    """Difference in recall@1 of a system from the previous one."""
    if index == 0:
        return None
    system, baseline = (results["rows"][i]["system"] for i in (index, index - 1))
    difference = find_difference(results, system, baseline)["recall@1"]
    return {"baseline": baseline, **difference, "significant": is_significant(difference)}


def is_significant(difference: Mapping[str, Any]) -> bool:
    """Whether the interval excludes zero, and the corrected p-value, if there is one, is below 0.05."""
    return not difference["low"] <= 0 <= difference["high"] and difference.get("p_holm", 0.0) < 0.05


def forest(results: Results) -> dict[str, Any]:
    """All differences with their intervals, and their positions, 0 to 1, on a common axis that includes zero."""
    groups = []
    for difference in results["differences"]:
        items = [
            {"metric": m, **difference[m], "significant": is_significant(difference[m])}
            for m in COMPARED
            if m in difference
        ]
        groups.append({"system": difference["system"], "baseline": difference["baseline"], "items": items})
    all_items = [item for group in groups for item in group["items"]]
    left = min(-0.05, *(math.floor(item["low"] * 20) / 20 for item in all_items), 0)
    right = max(0.05, *(math.ceil(item["high"] * 20) / 20 for item in all_items), 0)
    for item in all_items:
        for value, position in (("low", "left"), ("high", "right"), ("mean", "at")):
            item[position] = round((item[value] - left) / (right - left), 4)
    return {
        "differences": groups,
        "axis": {"left": left, "right": right, "zero": round(-left / (right - left), 4)},
    }


def breakdowns(results: Results) -> list[dict[str, Any]]:
    """Metrics by domain and by question type. Omits a breakdown with only one group."""
    kinds = (
        ("by_domain", "domains", "By domain", "Domain", True),
        ("by_question_type", "types", "By question type", "Question type", False),
    )
    groups = []
    for key, anchor, title, column, macro in kinds:
        entries = [
            {
                "name": name,
                "questions": first["questions"],
                "values": [_group_value(row, key, name) for row in results["rows"]],
            }
            for name, first in results["rows"][0][key].items()
        ]
        if len(entries) > 1:
            groups.append(
                {"anchor": anchor, "title": title, "column": column, "macro": macro, "entries": entries}
                | {"intro": "Recall@1 with its 95 % interval." + _macro_text(results, macro)}
            )
    return groups


def _group_value(row: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    scores = row[key][name]
    interval = scores["intervals"]["recall@1"]
    return {"system": row["system"], "mean": scores["recall@1"], "interval": interval, "scores": scores}


def _macro_text(results: Results, macro: bool) -> str:
    if not macro:
        return " A question with several types counts in each of them."
    means = ", ".join(f"{label(row['system'])} {figure(row['macro']['recall@1'])}" for row in results["rows"])
    return f" Mean over domains (macro): {means}."


def training_view(folder: Path | None, stage: str) -> dict[str, Any] | None:
    """The charts of a training stage, or a message that says which log is missing."""
    if folder is None:
        return None
    title = {"sft": "Supervised fine-tuning", "grpo": "Reinforcement learning (GRPO)"}[stage]
    path = folder / "log_history.json"
    if not path.is_file():
        return {"title": title, "charts": [], "message": f"No curves: {path} is missing."}
    history = read_history(path)
    charts = training_charts(history, stage)
    if not charts:
        return {"title": title, "charts": [], "message": f"No curves: {path} has no logged step."}
    lines = [line for chart in charts for line in chart.lines]
    steps = max(step for line in lines for step, _ in line.points)
    intro = f"{steps:,.0f} step{'s' * (steps != 1)}."
    if any(map(is_smoothed, lines)):
        intro += " A bold line over a thin one is the running mean of the logged values."
    return {"title": title, "charts": charts, "intro": intro, "alarms": read_alarms(folder)}


def stage_view(folder: Path) -> dict[str, Any]:
    """Name, counts, seed and configuration of a stage, from its manifest."""
    manifest = read_manifest(folder)
    config = manifest.get("config") or {}
    counts = flat_counts(manifest.get("counts") or {})
    name = str(manifest.get("stage", folder.name))
    facts = [(key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in counts]
    if "seed" in config:
        facts.append(("seed", str(config["seed"])))
    return {"name": STAGES.get(name, name), "facts": facts, "config": OmegaConf.to_yaml(OmegaConf.create(config))}


def flat_counts(counts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested counts as (name, value) pairs with shortened floats. Omits lists, which are histograms."""
    facts: list[tuple[str, Any]] = []
    for key, value in counts.items():
        name = words(f"{prefix}{key}")
        if isinstance(value, Mapping):
            facts += flat_counts(value, f"{name}: ")
        elif not isinstance(value, list):
            facts.append((name, show(value) if isinstance(value, float) else value))
    return facts


def provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Code and package versions of the evaluation."""
    packages = manifest.get("packages") or {}
    versions = ", ".join([f"Python {manifest.get('python', '?')}", *(f"{k} {v}" for k, v in packages.items())])
    return {"versions": versions + ".", "code": str(manifest.get("code", ""))}


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a finished evaluation. Raises `InputError` if it is unreadable or lacks a field."""
    read_manifest(folder)
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); run the evaluate stage again") from None
    check_results(results, path)
    for row in results["rows"]:  # older files lack the field: their systems had the same candidates
        row.setdefault("ceiling", results["ceiling"])
    return dict(results)


def check_results(results: Any, path: Path) -> None:
    """Raises `InputError` if a field of results.json is missing."""
    required = ("questions", "samples", "candidates", "metrics", "ceiling", "rows", "differences")
    missing = [key for key in required if not isinstance(results, dict) or key not in results]
    if missing:
        raise InputError(f"{path}: field {missing[0]} is missing; run the evaluate stage again")
