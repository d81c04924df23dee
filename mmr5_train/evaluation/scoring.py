"""From rankings to results: every system's figures, their intervals, and the paired differences.

A pure function of ranking records, whatever wrote them. The layout of what `score_rankings` returns (and
results.json holds) is described there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.answer_classes import class_counts
from mmr5_train.evaluation.metrics import (
    QuestionTable,
    Values,
    bootstrap_mean,
    defect_counts,
    is_complete,
    paired_bootstrap,
    question_metrics,
    question_table,
)
from mmr5_train.evaluation.significance import holm, randomization_tests
from mmr5_train.ranking.answer import Defect, parse_answer
from mmr5_train.ranking.notes import split_notes, states_description
from mmr5_train.ranking.records import Page, PageId, Ranking

Rankings = Mapping[str, Sequence[Ranking]]


def score_rankings(
    rankings: Rankings, pages: Iterable[Page], *, seed: int = 0, draws: int = 10_000
) -> dict[str, Any]:
    """All results of some systems on the same questions; the first system is the baseline (the first stage).

    Rankings hold the candidates only, nothing follows them: with n candidates recall@k is the same for every
    k ≥ n and every order, and pages the first stage missed are lost to it.

    Returns (every mean over questions unless it says macro; `intervals` are 95 % bootstrap intervals):
        questions, samples, candidates: how many questions; sampled answers and (on average) candidates each.
        metrics: the names recall@k, ndcg@k, mrr.
        ceiling: each metric for a perfect order of the first system's candidates.
        rows: one a system, with `system`, `questions`, each metric of the greedy answer, each
            `<metric>_sampled` (mean over the samples of a question; a system that writes no completions has
            one answer, which counts for both), `complete_permutations` (share of greedy answers that are one
            as written), `without_defect` (share with no defect at all), `true_descriptions` (share of a
            question's pages about which the reasoning states the true description, over questions with
            described pages), `tokens` (mean length of a greedy completion), `defects` and `defects_sampled`
            (answers with each), `classes` and `classes_sampled` (answers of each class, zeros included: see
            `answer_classes`), `ceiling` (each metric for a perfect order of this system's own candidates),
            `intervals`, `macro` (over domains), `by_domain`, `by_question_type`. None where a value is not
            defined.
        differences: `system`, `baseline`, and for each figure that both have {mean, low, high, p, p_holm}: the
            paired difference with its interval, the p-value of a two-sided paired randomization test with as
            many draws, and that value corrected after Holm over the comparisons of the same figure here. Each
            system against the one before it, and against the first.

    Raises `InputError` where systems did not rank the same questions.
    """
    systems = aligned(rankings)
    descriptions = {page.id: page.description for page in pages if page.description}
    sampled = max(len(ranking.samples) for ranked in systems.values() for ranking in ranked)
    first = next(iter(systems.values()))
    tables = {system: question_table(ranked) for system, ranked in systems.items()}
    ceilings = {system: _ceiling(ranked) for system, ranked in systems.items()}
    ceiling = next(iter(ceilings.values()))
    metrics = list(ceiling)
    values = {system: question_values(ranked, tables[system], descriptions) for system, ranked in systems.items()}
    if sampled:  # a system that writes no completions has one answer, which counts as its samples too
        for system, ranked in systems.items():
            if not writes(ranked):
                values[system] |= {f"{name}_sampled": values[system][name] for name in metrics}
    return {
        "questions": len(first),
        "samples": sampled,
        "candidates": float(np.mean([len(ranking.shown) for ranking in first])),
        "metrics": metrics,
        "bootstrap": {"draws": draws, "seed": seed},
        "ceiling": ceiling,
        "rows": [
            {
                "system": system,
                **_row(ranked, values[system], metrics, seed, draws),
                "ceiling": ceilings[system],
                **_breakdowns(tables[system], metrics, seed, draws),
            }
            for system, ranked in systems.items()
        ],
        "differences": _differences(values, seed, draws),
    }


def aligned(rankings: Rankings) -> dict[str, list[Ranking]]:
    """Every system's rankings in the order of the first system's questions.

    Raises `InputError` where systems did not rank the same questions, or have other relevant pages for one.
    """
    if not rankings or not all(rankings.values()):
        raise InputError("no rankings to score; give each system at least one")
    baseline, first = next(iter(rankings.items()))
    positives = {ranking.query_id: set(ranking.positives) for ranking in first}
    aligned = {}
    for system, ranked in rankings.items():
        by_id = {ranking.query_id: ranking for ranking in ranked}
        odd = by_id.keys() ^ positives.keys()
        if odd or len(by_id) != len(ranked):
            what = f"only one of them ranked {min(odd)}" if odd else f"{system} ranked a question twice"
            raise InputError(
                f"rankings of {system} and {baseline} are not of the same questions: {what}; "
                "rank the same file with both"
            )
        for query_id, ranking in by_id.items():
            if set(ranking.positives) != positives[query_id]:
                raise InputError(
                    f"question {query_id} has other relevant pages in the rankings of {system} than in those "
                    f"of {baseline}; rank the same file with both"
                )
        aligned[system] = [by_id[query_id] for query_id in positives]
    return aligned


def question_values(
    ranked: Sequence[Ranking], table: QuestionTable, descriptions: Mapping[PageId, str]
) -> dict[str, Values]:
    """Each figure's values over questions, shape (Q,); NaN where a question has none. Undefined ones left out."""
    values = dict(table.metrics)
    wrote = writes(ranked)
    if all(ranking.samples for ranking in ranked):
        drawn = question_table(ranked, sampled=True)
        values |= {f"{name}_sampled": scores for name, scores in drawn.metrics.items()}
    if wrote:
        values["complete_permutations"] = np.array([float(is_complete(r.greedy)) for r in ranked])
        values["without_defect"] = np.array([float(not r.greedy.defects) for r in ranked])
        true = np.array([true_share(ranking, descriptions) for ranking in ranked])
        if not np.isnan(true).all():
            values["true_descriptions"] = true
    return values


def writes(ranked: Iterable[Ranking]) -> bool:
    """Whether a system writes completions; a first stage does not."""
    return any(ranking.greedy.completion or ranking.greedy.defects for ranking in ranked)


def true_share(ranking: Ranking, descriptions: Mapping[PageId, str]) -> float:
    """Share of the described pages of a prompt whose line in the greedy think block states the description.

    A missing line counts as false. NaN where no page of the prompt has a description.
    """
    think = parse_answer(ranking.greedy.completion, len(ranking.shown)).think or ""
    notes = split_notes(think)
    known = [(i, descriptions[page.id]) for i, page in enumerate(ranking.shown, 1) if page.id in descriptions]
    true = [states_description(notes.get(i, ""), description) for i, description in known]
    return sum(true) / len(true) if true else float("nan")


def _ceiling(ranked: Iterable[Ranking]) -> dict[str, float]:
    """Each metric for a perfect order of the same candidates, mean over questions."""
    scores = [question_metrics(_perfect(ranking), ranking.positives) for ranking in ranked]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _perfect(ranking: Ranking) -> list[PageId]:
    relevant = set(ranking.positives)
    return sorted((page.id for page in ranking.shown), key=lambda page: page not in relevant)


def distinct_ceilings(results: Mapping[str, Any]) -> list[tuple[list[str], dict[str, float]]]:
    """The ceilings there are, each with the systems whose candidates have it, in the order of the rows."""
    found: list[tuple[list[str], dict[str, float]]] = []
    for row in results["rows"]:
        same = next((systems for systems, ceiling in found if ceiling == row["ceiling"]), None)
        if same is None:
            found.append(([row["system"]], row["ceiling"]))
        else:
            same.append(row["system"])
    return found


def reached(row: Mapping[str, Any], metric: str) -> float | None:
    """What share of its own ceiling a system reaches, 0..1; None where no candidate is relevant."""
    ceiling = row["ceiling"][metric]
    return row[metric] / ceiling if ceiling else None


def _row(
    ranked: Sequence[Ranking], values: Mapping[str, Values], metrics: Sequence[str], seed: int, draws: int
) -> dict[str, Any]:
    names = [*metrics, *(f"{name}_sampled" for name in metrics)]
    names += ["complete_permutations", "without_defect", "true_descriptions"]
    row: dict[str, Any] = {"questions": len(ranked)}
    row |= {name: float(np.nanmean(values[name])) if name in values else None for name in names}
    row["tokens"] = float(np.mean([r.greedy.tokens for r in ranked])) if writes(ranked) else None
    wrote = ranked if writes(ranked) else []
    for ending, sampled in (("", False), ("_sampled", True)):
        counts = defect_counts(wrote, sampled=sampled)
        row[f"defects{ending}"] = {defect.value: counts[defect] for defect in Defect if counts[defect]}
        row[f"classes{ending}"] = class_counts(wrote, sampled=sampled)
    row["intervals"] = {name: _interval(values[name], seed, draws) for name in names if name in values}
    return row


def _interval(values: Values, seed: int, draws: int, groups: Sequence[str] | None = None) -> dict[str, float]:
    known = values[~np.isnan(values)]
    return bootstrap_mean(known, samples=draws, seed=seed, groups=groups).model_dump(include={"low", "high"})


def _breakdowns(table: QuestionTable, metrics: Sequence[str], seed: int, draws: int) -> dict[str, Any]:
    macro = {
        name: bootstrap_mean(table.metrics[name], samples=draws, seed=seed, groups=table.domains)
        for name in metrics
    }
    domains = [(domain,) for domain in table.domains]
    return {
        "macro": {name: interval.mean for name, interval in macro.items()}
        | {"intervals": {n: i.model_dump(include={"low", "high"}) for n, i in macro.items()}},
        "by_domain": _groups(table, domains, metrics, seed, draws),
        "by_question_type": _groups(table, table.question_types, metrics, seed, draws),
    }


def _groups(
    table: QuestionTable, labels: Sequence[Sequence[str]], metrics: Sequence[str], seed: int, draws: int
) -> dict[str, Any]:
    groups = {}
    for label in sorted({name for names in labels for name in names}):
        member = np.array([label in names for names in labels])
        scores = {name: table.metrics[name][member] for name in metrics}
        groups[label] = (
            {"questions": int(member.sum())}
            | {name: float(np.mean(scores[name])) for name in metrics}
            | {"intervals": {name: _interval(scores[name], seed, draws) for name in metrics}}
        )
    return groups


def _pairs(systems: Sequence[str]) -> list[tuple[str, str]]:
    """(system, baseline): each against the one before it, then against the first."""
    pairs = []
    for i, system in enumerate(systems[1:], 1):
        pairs += [(system, baseline) for baseline in dict.fromkeys((systems[i - 1], systems[0]))]
    return pairs


def _differences(values: Mapping[str, Mapping[str, Values]], seed: int, draws: int) -> list[dict[str, Any]]:
    """Every comparison; p-values are corrected over those of the same figure."""
    differences = []
    tested: dict[str, list[dict[str, float]]] = {}
    for system, baseline in _pairs(list(values)):
        figures = _compared(values[system], values[baseline], seed, draws)
        differences.append({"system": system, "baseline": baseline, **figures})
        for name, figure in figures.items():
            tested.setdefault(name, []).append(figure)
    for alike in tested.values():
        for figure, corrected in zip(alike, holm([figure["p"] for figure in alike]), strict=True):
            figure["p_holm"] = corrected
    return differences


def _compared(
    a: Mapping[str, Values], b: Mapping[str, Values], seed: int, draws: int
) -> dict[str, dict[str, float]]:
    """The paired difference in each figure that both have, with its interval and p-value."""
    known = {name: ~np.isnan(a[name]) & ~np.isnan(b[name]) for name in a if name in b}
    names = [name for name in known if known[name].any()]
    gaps_QF = np.column_stack([np.where(known[name], a[name] - b[name], 0.0) for name in names])
    p_values = randomization_tests(gaps_QF, samples=draws, seed=seed)
    compared = {}
    for name, p in zip(names, p_values, strict=True):
        both = known[name]
        interval = paired_bootstrap(a[name][both], b[name][both], samples=draws, seed=seed)
        compared[name] = interval.model_dump() | {"p": float(p)}
    return compared


def find_difference(results: Mapping[str, Any], system: str, baseline: str) -> dict[str, Any]:
    """The paired differences of two systems. Raises KeyError where the results hold none."""
    for difference in results["differences"]:
        if (difference["system"], difference["baseline"]) == (system, baseline):
            return dict(difference)
    raise KeyError(f"no difference of {system} and {baseline}")


# name of the figure, heading, how it is printed
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("recall@1", "recall\n@1", "{:.3f}".format),
    ("of_ceiling", "of its\nceiling", "{:.1%}".format),
    ("recall@3", "recall\n@3", "{:.3f}".format),
    ("recall@5", "recall\n@5", "{:.3f}".format),
    ("mrr", "MRR", "{:.3f}".format),
    ("recall@1_sampled", "sampled\nrecall@1", "{:.3f}".format),
    ("complete_permutations", "complete\norders", "{:.1%}".format),
    ("true_descriptions", "true\ndescr.", "{:.1%}".format),
)


