from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.results import build_results


def test_results_have_the_interface_of_the_rerankers_library():
    answers = [to_model_answer("<think>t</think><answer>[3, 3]</answer>", 3)]
    ranked = build_results("q", ["a", "b", "c"], [2, 0, 1], notes={2: "helps"}, reasoning="t", answers=answers)
    assert [(result.doc_id, result.rank, result.document, result.note) for result in ranked] == [
        (2, 1, "c", "helps"),
        (0, 2, "a", ""),
        (1, 3, "b", ""),
    ]
    assert ranked.order == [2, 0, 1]
    assert ranked.results_count() == len(ranked) == 3
    assert ranked[0] is ranked.top_k(1)[0]
    assert ranked.get_result_by_docid(1).rank == 3
    assert ranked.get_result_by_docid(7) is None
    assert ranked.get_score_by_docid(2) == 1
    assert ranked.get_score_by_docid(7) is None
    assert not ranked.has_scores
    assert ranked.defects == ("duplicates", "missing_ids")


def test_top_k_limits_results_and_model_scores_are_used():
    ranked = build_results("q", "abc", [1, 0, 2], scores=[0.7, 0.2, 0.1], top_k=2)
    assert [(result.document, result.score) for result in ranked] == [("b", 0.7), ("a", 0.2)]
    assert ranked.has_scores
    assert ranked.defects == ()
