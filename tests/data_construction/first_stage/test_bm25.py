from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_construction.corpus.documents import Document
from data_construction.first_stage.bm25 import rank_by_bm25
from data_construction.first_stage.words import languages_of, normalize, split_unspaced, stop_words
from mmr5_train.ranking.records import Page, PageId, Question

ROOT = Path(__file__).resolve().parents[3]


def document(texts: list[str], *queries: str) -> Document:
    """A document with these page texts and questions."""
    pages = tuple(
        Page(doc_name="a.pdf", page=i, domain="d", image=f"{i}.jpg", width=1, height=1, text=text)
        for i, text in enumerate(texts)
    )
    positives = (PageId(doc_name="a.pdf", page=0),)
    questions = tuple(
        Question(query_id=f"a.pdf/{k}", query=query, doc_name="a.pdf", domain="d", positives=positives)
        for k, query in enumerate(queries)
    )
    return Document("a.pdf", "d", len(texts), "hash", pages, questions)


def bm25_order(texts: list[str], query: str) -> list[int]:
    (ranked,) = rank_by_bm25(document(texts, query))
    return [page.page for page, _ in ranked]


def test_bm25_ranks_by_matching_words() -> None:
    texts = ["solar capacity rose", "water use fell", "solar capacity and solar panels", "nothing else"]
    assert bm25_order(texts, "Where are the solar panels?")[:2] == [2, 0]
    (ranked,) = rank_by_bm25(document(texts, "solar panels"))
    scores = [score for _, score in ranked]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[1] > 0 == scores[2]


CHINESE = ["公司概况和历史。", "二〇一九年营业收入增长了百分之八。", "员工人数和培训计划", "环境保护与用水量"]
JAPANESE = [
    "会社の沿革について",
    "売上高は前年比で八%増加した。",
    "従業員の研修制度",
    "水の使用量と環境への取り組み",
]


@pytest.mark.parametrize(
    ("texts", "query", "gold"),
    [
        (CHINESE, "哪一页说明营业收入?", 1),
        (CHINESE, "用水量是多少?", 3),
        (JAPANESE, "売上高はどのページにありますか。", 1),
        (JAPANESE, "従業員の研修はどこに書かれていますか。", 2),
        (["회사의 역사", "매출액이 증가했다", "직원 교육"], "매출액은 어디에 있습니까?", 1),
        (["water use", "ｶﾀｶﾅ", "land"], "カタカナ", 1),  # of half width
        (["ประวัติบริษัท", "รายได้เพิ่มขึ้น", "พนักงาน"], "รายได้อยู่หน้าไหน", 1),
    ],
)
def test_words_without_spaces_between_them_are_found(texts: list[str], query: str, gold: int) -> None:
    (ranked,) = rank_by_bm25(document(texts, query))
    assert ranked[0][0].page == gold
    assert ranked[0][1] > ranked[1][1]


@pytest.mark.parametrize(
    ("texts", "query", "gold"),
    [
        (["the ﬁgures of ﬂow", "other figs", "third"], "FIGURES of flow?", 0),  # ligatures, as PDFs have them
        (["история", "новый самолёт", "люди"], "Где самолет?", 1),
        (["تاريخ الشركة", "زِيَادَة الإيرادات", "الموظفون"], "اين زيادة الايرادات", 1),
        (["कंपनी का इतिहास", "बिक्री में वृद्धि", "कर्मचारी"], "बिक्री कहाँ है?", 1),
        (["STRASSE und Haus", "die Straße", "der Wald"], "strasse", 1),
    ],
)
def test_forms_of_the_same_letter_match(texts: list[str], query: str, gold: int) -> None:
    (ranked,) = rank_by_bm25(document(texts, query))
    assert ranked[0][0].page == gold
    assert ranked[0][1] > 0


def test_stop_words_are_those_of_the_texts_languages() -> None:
    german = ["Die Einnahmen der Gesellschaft sind im letzten Jahr um acht Prozent gestiegen." for _ in range(5)]
    english = ["The revenue of the company has increased by eight percent in the last year." for _ in range(5)]
    assert languages_of(german) == ["en", "de"]
    assert languages_of(english) == languages_of(["", " "]) == languages_of([]) == ["en"]
    assert languages_of(english + german) == ["en", "de"]
    assert {"the", "die", "für"} <= set(stop_words(("en", "de")))
    assert "die" not in stop_words(("en",))
    (ranked,) = rank_by_bm25(document([*german, "Es gibt Wald"], "Wo ist der Wald?"))
    assert [score > 0 for _, score in ranked] == [True, *[False] * 5], "only Wald counts"


def test_normalize_changes_letters_only() -> None:
    assert normalize("Where are the 17 % Panels?") == "where are the 17 % panels?"


def test_texts_in_other_scripts_are_not_changed() -> None:
    for text in ("Where are the solar panels?", "ﬁgures of naïve Öl", "где вода", ""):
        assert split_unspaced(text) == text
    assert split_unspaced("2019年の売上").split() == ["2019", "年の", "の売", "売上"]
    assert split_unspaced("第").split() == ["第第"]


def test_each_question_has_its_own_ranking() -> None:
    first, second = rank_by_bm25(document(["apples", "pears"], "apples", "pears"))
    assert [page.page for page, _ in first] == [0, 1]
    assert [page.page for page, _ in second] == [1, 0]


def test_pages_without_text_come_last_in_page_order() -> None:
    assert bm25_order(["", "other words", " \n", "solar", "more words"], "solar") == [3, 1, 4, 0, 2]


def test_document_without_text_stays_in_page_order() -> None:
    assert bm25_order(["", " ", "", "\n"], "solar") == [0, 1, 2, 3]
    assert bm25_order(["a", "the of", "! ?"], "solar") == [0, 1, 2]  # text without a word to search


@pytest.mark.parametrize("query", ["the of and", "?!", "words unknown here"])
def test_question_without_match_keeps_page_order(query: str) -> None:
    assert bm25_order(["one page", "", "another page"], query) == [0, 2, 1]


def test_document_without_pages_or_questions_has_no_ranked_pages() -> None:
    assert rank_by_bm25(document([], "solar")) == [[]]
    assert rank_by_bm25(document(["solar"])) == []


@given(
    st.lists(st.text(alphabet="ab c", max_size=12), min_size=1, max_size=8), st.text(alphabet="ab c", max_size=8)
)
def test_every_page_is_ranked_once(texts: list[str], query: str) -> None:
    assert sorted(bm25_order(texts, query or "q")) == list(range(len(texts)))


def test_bm25s_is_imported_without_jax(tmp_path):
    """JAX reserves 75 % of the GPU's memory when bm25s calls it at import. Later imports of JAX succeed."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("")
    (tmp_path / "jax/lax.py").write_text("print('jax used')\ntop_k = lambda scores, k: None\n")
    code = "{}import data_construction.first_stage.bm25, sys; print('jax.lax' in sys.modules); import jax.lax"
    for jax_first, printed in (("", "False\njax used\n"), ("import jax; jax.x = 1; ", "False\njax used\n")):
        process = subprocess.run(
            [sys.executable, "-c", code.format(jax_first) + (jax_first and "; assert jax.x == 1")],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert process.stdout == printed