def results_table(results: Mapping[str, Any], width: int = 100) -> str:
    """The results as text: a row a system, the ceilings, then each difference in recall@1.

    A difference has its 95 % interval, and its p-value as corrected over the comparisons of that figure.
    """
    rows = [{**row, "of_ceiling": reached(row, "recall@1")} for row in results["rows"]]
    columns = [column for column in _COLUMNS if any(row[column[0]] is not None for row in rows)]
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("system")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = ["–" if row[name] is None else form(row[name]) for name, _, form in columns]
        table.add_row(escape(row["system"]), *cells)
    for systems, ceiling in distinct_ceilings(results):
        name = f"ceiling of {', '.join(systems)}" if len(systems) < len(rows) else "ceiling"
        table.add_row(escape(name), *(form(ceiling[n]) if n in ceiling else "" for n, _, form in columns))
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
    lines.append("")
    for difference in results["differences"]:
        pair = f"{difference['system']} − {difference['baseline']}"
        for name in ("recall@1", "recall@1_sampled"):
            if name in difference:
                lines.append(f" {pair:<24} {name:<17} {_signed(difference[name])}")
    return "\n".join(lines)


def _signed(gap: Mapping[str, float]) -> str:
    return f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}] p {p_text(gap['p_holm'])}"


def p_text(p: float) -> str:
    """A p-value to three decimals, never as 0."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"
