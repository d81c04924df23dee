"""Computes results from rankings: each system's figures with intervals, and the paired differences of systems.

`score_rankings` documents its return value, which is also the layout of results.json. It needs only ranking and
page records, which may come from elsewhere.
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
    """All results of several systems on the same questions; the first system is the baseline (the first stage).

    A ranking holds only the candidates. With n candidates recall@k is therefore the same for every k ≥ n and
    every order, and no reranker can recover pages that the first stage missed.

    Every mean is over questions unless it is called macro. `intervals` are 95 % bootstrap intervals. A figure that
    is undefined for a system is None. Returns:
        questions, samples, candidates: number of questions; sampled answers per question; candidates per
            question (mean).
        metrics: the names recall@k, ndcg@k, mrr.
        bootstrap: `draws` and `seed` of the intervals and tests.
        ceiling: each metric for a perfect order of the first system's candidates.
        rows: one per system:
            system, questions: its name and the number of questions.
            <metric>: of the greedy answer.
            <metric>_sampled: mean over a question's samples. A system that writes no completions has one answer,
                which counts as its sample.
            complete_permutations: share of greedy answers that are complete permutations as the model wrote them.
            without_defect: share of greedy answers without any defect.
            true_descriptions: share of a question's pages whose true description the reasoning states, over
                questions with described pages.
            tokens: mean length of a greedy completion.
            defects, defects_sampled: number of answers with each defect.
            classes, classes_sampled: number of answers in each class, zeros included (see `answer_classes`).
            ceiling: each metric for a perfect order of this system's own candidates.
            intervals: of the figures above.
            macro: means over domains, with their own `intervals`.
            by_domain, by_question_type: each metric of a subset of questions, with `questions` and `intervals`.
        differences: each system compared with the previous system and with the first: `system`, `baseline`,
            and for each figure that both have {mean, low, high, p, p_holm}. low and high are the interval of the
            paired difference. p is the p-value of a two-sided paired randomization test with `draws` draws. p_holm
            is p after Holm's correction over all pairs for the same figure.

    Raises `InputError` if the systems did not rank the same questions.
    """
    systems = align_rankings(rankings)
    descriptions = {page.id: page.description for page in pages if page.description}
    sampled = max(len(ranking.samples) for system_rankings in systems.values() for ranking in system_rankings)
    baseline_rankings = next(iter(systems.values()))
    tables = {system: question_table(system_rankings) for system, system_rankings in systems.items()}
    ceilings = {system: _ceiling(system_rankings) for system, system_rankings in systems.items()}
    ceiling = next(iter(ceilings.values()))
    metrics = list(ceiling)
    values = {
        system: question_values(system_rankings, tables[system], descriptions)
        for system, system_rankings in systems.items()
    }
    if sampled:
        for system, system_rankings in systems.items():
            if not writes_completions(system_rankings):  # its one answer counts as its sample
                values[system] |= {f"{name}_sampled": values[system][name] for name in metrics}
    return {
        "questions": len(baseline_rankings),
        "samples": sampled,
        "candidates": float(np.mean([len(ranking.shown) for ranking in baseline_rankings])),
        "metrics": metrics,
        "bootstrap": {"draws": draws, "seed": seed},
        "ceiling": ceiling,
        "rows": [
            {
                "system": system,
                **_row(system_rankings, values[system], metrics, seed, draws),
                "ceiling": ceilings[system],
                **_breakdowns(tables[system], metrics, seed, draws),
            }
            for system, system_rankings in systems.items()
        ],
        "differences": _differences(values, seed, draws),
    }


def align_rankings(rankings: Rankings) -> dict[str, list[Ranking]]:
    """Every system's rankings, in the order of the first system's questions.

    Raises `InputError` if the systems did not rank the same questions, or if a question's relevant pages differ.
    """
    if not rankings or not all(rankings.values()):
        raise InputError("no rankings to score; give each system at least one")
    baseline, baseline_rankings = next(iter(rankings.items()))
    positives = {ranking.query_id: set(ranking.positives) for ranking in baseline_rankings}
    aligned = {}
    for system, system_rankings in rankings.items():
        by_id = {ranking.query_id: ranking for ranking in system_rankings}
        unmatched_ids = by_id.keys() ^ positives.keys()
        if unmatched_ids or len(by_id) != len(system_rankings):
            problem = (
                f"only one of them ranked {min(unmatched_ids)}"
                if unmatched_ids
                else f"{system} ranked a question twice"
            )
            raise InputError(
                f"rankings of {system} and {baseline} are not of the same questions: {problem}; "
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
    rankings: Sequence[Ranking], table: QuestionTable, descriptions: Mapping[PageId, str]
) -> dict[str, Values]:
    """Figure → its values, one per question, (Q,), NaN where undefined. Omits figures that the system lacks."""
    values = dict(table.metrics)
    if all(ranking.samples for ranking in rankings):
        sampled = question_table(rankings, sampled=True)
        values |= {f"{name}_sampled": scores for name, scores in sampled.metrics.items()}
    if writes_completions(rankings):
        values["complete_permutations"] = np.array([float(is_complete(r.greedy)) for r in rankings])
        values["without_defect"] = np.array([float(not r.greedy.defects) for r in rankings])
        true_shares = np.array([true_description_share(ranking, descriptions) for ranking in rankings])
        if not np.isnan(true_shares).all():
            values["true_descriptions"] = true_shares
    return values


def known_mean(counts: Iterable[int | None]) -> float | None:
    """The mean of the token counts that are known. None if none is."""
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if known else None


def writes_completions(rankings: Iterable[Ranking]) -> bool:
    """Whether the system writes completions. A first stage and the mode `logits` do not."""
    return any(ranking.greedy.completion or ranking.greedy.defects for ranking in rankings)


def true_description_share(ranking: Ranking, descriptions: Mapping[PageId, str]) -> float:
    """Share of the prompt's described pages for which the greedy reasoning states the true description.

    A page without a line in the think block counts as false. NaN if no page of the prompt has a description.
    """
    think = parse_answer(ranking.greedy.completion, len(ranking.shown)).think or ""
    notes = split_notes(think)
    described = [(i, descriptions[page.id]) for i, page in enumerate(ranking.shown, 1) if page.id in descriptions]
    is_true = [states_description(notes.get(i, ""), description) for i, description in described]
    return sum(is_true) / len(is_true) if is_true else float("nan")


def _ceiling(rankings: Iterable[Ranking]) -> dict[str, float]:
    """Each metric for a perfect order of the candidates, mean over questions."""
    scores = [question_metrics(_perfect(ranking), ranking.positives) for ranking in rankings]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _perfect(ranking: Ranking) -> list[PageId]:
    relevant = set(ranking.positives)
    return sorted((page.id for page in ranking.shown), key=lambda page: page not in relevant)


def distinct_ceilings(results: Mapping[str, Any]) -> list[tuple[list[str], dict[str, float]]]:
    """The different ceilings, each with the systems that have it, in the order of the rows."""
    ceilings: list[tuple[list[str], dict[str, float]]] = []
    for row in results["rows"]:
        systems = next((systems for systems, ceiling in ceilings if ceiling == row["ceiling"]), None)
        if systems is None:
            ceilings.append(([row["system"]], row["ceiling"]))
        else:
            systems.append(row["system"])
    return ceilings


def share_of_ceiling(row: Mapping[str, Any], metric: str) -> float | None:
    """A system's metric ÷ its own ceiling, 0 to 1; None if no candidate is relevant."""
    ceiling = row["ceiling"][metric]
    return row[metric] / ceiling if ceiling else None


