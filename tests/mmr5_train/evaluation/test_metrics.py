import math
import random

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG

from mmr5_train.evaluation.metrics import (
    KS,
    bootstrap_mean,
    defect_counts,
    macro,
    micro,
    paired_bootstrap,
    question_metrics,
    question_table,
)
from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.metrics import ndcg_at_k, recall_at_k, reciprocal_rank
from mmr5_train.ranking.records import Candidate, PageId, Ranking


def page(number):
    return PageId(doc_name="report", page=number)


def pages(*numbers):
    return tuple(page(number) for number in numbers)


def test_metrics_equal_hand_computed_values():
    ranked, gold = pages(4, 7, 2, 9, 1), pages(7, 1, 30)  # 30 was missed by the first stage
    assert [recall_at_k(ranked, gold, k) for k in KS] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert reciprocal_rank(ranked, gold) == 1 / 2
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg_at_k(ranked, gold, 3) == pytest.approx((1 / math.log2(3)) / ideal)
    assert ndcg_at_k(ranked, gold, 5) == pytest.approx((1 / math.log2(3) + 1 / math.log2(6)) / ideal)
    assert ndcg_at_k(pages(7, 1, 30), gold, 1) == 1
    assert reciprocal_rank(pages(4, 2), gold) == 0
    assert question_metrics(pages(1, 7, 30), gold) == {
        "recall@1": 1 / 3,
        **{f"recall@{k}": 1 for k in KS[1:]},
        **{f"ndcg@{k}": 1 for k in KS},
        "mrr": 1,
    }


def test_duplicate_gold_pages_count_once_and_page_ids_include_the_document():
    assert recall_at_k(pages(1, 2), pages(1, 1, 3), 2) == 1 / 2
    assert recall_at_k(pages(1), [PageId(doc_name="other", page=1)], 1) == 0


def test_undefined_metrics_are_errors():
    with pytest.raises(ValueError, match="without a gold page"):
        recall_at_k(pages(1), (), 1)
    with pytest.raises(ValueError, match="occurs twice"):
        ndcg_at_k(pages(1, 2, 1), pages(1), 5)


def test_metrics_equal_ir_measures_on_random_rankings():
    rng = random.Random(7)
    ranked, gold, qrels, run = {}, {}, [], []
    for number in range(300):
        query_id = f"q{number:03}"
        ranked[query_id] = rng.sample(range(30), rng.randint(1, 25))
        gold[query_id] = rng.sample(range(30), rng.randint(1, 12))
        qrels += [ir_measures.Qrel(query_id, str(p), 1) for p in gold[query_id]]
        run += [ir_measures.ScoredDoc(query_id, str(p), -float(i)) for i, p in enumerate(ranked[query_id])]
    measures = {f"recall@{k}": R @ k for k in KS} | {f"ndcg@{k}": nDCG @ k for k in KS} | {"mrr": RR}
    name = {measure: ours for ours, measure in measures.items()}
    expected = list(ir_measures.iter_calc(list(measures.values()), qrels, run))
    assert len(expected) == 300 * len(measures)
    ours = {q: question_metrics(pages(*ranked[q]), pages(*gold[q])) for q in ranked}
    for metric in expected:
        assert ours[metric.query_id][name[metric.measure]] == pytest.approx(metric.value, abs=1e-9)


@given(st.permutations(range(8)), st.sets(st.integers(0, 11), min_size=1))
def test_metrics_are_bounded_and_recall_grows_with_k(order, gold):
    scores = question_metrics(pages(*order), pages(*gold))
    assert all(0 <= score <= 1 + 1e-12 for score in scores.values())
    recalls = [scores[f"recall@{k}"] for k in KS]
    assert recalls == sorted(recalls)
    assert recalls[-1] == pytest.approx(len({g for g in gold if g < 8}) / len(gold))


def ranking(query_id, greedy, samples=(), domain="news", types=(), gold=(2,)):
    """A ranking of pages 0 to 4, which have the ids 1 to 5 in the prompt."""
    return Ranking(
        system="sft",
        query_id=query_id,
        query="Which page?",
        domain=domain,
        question_types=types,
        shown=[Candidate(doc_name="report", page=i, image=f"{i}.jpg", score=-i) for i in range(5)],
        positives=pages(*gold),
        greedy=to_model_answer(greedy, 5),
        samples=[to_model_answer(sample, 5) for sample in samples],
    )


FIRST = "<think>t</think><answer>[3, 1, 2, 4, 5]</answer>"
THIRD = "<think>t</think><answer>[1, 2, 3, 4, 5]</answer>"


