from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_construction.first_stage.policy import Policy, choose_candidates
from mmr5_train.ranking.records import Candidate, PageId

RANKED = tuple(Candidate(doc_name="a", page=page, image="a.jpg", score=-page) for page in range(12))


def chosen(policy: Policy, *positives: int, n: int = 5, insert: bool = True, seed: str = "s") -> list[int]:
    gold = [PageId(doc_name="a", page=page) for page in positives]
    return [candidate.page for candidate in choose_candidates(RANKED, gold, n, policy, insert, seed)]


def test_top_rule_takes_the_best_pages() -> None:
    assert chosen(Policy(), 3) == [0, 1, 2, 3, 4]
    assert chosen(Policy(), 7) == [0, 1, 2, 3, 4]
    assert chosen(Policy(), 1, n=2) == [0, 1]
    assert chosen(Policy(), 1, n=20) == list(range(12))


def test_insert_missed_replaces_the_last_candidate() -> None:
    policy = Policy(insert_missed=True)
    assert chosen(policy, 9, 7) == [0, 1, 2, 3, 7]  # the better of the two
    assert chosen(policy, 9, 2) == [0, 1, 2, 3, 4]  # page 2 is a candidate already
    assert chosen(policy, 9, insert=False) == [0, 1, 2, 3, 4]
    assert chosen(policy, 40) == [0, 1, 2, 3, 4]  # not in the ranking


def test_all_relevant_rule_includes_every_relevant_page() -> None:
    policy = Policy(rule="all_relevant")
    assert chosen(policy, 9, 2, 11) == [0, 1, 2, 9, 11]
    assert chosen(policy, *range(6, 12)) == [6, 7, 8, 9, 10]


def test_skip_irrelevant_drops_the_best_irrelevant_pages() -> None:
    assert chosen(Policy(skip_irrelevant=2), 1) == [1, 3, 4, 5, 6]
    assert chosen(Policy(skip_irrelevant=10), 1) == [1, 11]


def test_draw_from_samples_irrelevant_pages_by_seed() -> None:
    policy = Policy(rule="all_relevant", skip_irrelevant=1, draw_from=8)
    samples = {seed: chosen(policy, 11, seed=seed) for seed in "abcdefgh"}
    assert all(pages[-1] == 11 and len(pages) == 5 and pages == sorted(pages) for pages in samples.values())
    assert {page for pages in samples.values() for page in pages} == {*range(1, 9), 11}
    assert samples["a"] == chosen(policy, 11, seed="a")
    assert chosen(Policy(draw_from=2), 0) == [0, 1, 2]  # fewer than n


@given(
    st.sets(st.integers(0, 11), min_size=1, max_size=4),
    st.integers(2, 20),
    st.sampled_from(["top", "all_relevant"]),
    st.integers(0, 3),
    st.none() | st.integers(1, 12),
)
def test_pages_beyond_max_irrelevant_have_no_effect(
    gold: set[int], n: int, rule: str, skip: int, draw: int | None
) -> None:
    """`max_irrelevant` irrelevant pages and all relevant ones give the same candidates as the complete ranking."""
    policy = Policy.model_validate(
        {"rule": rule, "skip_irrelevant": skip, "draw_from": draw, "insert_missed": True}
    )
    positives = [PageId(doc_name="a", page=page) for page in gold]
    reach = max(n, policy.max_irrelevant(n) + len(gold))
    prefix = [page for i, page in enumerate(RANKED) if i < reach or page.page in gold]
    expected = choose_candidates(RANKED, positives, n, policy, True, "s")
    assert choose_candidates(prefix, positives, n, policy, True, "s") == expected
    assert len(set(expected)) == len(expected) <= n
