"""Drawing train questions. The split of documents is tested in test_candidates.py."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from data_construction.corpus.splits import Draw
from mmr5_train.ranking.records import Candidate, PageId, RankingTask


def task(domain: str, number: int) -> RankingTask:
    return RankingTask(
        query_id=f"{domain}/{number}",
        query="Q?",
        domain=domain,
        candidates=(Candidate(doc_name="d", page=0, image="i", score=0.0),),
        positives=(PageId(doc_name="d", page=0),),
    )


def draw(tasks: list[RankingTask], per_domain: int, seed: int = 0) -> tuple[list[str], Counter[str]]:
    drawn = Draw(per_domain, seed)
    for one in tasks:
        drawn.add(one)
    return [json.loads(line)["query_id"] for line in drawn.lines()], drawn.not_drawn


@given(st.permutations(range(12)), st.integers(1, 8), st.integers(0, 3))
def test_the_sample_does_not_depend_on_the_order(numbers: list[int], per_domain: int, seed: int) -> None:
    tasks = [task("ab"[i % 2], i) for i in range(12)]
    sample, not_drawn = draw(tasks, per_domain, seed)
    assert draw([tasks[i] for i in numbers], per_domain, seed) == (sample, not_drawn)
    assert Counter(query_id[0] for query_id in sample) == dict.fromkeys("ab", min(per_domain, 6))
    assert not_drawn.total() == 12 - len(sample)


def test_another_seed_draws_others() -> None:
    tasks = [task("abc"[i // 40], i) for i in range(120)]
    assert draw(tasks, 20)[0] != draw(tasks, 20, seed=1)[0]


def test_the_first_tasks_are_a_sample_of_all_domains() -> None:
    """Also if a domain has far more tasks than another: 100 of 5,000 and 100 of 110."""
    tasks = [task("many", i) for i in range(5000)] + [task("few", i) for i in range(110)]
    sample, _ = draw(tasks, 100)
    first = Counter(query_id.partition("/")[0] for query_id in sample[:100])
    assert 35 < first["few"] < 65
