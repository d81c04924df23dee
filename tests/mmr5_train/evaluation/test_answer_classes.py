import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.evaluation.answer_classes import CLASSES, DEFECTS, answer_class, class_counts
from mmr5_train.evaluation.metrics import is_complete
from mmr5_train.ranking.answer import Defect, to_model_answer
from mmr5_train.ranking.records import Candidate, PageId, Ranking

THINK = "<think>t</think>"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{THINK}<answer>[3, 1, 2]</answer>", "ok"),
        ("<answer>[3, 1, 2]</answer>", "ok"),  # no think block, but a complete order
        (f"{THINK}[3, 1, 2]", "wrong_format"),
        (f"{THINK}<answer>3, 1, 2</answer>", "wrong_format"),
        (f"{THINK}<answer>[3, a, 2]</answer>", "wrong_format"),
        ("", "wrong_format"),
        (f"{THINK}<answer>[3, 1, 1]</answer>", "repetition"),
        (f"{THINK}<answer>[3, 1, 2, 3]</answer>", "repetition"),
        (f"{THINK}<answer>[1, 1, 9]</answer>", "repetition"),  # before out_of_range
        (f"{THINK}<answer>[3, 1, 0]</answer>", "out_of_range"),  # before missing_documents
        (f"{THINK}<answer>[3, 1, 2, 4]</answer>", "out_of_range"),
        (f"{THINK}<answer>[3, 1]</answer>", "missing_documents"),
        (f"{THINK}<answer>[]</answer>", "missing_documents"),
    ],
)
def test_each_answer_has_one_class(text, name):
    assert answer_class(to_model_answer(text, 3)) == name


def test_every_class_and_defect_has_a_meaning():
    assert list(DEFECTS) == list(Defect)
    assert all(meaning.endswith(".") for meaning in (*CLASSES.values(), *DEFECTS.values()))


@given(st.text("<think></answer>[]123, ", max_size=40), st.booleans())
def test_ok_means_complete_permutation(text, cut_off):
    answer = to_model_answer(f"<answer>{text}</answer>", 3, cut_off=cut_off)
    assert answer_class(answer) in CLASSES
    assert (answer_class(answer) == "ok") == is_complete(answer)


def test_class_counts_count_each_answer_once():
    rankings = [
        Ranking(
            system="sft",
            query_id=f"q{k}",
            query="Which page?",
            domain="news",
            shown=[Candidate(doc_name="a", page=i, image=f"{i}.jpg", score=-i) for i in range(3)],
            positives=(PageId(doc_name="a", page=0),),
            greedy=to_model_answer(greedy, 3),
            samples=[to_model_answer(sample, 3, cut_off=True) for sample in samples],
        )
        for k, (greedy, samples) in enumerate(
            [
                (f"{THINK}<answer>[1, 2, 3]</answer>", ["", "<answer>[1, 1, 7]</answer>"]),
                (f"{THINK}<answer>[2, 1]</answer>", [f"{THINK}<answer>[3]</answer>", f"{THINK}<answer>[4]"]),
            ]
        )
    ]
    greedy, sampled = class_counts(rankings), class_counts(rankings, sampled=True)
    assert list(greedy) == list(CLASSES)
    assert greedy == dict.fromkeys(CLASSES, 0) | {"ok": 1, "missing_documents": 1}
    expected = {"wrong_format": 2, "repetition": 1, "missing_documents": 1}
    assert sampled == dict.fromkeys(CLASSES, 0) | expected