def _row(
    rankings: Sequence[Ranking], values: Mapping[str, Values], metrics: Sequence[str], seed: int, draws: int
) -> dict[str, Any]:
    names = [*metrics, *(f"{name}_sampled" for name in metrics)]
    names += ["complete_permutations", "without_defect", "true_descriptions"]
    row: dict[str, Any] = {"questions": len(rankings)}
    row |= {name: float(np.nanmean(values[name])) if name in values else None for name in names}
    row["tokens"] = known_mean(r.greedy.tokens for r in rankings) if writes_completions(rankings) else None
    with_completions = rankings if writes_completions(rankings) else []
    for suffix, sampled in (("", False), ("_sampled", True)):
        counts = defect_counts(with_completions, sampled=sampled)
        row[f"defects{suffix}"] = {defect.value: counts[defect] for defect in Defect if counts[defect]}
        row[f"classes{suffix}"] = class_counts(with_completions, sampled=sampled)
    row["intervals"] = {name: _interval(values[name], seed, draws) for name in names if name in values}
    return row


def _interval(values: Values, seed: int, draws: int, groups: Sequence[str] | None = None) -> dict[str, float]:
    defined = values[~np.isnan(values)]
    return bootstrap_mean(defined, samples=draws, seed=seed, groups=groups).model_dump(include={"low", "high"})


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
    """(system, baseline) pairs: each system with the previous system, then with the first."""
    pairs = []
    for i, system in enumerate(systems[1:], 1):
        pairs += [(system, baseline) for baseline in dict.fromkeys((systems[i - 1], systems[0]))]
    return pairs


