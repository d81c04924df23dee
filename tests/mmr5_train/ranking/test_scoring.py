"""Scoring against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from mmr5_train.ranking.files import InputError
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Answered, Candidate, LocalId, Page, PageId, Ranking
from mmr5_train.ranking.scoring import find_difference, results_table, score_rankings, true_share

# question → (domain, types, relevant pages of document q); pages 0, 1, 2 are the candidates
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


def ranking(system: str, query_id: str, greedy: Answered, *samples: Answered) -> Ranking:
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


def answered(*order: int, think: str | None = "", defects: tuple[str, ...] = ()) -> Answered:
    ids = tuple(LocalId(i) for i in order)
    return Answered(completion=render_completion(think, ids), order=ids, defects=defects, tokens=10 * order[0])


def first(query_id: str) -> Ranking:
    return ranking("first_stage", query_id, Answered(completion="", order=(LocalId(1), LocalId(2), LocalId(3))))


NOTES = "Image 1: a chart 0, so it helps.\nImage 2: a chart 7, so it helps.\nImage 3: a chart 2. Truly."


@pytest.fixture(scope="module")
def rankings() -> dict[str, list[Ranking]]:
    return {
        "first_stage": [first(q) for q in QUESTIONS],
        "model": [
            ranking("model", "q3", answered(2, 1, 3, think=NOTES), answered(2, 1, 3), answered(1, 2, 3)),
            ranking("model", "q1", answered(1, 3, 2, think=NOTES), answered(1, 2, 3), answered(1, 2, 3)),
            ranking(
                "model",
                "q2",
                answered(1, 2, 3, think=None, defects=("no_think", "duplicates")),
                answered(3, 1, 2),
                answered(2, 3, 1, defects=("cut_off",)),
            ),
        ],
    }


@pytest.fixture(scope="module")
def results(rankings: dict[str, list[Ranking]]) -> dict[str, object]:
    return score_rankings(rankings, PAGES, draws=300)


def test_greedy_figures(results: dict) -> None:
    baseline, model = results["rows"]
    assert baseline["recall@1"] == pytest.approx(1 / 3)
    assert model["recall@1"] == pytest.approx((1 + 0 + 1) / 3)
    # q2 has two relevant pages, one of them not a candidate; three candidates end every cutoff from 3 on.
    assert model["recall@3"] == model["recall@5"] == model["recall@10"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert model["mrr"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    ideal = 1 / math.log2(2) + 1 / math.log2(3)
    assert model["ndcg@5"] == pytest.approx((1 + (1 / math.log2(4)) / ideal + 1) / 3)
    assert model["tokens"] == pytest.approx((20 + 10 + 10) / 3)
    assert baseline["tokens"] is None


def test_the_ceiling_puts_relevant_candidates_first(results: dict) -> None:
    assert results["ceiling"]["recall@1"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert results["ceiling"]["mrr"] == 1
    for row in results["rows"]:
        assert all(row[name] <= results["ceiling"][name] + 1e-12 for name in results["metrics"])


def test_macro_and_groups(results: dict) -> None:
    model = results["rows"][1]
    assert model["by_domain"]["Guidebook"]["recall@1"] == pytest.approx(0.5)
    assert model["by_domain"]["Report"]["questions"] == 1
    assert model["macro"]["recall@1"] == pytest.approx((0.5 + 1) / 2)
    assert {name: group["questions"] for name, group in model["by_question_type"].items()} == {
        "Chart": 1,
        "Table": 2,
    }


def test_samples_are_averaged_in_their_question(results: dict) -> None:
    baseline, model = results["rows"]
    assert model["recall@1_sampled"] == pytest.approx((1 + (0.5 + 0) / 2 + 0.5) / 3)
    assert baseline["recall@1_sampled"] == baseline["recall@1"]  # it has one answer, which counts for both
    assert model["defects_sampled"] == {"cut_off": 1}


def test_answers_and_descriptions(results: dict, rankings: dict[str, list[Ranking]]) -> None:
    baseline, model = results["rows"]
    assert model["defects"] == {"no_think": 1, "duplicates": 1}
    assert model["complete_permutations"] == model["without_defect"] == pytest.approx(2 / 3)
    descriptions = {page.id: page.description for page in PAGES}
    # q3: page 2 has no description, page 1 is described wrongly; q2: no line at all.
    assert [true_share(r, descriptions) for r in rankings["model"]] == [1 / 2, pytest.approx(2 / 3), 0]
    assert model["true_descriptions"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert baseline["true_descriptions"] is None
    assert baseline["complete_permutations"] is None
    assert score_rankings(rankings, [], draws=10)["rows"][1]["true_descriptions"] is None


def test_differences_are_paired(results: dict) -> None:
    difference = find_difference(results, "model", "first_stage")
    assert difference["recall@1"]["mean"] == pytest.approx(1 / 3)
    assert difference["recall@1"]["low"] == 0  # no question got worse, so no resample can
    assert difference["recall@1"]["high"] == 1
    assert "true_descriptions" not in difference
    with pytest.raises(KeyError):
        find_difference(results, "first_stage", "model")


def test_every_system_is_compared_with_the_one_before_and_with_the_first(
    rankings: dict[str, list[Ranking]],
) -> None:
    three = rankings | {"better": rankings["model"]}
    found = score_rankings(three, PAGES, draws=10)["differences"]
    pairs = [(d["system"], d["baseline"]) for d in found]
    assert pairs == [("model", "first_stage"), ("better", "model"), ("better", "first_stage")]
    assert found[1]["true_descriptions"] == {"mean": 0, "low": 0, "high": 0}


def test_intervals_hold_their_means_and_the_seed_decides(
    rankings: dict[str, list[Ranking]], results: dict
) -> None:
    for row in results["rows"]:
        for name, interval in row["intervals"].items():
            assert interval["low"] <= row[name] <= interval["high"]
    assert score_rankings(rankings, PAGES, draws=300) == results


def test_other_questions_are_refused(rankings: dict[str, list[Ranking]]) -> None:
    with pytest.raises(InputError, match=r"model and first_stage are not of the same questions: .* q2"):
        score_rankings(rankings | {"model": rankings["model"][:2]}, PAGES)
    with pytest.raises(InputError, match="ranked a question twice"):
        score_rankings(rankings | {"model": rankings["model"] + rankings["model"][:1]}, PAGES)
    changed = [r.model_copy(update={"positives": (PageId(doc_name="q3", page=0),)}) for r in rankings["model"]]
    with pytest.raises(InputError, match="other relevant pages"):
        score_rankings(rankings | {"model": changed}, PAGES)
    with pytest.raises(InputError, match="no rankings"):
        score_rankings({}, PAGES)


def test_the_table_holds_the_figures(results: dict) -> None:
    table = results_table(results)
    line = next(line for line in table.splitlines() if line.strip().startswith("model "))
    assert line.split() == ["model", "0.667", "0.833", "0.833", "0.778", "0.583", "66.7%", "38.9%"]
    assert max(map(len, table.splitlines())) <= 80
    assert "model − first_stage recall@1 +0.333 [+0.000, +1.000]" in " ".join(table.split())
