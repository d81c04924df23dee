import pytest

from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.notes import join_notes
from mmr5_train.ranking.page_subsets import NO_VERDICT, sample_subsets, sort_pairs_first
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Candidate, Ranking


def make_ranking(query_id="q", completion=None, pages=5):
    """A ranking whose default completion says that page 3 of five helps, and ranks it first."""
    notes = [f"a table of {i}, so it {'helps' if i == 3 else 'does not help'}." for i in range(1, pages + 1)]
    completion = completion or render_completion(join_notes(notes), [3, 1, 2, 4, 5])
    return Ranking(
        system="teacher",
        query_id=query_id,
        query="Where is the table of 3?",
        domain="synthetic",
        shown=tuple(Candidate(doc_name="a", page=i, image=f"{i}.png", score=0) for i in range(pages)),
        positives=(),
        greedy=to_model_answer(completion, pages),
    )


@pytest.fixture
def ranking():
    return make_ranking()


def test_all_pages_come_first_and_every_subset_holds_the_best_page(ranking):
    full, *subsets = sample_subsets(ranking, 60, seed=1)
    assert (full.positions, full.order, full.verdicts) == ((1, 2, 3, 4, 5), (3, 1, 2, 4, 5), (1, 1, 0, 1, 1))
    assert {len(subset.positions) for subset in subsets} == {2, 3, 4, 5}
    assert len({subset.positions for subset in subsets}) > 10
    for subset in subsets:
        assert 3 in subset.positions
        assert list(subset.positions) == sorted(subset.positions), "a subset keeps the prompt order"
        ranked = [subset.positions[i - 1] for i in subset.order]
        assert ranked == [page for page in (3, 1, 2, 4, 5) if page in subset.positions]
        assert subset.verdicts == tuple(int(position != 3) for position in subset.positions)
        assert subset.hints == tuple(f"a table of {position}, so it" for position in subset.positions)


def test_subsets_depend_on_the_seed(ranking):
    subsets = list(sample_subsets(ranking, 60, seed=1))
    assert subsets == list(sample_subsets(ranking, 60, seed=1))
    assert subsets[1:] != list(sample_subsets(ranking, 60, seed=2))[1:]


def test_subset_size_has_probability_proportional_to_1_over_k(ranking):
    sizes = [len(subset.positions) for subset in list(sample_subsets(ranking, 2500, seed=1))[1:]]
    for others in (1, 2, 3, 4):  # 1 + 1/2 + 1/3 + 1/4 = 25/12
        assert sizes.count(1 + others) == pytest.approx(2500 * 12 / 25 / others, rel=0.1)


def test_sort_pairs_first_shuffles_pairs_and_larger_subsets_separately():
    subsets = [
        (ranking, subset)
        for ranking in map(make_ranking, "abcdefghij")
        for subset in sample_subsets(ranking, 9, seed=1)
    ]
    ordered = sort_pairs_first(subsets, seed=1)
    assert sorted(map(id, ordered)) == sorted(map(id, subsets))
    sizes = [len(subset.positions) for _, subset in ordered]
    n_pairs = sizes.count(2)
    assert set(sizes[:n_pairs]) == {2}
    assert {3, 4, 5} == set(sizes[n_pairs : n_pairs + 12]) == set(sizes[-12:])
    assert len({ranking.query_id for ranking, _ in ordered[:10]}) > 3, "questions are shuffled too"
    assert ordered != sort_pairs_first(subsets, seed=2)


def test_two_pages_give_no_random_subsets():
    ranking = make_ranking(completion=render_completion("One of them.", [2, 1]), pages=2)
    [full] = sample_subsets(ranking, 3, seed=1)
    assert full.order == (2, 1)


def test_reasoning_without_notes_gives_no_verdicts_and_no_hints():
    completion = "<think>Page 3 has the total. The others don't help.</think><answer>[3, 1, 2, 4, 5]</answer>"
    full, *subsets = sample_subsets(make_ranking(completion=completion), 4, seed=1)
    assert full.order == (3, 1, 2, 4, 5)
    assert len(subsets) == 4
    for subset in (full, *subsets):
        assert subset.verdicts == (NO_VERDICT,) * len(subset.positions)
        assert subset.hints == ("",) * len(subset.positions)


def test_free_wording_gives_no_verdict_and_no_hint():
    notes = ["a table, so it helps.", "a chart, which is irrelevant.", "It answers the question."]
    completion = render_completion(join_notes(notes), [1, 3, 2])
    [full] = sample_subsets(make_ranking(completion=completion, pages=3), 0, seed=1)
    assert full.verdicts == (0, NO_VERDICT, NO_VERDICT)
    assert full.hints == ("a table, so it", "", "")