def _differences(values: Mapping[str, Mapping[str, Values]], seed: int, draws: int) -> list[dict[str, Any]]:
    """All comparisons, with p-values corrected over all comparisons of the same figure."""
    differences = []
    by_figure: dict[str, list[dict[str, float]]] = {}
    for system, baseline in _pairs(list(values)):
        figures = _paired_differences(values[system], values[baseline], seed, draws)
        differences.append({"system": system, "baseline": baseline, **figures})
        for name, figure in figures.items():
            by_figure.setdefault(name, []).append(figure)
    for same_figure in by_figure.values():
        corrected = holm([figure["p"] for figure in same_figure])
        for figure, p_holm in zip(same_figure, corrected, strict=True):
            figure["p_holm"] = p_holm
    return differences


def _paired_differences(
    a: Mapping[str, Values], b: Mapping[str, Values], seed: int, draws: int
) -> dict[str, dict[str, float]]:
    """a − b in each figure that both have, with its interval and p-value."""
    defined = {name: ~np.isnan(a[name]) & ~np.isnan(b[name]) for name in a if name in b}
    names = [name for name in defined if defined[name].any()]
    differences_QF = np.column_stack([np.where(defined[name], a[name] - b[name], 0.0) for name in names])
    p_values = randomization_tests(differences_QF, samples=draws, seed=seed)
    differences = {}
    for name, p in zip(names, p_values, strict=True):
        is_defined = defined[name]
        interval = paired_bootstrap(a[name][is_defined], b[name][is_defined], samples=draws, seed=seed)
        differences[name] = interval.model_dump() | {"p": float(p)}
    return differences


def _negative(figure: Mapping[str, float]) -> dict[str, float]:
    """The difference in the other direction."""
    return {**figure, "mean": -figure["mean"], "low": -figure["high"], "high": -figure["low"]}


def find_difference(results: Mapping[str, Any], system: str, baseline: str) -> dict[str, Any]:
    """The paired differences of two systems. Raises KeyError if the results do not compare them."""
    for difference in results["differences"]:
        if (difference["system"], difference["baseline"]) == (system, baseline):
            return dict(difference)
        if (difference["system"], difference["baseline"]) == (baseline, system):
            figures = {name: _negative(figure) for name, figure in difference.items() if isinstance(figure, dict)}
            return {"system": system, "baseline": baseline, **figures}
    raise KeyError(f"the results do not compare {system} with {baseline}")


# (figure, column heading, format)
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
    """The results as text: one row per system, the ceilings, then each difference in recall@1.

    A difference is printed with its 95 % interval and its Holm-corrected p-value.
    """
    rows = [{**row, "of_ceiling": share_of_ceiling(row, "recall@1")} for row in results["rows"]]
    columns = [column for column in _COLUMNS if any(row[column[0]] is not None for row in rows)]
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("system")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = ["–" if row[name] is None else to_text(row[name]) for name, _, to_text in columns]
        table.add_row(escape(row["system"]), *cells)
    for systems, ceiling in distinct_ceilings(results):
        name = f"ceiling of {', '.join(systems)}" if len(systems) < len(rows) else "ceiling"
        table.add_row(escape(name), *(to_text(ceiling[n]) if n in ceiling else "" for n, _, to_text in columns))
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


def _signed(difference: Mapping[str, float]) -> str:
    interval = f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return f"{difference['mean']:+.3f} {interval} p {p_text(difference['p_holm'])}"


def p_text(p: float) -> str:
    """A p-value to three decimals, never as 0."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"
