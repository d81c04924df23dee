import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.records import (
    Candidate,
    Page,
    PageId,
    Question,
    Ranking,
    RankingTask,
    Trace,
    rebase_images,
)


def candidate(page, doc_name="report"):
    return Candidate(doc_name=doc_name, page=page, image=f"images/{page}.jpg", score=1 / (page + 1))


def task(pages=range(5), positives=(3, 9), query_id="q1"):
    return RankingTask(
        query_id=query_id,
        query="How many?",
        domain="news",
        candidates=[candidate(page) for page in pages],
        positives=[PageId(doc_name="report", page=page) for page in positives],
    )


def test_page_ids_are_validated_hashable_and_comparable():
    assert PageId(doc_name="a", page=0) == PageId(doc_name="a", page=0)
    assert len({PageId(doc_name="a", page=0), PageId(doc_name="a", page=0), PageId(doc_name="b", page=0)}) == 2
    assert str(PageId(doc_name="a", page=3)) == "a#3"
    assert candidate(3).id == PageId(doc_name="report", page=3)
    page = Page(doc_name="report", page=3, domain="news", image="3.jpg", width=10, height=20)
    assert page.id == candidate(3).id
    with pytest.raises(ValidationError):
        PageId(doc_name="a", page=-1)
    with pytest.raises(ValidationError):
        PageId(doc_name="", page=0)


def test_score_order_is_the_first_stage_order():
    prompted = task().in_prompt_order("score")
    assert prompted.shown == task().candidates
    assert prompted.local_positives == (4,)  # page 9 was missed by the first stage


def test_shuffled_order_depends_only_on_seed_and_query_id():
    random.seed(1)
    first = task().in_prompt_order("shuffled", seed=7)
    random.seed(2)
    assert task().in_prompt_order("shuffled", seed=7) == first
    orders = {tuple(c.page for c in task().in_prompt_order("shuffled", seed=s).shown) for s in range(20)}
    assert len(orders) > 10
    orders = {tuple(c.page for c in task(query_id=f"q{q}").in_prompt_order("shuffled").shown) for q in range(20)}
    assert len(orders) > 10
    # A different order here would invalidate all existing data files.
    assert [c.page for c in first.shown] == [4, 1, 3, 0, 2]


@given(st.integers(1, 12), st.integers(0, 5), st.sets(st.integers(0, 15), min_size=1))
def test_local_positives_are_the_relevant_candidates(n, seed, positives):
    original = task(range(n), positives)
    prompted = original.in_prompt_order("shuffled", seed)
    assert set(prompted.shown) == set(original.candidates)
    relevant = {prompted.shown[i - 1].id for i in prompted.local_positives}
    assert relevant == set(original.positives) & {c.id for c in original.candidates}
    assert list(prompted.local_positives) == sorted(prompted.local_positives)


def test_invalid_task_is_rejected():
    with pytest.raises(ValidationError, match="candidates of q1: page report#2 is listed more than once"):
        task(pages=(1, 2, 2))
    with pytest.raises(ValidationError, match="candidates"):
        task(pages=())
    with pytest.raises(ValidationError, match="positives"):
        task(positives=())
    with pytest.raises(ValidationError, match="finite"):
        Candidate(doc_name="a", page=0, image="a.jpg", score=float("nan"))


def test_records_are_immutable_and_reject_unknown_fields():
    with pytest.raises(ValidationError, match="frozen"):
        candidate(0).page = 3
    with pytest.raises(ValidationError, match="not permitted"):
        Question(query_id="a", query="b", doc_name="c", domain="d", positives=[candidate(0).id], label=1)


@pytest.mark.parametrize("record", [task(), candidate(1), task().in_prompt_order("shuffled", 3)])
def test_records_round_trip_through_json(record):
    assert type(record).model_validate_json(record.model_dump_json()) == record


def trace(**changes):
    fields = {
        "query_id": "q1",
        "query": "How many?",
        "domain": "news",
        "shown": [candidate(4), candidate(3)],
        "notes": ("a", "b"),
        "think": "Image 1: a\nImage 2: b",
        "answer": (2, 1),
        "positive_ids": (2,),
    }
    return Trace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": (2, 2)}, r"answer \[2, 2\] of q1 is not a permutation of 1\.\.2"),
        ({"answer": (0, 1)}, r"not a permutation of 1\.\.2"),
        ({"answer": (1, 2, 3)}, r"not a permutation of 1\.\.2"),
        ({"positive_ids": (3,)}, r"positive_ids \[3\] of q1 must be in 1\.\.2"),
        ({"notes": ("a",)}, "q1 has 1 notes for 2 pages"),
        ({"think": ""}, "think"),
    ],
)
def test_invalid_trace_is_rejected(changes, message):
    assert trace().answer == (2, 1)
    with pytest.raises(ValidationError, match=message):
        trace(**changes)


def ranking():
    return Ranking(
        system="sft",
        query_id="q1",
        query="How many?",
        domain="news",
        shown=[candidate(4), candidate(3)],
        positives=[candidate(3).id],
        greedy=to_model_answer("<think>t</think><answer>[2, 1]</answer>", 2),
    )


def test_ranked_pages_are_best_first():
    assert ranking().ranked_pages(ranking().greedy) == (candidate(3).id, candidate(4).id)


@pytest.mark.parametrize("record", [task(), trace(), ranking()])
def test_rebase_images_keeps_paths_valid_in_another_folder(record, tmp_path):
    (moved,) = rebase_images([record], tmp_path / "data", tmp_path / "runs" / "one")
    pages = moved.candidates if isinstance(moved, RankingTask) else moved.shown
    for page in pages:
        assert page.image == f"../../data/images/{page.page}.jpg"
    (restored,) = rebase_images([moved], tmp_path / "runs" / "one", tmp_path / "data")
    assert restored == record


def test_rebase_images_makes_absolute_paths_relative(tmp_path):
    page = Page(doc_name="a", page=0, domain="d", image=str(tmp_path / "x" / "0.jpg"), width=1, height=1)
    (moved,) = rebase_images([page], tmp_path / "data", tmp_path / "runs")
    assert moved.image == "../x/0.jpg"