def test_question_table_has_metrics_of_greedy_or_sampled_answers():
    rankings = [
        ranking("a", THIRD, [FIRST, FIRST, THIRD, THIRD]),
        ranking("b", FIRST, [FIRST], domain="law", types=("Table", "Chart")),
    ]
    greedy, sampled = question_table(rankings), question_table(rankings, sampled=True)
    assert greedy.query_ids == ("a", "b")
    assert greedy.domains == ("news", "law")
    assert greedy.question_types == ((), ("Table", "Chart"))
    assert greedy.metrics["recall@1"].tolist() == [0, 1]
    assert greedy.metrics["mrr"].tolist() == pytest.approx([1 / 3, 1])
    assert sampled.metrics["recall@1"].tolist() == [0.5, 1]
    assert sampled.metrics["mrr"].tolist() == pytest.approx([2 / 3, 1])


def test_question_table_without_answers_is_an_error():
    with pytest.raises(ValueError, match="no rankings"):
        question_table([])
    with pytest.raises(ValueError, match="ranking of a by sft has no sampled answer"):
        question_table([ranking("a", FIRST)], sampled=True)


def test_micro_averages_questions_and_macro_averages_domains():
    values, domains = np.array([1.0, 0, 0, 0]), ["law", "news", "news", "news"]
    assert micro(values) == 0.25
    assert macro(values, domains) == 0.5


def test_defects_are_counted_for_greedy_and_sampled_answers():
    rankings = [
        ranking("a", FIRST, ["<answer>[1, 1]</answer>", ""]),
        ranking("b", "<answer>[1, 2, 3, 4, 5]</answer>", [FIRST, FIRST]),
    ]
    greedy = defect_counts(rankings)
    assert (greedy["answers"], greedy["complete_permutations"], greedy["no_think"]) == (2, 2, 1)
    sampled = defect_counts(rankings, sampled=True)
    assert {name: count for name, count in sampled.items() if count} == {
        "answers": 4,
        "complete_permutations": 2,
        "without_defect": 2,
        "no_think": 2,
        "no_answer": 1,
        "duplicates": 1,
        "missing_ids": 1,
    }
    assert sampled["cut_off"] == 0


def test_bootstrap_matches_the_normal_interval_on_a_large_sample():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.3, 1658), rng.normal(0.5, 0.3, 1658)
    interval = paired_bootstrap(a, b, seed=1)
    half = 1.96 * np.std(a - b) / math.sqrt(1658)
    assert interval.mean == pytest.approx(np.mean(a - b))
    assert interval.low == pytest.approx(interval.mean - half, abs=0.001)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.001)


def test_bootstrap_resamples_questions_as_pairs():
    rng = np.random.default_rng(0)
    difficulty = rng.random(500)
    paired = paired_bootstrap(difficulty + 0.1, difficulty, seed=1)
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1))
    unpaired = paired_bootstrap(rng.permutation(difficulty) + 0.1, difficulty, seed=1)
    assert unpaired.high - unpaired.low > 0.05


def test_bootstrap_of_binary_values_covers_the_true_mean_in_95_percent():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(400):
        interval = bootstrap_mean(rng.random(200) < 0.6, samples=500, seed=trial)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_bootstrap_with_groups_estimates_the_macro_mean():
    values = np.array([1.0] * 10 + [0.0] * 90)
    domains = ["law"] * 10 + ["news"] * 90
    interval = bootstrap_mean(values, seed=0, groups=domains)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)
    rng = np.random.default_rng(0)
    values = rng.random(300)
    domains = list(rng.choice(["law", "news", "science"], 300))
    assert bootstrap_mean(values, seed=0, groups=domains).mean == pytest.approx(macro(values, domains))


def test_bootstrap_depends_on_the_seed_and_not_on_the_batch_size(monkeypatch):
    values = np.random.default_rng(0).random(100)
    first = bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) == first
    assert bootstrap_mean(values, seed=6) != first
    monkeypatch.setattr("mmr5_train.evaluation.metrics._MAX_INDICES", 12_345)
    assert bootstrap_mean(values, seed=5) == first


def test_bootstrap_draws_indices_of_one_group_after_the_other():
    """Published results depend on the order of the random draws, so a new scipy must not change it."""
    values = np.random.default_rng(0).random(30)
    groups = ["a"] * 20 + ["b"] + ["c"] * 9
    rng = np.random.default_rng(5)
    parts = [values[:20], values[20:21], values[21:]]
    resampled_means = [part[rng.integers(0, len(part), size=(1000, len(part)))].mean(axis=1) for part in parts]
    low, high = np.percentile(np.mean(resampled_means, axis=0), [2.5, 97.5])
    interval = bootstrap_mean(values, samples=1000, seed=5, groups=groups)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)


def test_bootstrap_rejects_mismatched_lengths():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_bootstrap([1, 0], [1, 0, 1], seed=0)
    with pytest.raises(ValueError, match="one value per question"):
        bootstrap_mean([], seed=0)
    with pytest.raises(ValueError, match="2 values and 1 group"):
        bootstrap_mean([1, 0], seed=0, groups=["law"])
