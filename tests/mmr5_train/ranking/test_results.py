from pathlib import Path

from mmr5_train.ranking.answer import to_model_answer
from mmr5_train.ranking.results import Document, build_results

PAGES = [Document("a.png"), Document(b"b", "second", "its text", {"year": 2024}), Document("c.png", 30)]


def test_results_have_the_interface_of_the_rerankers_library():
    answers = [to_model_answer("<think>t</think><answer>[3, 3]</answer>", 3)]
    ranked = build_results("q", PAGES, [2, 0, 1], notes={2: "helps"}, reasoning="t", answers=answers)
    assert [(result.doc_id, result.index, result.rank, result.page, result.note) for result in ranked] == [
        (30, 2, 1, "c.png", "helps"),
        (0, 0, 2, "a.png", ""),
        ("second", 1, 3, b"b", ""),
    ]
    assert ranked.order == [2, 0, 1]
    assert isinstance(ranked.results, list)
    assert ranked.results_count() == len(ranked) == 3
    assert ranked[0] is ranked.top_k(1)[0]
    assert ranked.get_result_by_docid("second").rank == 3
    assert ranked.get_result_by_docid(0).page == "a.png"
    assert ranked.get_result_by_docid(7) is None
    assert ranked.get_score_by_docid(30) == 1
    assert ranked.get_score_by_docid(7) is None
    assert (ranked[2].text, ranked[2].metadata) == ("its text", {"year": 2024})
    assert ranked[2].document.doc_id == "second"
    assert not ranked.has_scores
    assert ranked.defects == ("duplicates", "missing_ids")


def test_top_k_limits_results_and_model_scores_are_used():
    ranked = build_results("q", PAGES, [1, 0, 2], scores=[0.7, 0.2, 0.1], top_k=2)
    assert [(result.page, result.score) for result in ranked] == [(b"b", 0.7), ("a.png", 0.2)]
    assert ranked.has_scores
    assert ranked.defects == ()


def test_a_document_shows_its_file():
    assert [str(document) for document in PAGES] == ["a.png", "page second", "c.png"]
    assert PAGES[0].image_path == "a.png"
    assert Document(Path("x/a.png")).image_path == "x/a.png"
    assert PAGES[0].base64 is None
    assert PAGES[1].image_path is None
    assert PAGES[1].base64 == "Yg=="
