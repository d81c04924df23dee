"""Scores compared with hand-computed values."""

from __future__ import annotations

import math

import pytest

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.scoring import (
    distinct_ceilings,
    find_difference,
    p_text,
    results_table,
    score_rankings,
    share_of_ceiling,
    true_description_share,
)
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Candidate, LocalId, ModelAnswer, Page, PageId, Ranking

# question → (domain, types, relevant pages); pages 0, 1, 2 of a document named like the question are candidates
QUESTIONS = {
    "q1": ("Guidebook", ("Table",), (0,)),
    "q2": ("Guidebook", ("Table", "Chart"), (2, 9)),  # page 9 is not among the candidates
    "q3": ("Report", (), (1,)),
}
PAGES = [
    Page(doc_name=q, page=i, domain="x", image=f"{q}{i}.jpg", width=6, height=8, description=f"a chart {i}")
    for q in QUESTIONS
    for i in range(3)
    if (q, i) != ("q3", 2)
]


def ranking(system: str, query_id: str, greedy: ModelAnswer, *samples: ModelAnswer) -> Ranking:
    domain, types, positives = QUESTIONS[query_id]
    return Ranking(
        system=system,
        query_id=query_id,
        query="where?",
        domain=domain,
        question_types=types,
        shown=tuple(Candidate(doc_name=query_id, page=i, image=f"{query_id}{i}.jpg", score=-i) for i in range(3)),
        positives=tuple(PageId(doc_name=query_id, page=i) for i in positives),
        greedy=greedy,
        samples=samples,
    )


def answer(*order: int, think: str | None = "", defects: tuple[str, ...] = ()) -> ModelAnswer:
    ids = tuple(LocalId(i) for i in order)
    return ModelAnswer(completion=render_completion(think, ids), order=ids, defects=defects, tokens=10 * order[0])


def first_stage_ranking(query_id: str) -> Ranking:
    return ranking("first_stage", query_id, ModelAnswer(completion="", order=(LocalId(1), LocalId(2), LocalId(3))))


NOTES = "Image 1: a chart 0, so it helps.\nImage 2: a chart 7, so it helps.\nImage 3: a chart 2. Truly."


@pytest.fixture(scope="module")
def rankings() -> dict[str, list[Ranking]]:
    return {
        "first_stage": [first_stage_ranking(q) for q in QUESTIONS],
        "model": [
            ranking("model", "q3", answer(2, 1, 3, think=NOTES), answer(2, 1, 3), answer(1, 2, 3)),
            ranking("model", "q1", answer(1, 3, 2, think=NOTES), answer(1, 2, 3), answer(1, 2, 3)),
            ranking(
                "model",
                "q2",
                answer(1, 2, 3, think=None, defects=("no_think", "duplicates")),
                answer(3, 1, 2),
                answer(2, 3, 1, defects=("cut_off",)),
            ),
        ],
    }


@pytest.fixture(scope="module")
def results(rankings: dict[str, list[Ranking]]) -> dict[str, object]:
    return score_rankings(rankings, PAGES, draws=300)


