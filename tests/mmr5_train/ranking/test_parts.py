"""Prompts with some of an answer's pages: what holds for them, and in what order they come."""

import pytest

from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.notes import join_notes
from mmr5_train.ranking.parts import NO_VERDICT, sample_subsets, sort_pairs_first
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import Candidate, Ranking


def make_ranking(name="q", completion=None, pages=5):
    notes = [f"a table of {i}, so it {'helps' if i == 3 else 'does not help'}." for i in range(1, pages + 1)]
    completion = completion or render_completion(join_notes(notes), [3, 1, 2, 4, 5])
    return Ranking(
        system="teacher",
        query_id=name,
        query="Where is the table of 3?",
        domain="made up",
        shown=tuple(Candidate(doc_name="a", page=i, image=f"{i}.png", score=0) for i in range(pages)),
        positives=(),
        greedy=to_model_answer(completion, pages),
    )


@pytest.fixture
def ranking():
    """Five pages, of which the third helps."""
    return make_ranking()


def test_an_answer_holds_for_its_best_page_and_some_others(ranking):
    own, *parts = sample_subsets(ranking, 60, seed=1)
    assert (own.positions, own.order, own.verdicts) == ((1, 2, 3, 4, 5), (3, 1, 2, 4, 5), (1, 1, 0, 1, 1))
    assert {len(part.positions) for part in parts} == {2, 3, 4, 5}
    assert len({part.positions for part in parts}) > 10
    for part in parts:
        assert 3 in part.positions
        assert list(part.positions) == sorted(part.positions), "pages that help alike may be in the prompt's order"
        assert [part.positions[i - 1] for i in part.order] == [p for p in (3, 1, 2, 4, 5) if p in part.positions]
        assert part.verdicts == tuple(int(place != 3) for place in part.positions)
        assert part.hints == tuple(f"a table of {place}, so it" for place in part.positions)
    assert parts == list(sample_subsets(ranking, 60, seed=1))[1:]
    assert parts != list(sample_subsets(ranking, 60, seed=2))[1:]


def test_most_parts_have_two_pages(ranking):
    sizes = [len(part.positions) for part in list(sample_subsets(ranking, 2500, seed=1))[1:]]
    for others in (1, 2, 3, 4):  # 1 + 1/2 + 1/3 + 1/4 = 25/12
        assert sizes.count(1 + others) == pytest.approx(2500 * 12 / 25 / others, rel=0.1)


def test_two_pages_come_first_and_all_other_numbers_mixed_after_them():
    parts = [(one, part) for one in map(make_ranking, "abcdefghij") for part in sample_subsets(one, 9, seed=1)]
    found = sort_pairs_first(parts, seed=1)
    assert sorted(map(id, found)) == sorted(map(id, parts))
    pages = [len(part.positions) for _, part in found]
    pairs = pages.count(2)
    assert set(pages[:pairs]) == {2}
    assert {3, 4, 5} == set(pages[pairs : pairs + 12]) == set(pages[-12:])
    assert len({ranking.query_id for ranking, _ in found[:10]}) > 3, "questions are mixed too"
    assert found != sort_pairs_first(parts, seed=2)


def test_two_pages_can_t_be_divided():
    few = make_ranking(completion=render_completion("One of them.", [2, 1]), pages=2)
    [own] = sample_subsets(few, 3, seed=1)
    assert own.order == (2, 1)


def test_a_thought_that_is_not_page_by_page_teaches_the_order_alone():
    completion = "<think>Page 3 has the total. The others don't help.</think><answer>[3, 1, 2, 4, 5]</answer>"
    own, *parts = sample_subsets(make_ranking(completion=completion), 4, seed=1)
    assert own.order == (3, 1, 2, 4, 5)
    assert len(parts) == 4
    for part in (own, *parts):
        assert part.verdicts == (NO_VERDICT,) * len(part.positions)
        assert part.hints == ("",) * len(part.positions)


def test_a_verdict_in_other_words_gives_no_hint():
    notes = ["a table, so it helps.", "a chart, which is irrelevant.", "so it helps."]
    completion = render_completion(join_notes(notes), [1, 3, 2])
    [own] = sample_subsets(make_ranking(completion=completion, pages=3), 0, seed=1)
    assert own.verdicts == (0, 1, 0)
    assert own.hints == ("a table, so it", "", "")