def test_greedy_metrics_equal_hand_computed_values(results: dict) -> None:
    baseline, model = results["rows"]
    assert baseline["recall@1"] == pytest.approx(1 / 3)
    assert model["recall@1"] == pytest.approx((1 + 0 + 1) / 3)
    # q2 has two relevant pages, one of them not a candidate. Three candidates: recall@k is equal for all k ≥ 3.
    assert model["recall@3"] == model["recall@5"] == model["recall@10"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert model["mrr"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    ideal = 1 / math.log2(2) + 1 / math.log2(3)
    assert model["ndcg@5"] == pytest.approx((1 + (1 / math.log2(4)) / ideal + 1) / 3)
    assert model["tokens"] == pytest.approx((20 + 10 + 10) / 3)
    assert baseline["tokens"] is None


def test_ceiling_is_that_of_a_perfect_order(results: dict) -> None:
    assert results["ceiling"]["recall@1"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert results["ceiling"]["mrr"] == 1
    for row in results["rows"]:
        assert all(row[name] <= results["ceiling"][name] + 1e-12 for name in results["metrics"])


def test_ceiling_of_a_row_depends_on_its_own_candidates(results: dict, rankings: dict[str, list[Ranking]]) -> None:
    assert [row["ceiling"] for row in results["rows"]] == [results["ceiling"]] * 2
    # With two candidates, q2 has no relevant page left.
    fewer = [r.model_copy(update={"shown": r.shown[:2], "greedy": answer(2, 1)}) for r in rankings["first_stage"]]
    results_with_cut = score_rankings(rankings | {"cut": fewer}, PAGES, draws=10)
    cut = results_with_cut["rows"][-1]
    assert results_with_cut["ceiling"] == results["ceiling"]
    assert cut["ceiling"]["recall@1"] == cut["ceiling"]["mrr"] == pytest.approx(2 / 3)
    assert share_of_ceiling(cut, "recall@1") == pytest.approx((1 / 3) / (2 / 3))
    assert share_of_ceiling({"ceiling": {"mrr": 0.0}, "mrr": 0.0}, "mrr") is None
    assert [systems for systems, _ in distinct_ceilings(results_with_cut)] == [["first_stage", "model"], ["cut"]]
    lines = [line.strip() for line in results_table(results_with_cut).splitlines()]
    full_line, cut_line = (line for line in lines if line.startswith("ceiling of "))
    assert "first_stage, model" in full_line
    assert " 0.833 " in full_line
    assert cut_line.split()[2:4] == ["cut", "0.667"]


def test_macro_mean_and_breakdowns_equal_hand_computed_values(results: dict) -> None:
    model = results["rows"][1]
    assert model["by_domain"]["Guidebook"]["recall@1"] == pytest.approx(0.5)
    assert model["by_domain"]["Report"]["questions"] == 1
    assert model["macro"]["recall@1"] == pytest.approx((0.5 + 1) / 2)
    assert {name: group["questions"] for name, group in model["by_question_type"].items()} == {
        "Chart": 1,
        "Table": 2,
    }


def test_samples_are_averaged_within_their_question(results: dict) -> None:
    baseline, model = results["rows"]
    assert model["recall@1_sampled"] == pytest.approx((1 + (0.5 + 0) / 2 + 0.5) / 3)
    assert baseline["recall@1_sampled"] == baseline["recall@1"]  # its one answer counts as its sample
    assert model["defects_sampled"] == {"cut_off": 1}


def test_defects_classes_and_true_descriptions_are_counted(
    results: dict, rankings: dict[str, list[Ranking]]
) -> None:
    baseline, model = results["rows"]
    assert model["defects"] == {"no_think": 1, "duplicates": 1}
    assert {name: count for name, count in model["classes"].items() if count} == {"ok": 2, "repetition": 1}
    assert sum(model["classes_sampled"].values()) == model["classes_sampled"]["ok"] == 6
    assert set(baseline["classes"].values()) == {0}  # the first stage writes no answers
    assert model["complete_permutations"] == model["without_defect"] == pytest.approx(2 / 3)
    descriptions = {page.id: page.description for page in PAGES}
    # q3: page 2 has no description, and the note on page 1 is wrong. q2: no notes.
    assert [true_description_share(r, descriptions) for r in rankings["model"]] == [1 / 2, pytest.approx(2 / 3), 0]
    assert model["true_descriptions"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert baseline["true_descriptions"] is None
    assert baseline["complete_permutations"] is None
    assert score_rankings(rankings, [], draws=10)["rows"][1]["true_descriptions"] is None


def test_paired_difference_has_a_bootstrap_interval(results: dict) -> None:
    difference = find_difference(results, "model", "first_stage")
    assert difference["recall@1"]["mean"] == pytest.approx(1 / 3)
    assert difference["recall@1"]["low"] == 0  # no question got worse, so no resample is negative
    assert difference["recall@1"]["high"] == 1
    assert "true_descriptions" not in difference
    reverse = find_difference(results, "first_stage", "model")["recall@1"]
    assert (reverse["mean"], reverse["low"], reverse["high"]) == (pytest.approx(-1 / 3), -1, 0)
    with pytest.raises(KeyError):
        find_difference(results, "model", "another")


def test_systems_are_compared_with_the_previous_and_the_first(
    rankings: dict[str, list[Ranking]],
) -> None:
    systems = rankings | {"better": rankings["model"]}
    differences = score_rankings(systems, PAGES, draws=10)["differences"]
    pairs = [(d["system"], d["baseline"]) for d in differences]
    assert pairs == [("model", "first_stage"), ("better", "model"), ("better", "first_stage")]
    assert differences[1]["true_descriptions"] == {"mean": 0, "low": 0, "high": 0, "p": 1, "p_holm": 1}


def test_p_values_are_corrected_over_the_comparisons_of_a_figure(rankings: dict[str, list[Ranking]]) -> None:
    # Only q3 differs from the first stage. With one non-zero difference both signs are as extreme, so p is 1.
    differences = score_rankings(rankings, PAGES, draws=10)["differences"]
    assert [d["recall@1"]["p"] for d in differences] == [1]
    questions = [f"d{i}" for i in range(8)]

    def ranked(system: str, wins: int) -> list[Ranking]:
        """Page 1 of every question is relevant; the system ranks it first in `wins` questions."""
        rows = []
        for k, query_id in enumerate(questions):
            order = (2, 1, 3) if k < wins else (1, 2, 3)
            row = ranking(system, "q3", answer(*order))
            shown = tuple(c.model_copy(update={"doc_name": query_id}) for c in row.shown)
            positives = (PageId(doc_name=query_id, page=1),)
            rows.append(row.model_copy(update={"query_id": query_id, "shown": shown, "positives": positives}))
        return rows

    systems = {"none": ranked("none", 0), "six": ranked("six", 6), "all": ranked("all", 8)}
    differences = score_rankings(systems, [], draws=10)["differences"]
    assert [(d["system"], d["baseline"]) for d in differences] == [
        ("six", "none"),
        ("all", "six"),
        ("all", "none"),
    ]
    # With k wins and no loss, 2 of the 2^k sign assignments are as far from zero.
    assert [d["recall@1"]["p"] for d in differences] == [2 / 2**6, 2 / 2**2, 2 / 2**8]
    assert [d["recall@1"]["p_holm"] for d in differences] == [2 * 2 / 2**6, 2 / 2**2, 3 * 2 / 2**8]
    assert differences[0]["recall@3"]["p"] == 1  # the same in both
    assert "p 0.062" in results_table(score_rankings(systems, [], draws=10))


def test_intervals_contain_their_means_and_scoring_is_deterministic(
    rankings: dict[str, list[Ranking]], results: dict
) -> None:
    for row in results["rows"]:
        for name, interval in row["intervals"].items():
            assert interval["low"] <= row[name] <= interval["high"]
    assert score_rankings(rankings, PAGES, draws=300) == results


def test_different_questions_are_an_error(rankings: dict[str, list[Ranking]]) -> None:
    with pytest.raises(InputError, match=r"model and first_stage are not of the same questions: .* q2"):
        score_rankings(rankings | {"model": rankings["model"][:2]}, PAGES)
    with pytest.raises(InputError, match="ranked a question twice"):
        score_rankings(rankings | {"model": rankings["model"] + rankings["model"][:1]}, PAGES)
    changed = [r.model_copy(update={"positives": (PageId(doc_name="q3", page=0),)}) for r in rankings["model"]]
    with pytest.raises(InputError, match="other relevant pages"):
        score_rankings(rankings | {"model": changed}, PAGES)
    with pytest.raises(InputError, match="no rankings"):
        score_rankings({}, PAGES)


def test_results_table_shows_the_figures(results: dict) -> None:
    table = results_table(results)
    line = next(line for line in table.splitlines() if line.strip().startswith("model "))
    assert line.split() == ["model", "0.667", "80.0%", "0.833", "0.833", "0.778", "0.583", "66.7%", "38.9%"]
    assert max(map(len, table.splitlines())) <= 80
    assert "model − first_stage recall@1 +0.333 [+0.000, +1.000] p 1.000" in " ".join(table.split())


def test_p_text_never_prints_zero() -> None:
    assert [p_text(p) for p in (1.0, 0.0314, 0.001, 0.0001)] == ["1.000", "0.031", "0.001", "<0.001"]
