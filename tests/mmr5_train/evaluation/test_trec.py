"""TREC files: ids decode exactly, and other tools compute the same figures from the files."""

from __future__ import annotations

import random
from pathlib import Path

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, R, nDCG

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.metrics import KS, question_table
from mmr5_train.evaluation.trec import QRELS, docid, escape, read_run, run_lines, unescape, write_trec
from mmr5_train.ranking.records import Candidate, LocalId, ModelAnswer, PageId, Ranking


def ranking(query_id: str, order: list[int], gold: list[PageId], doc: str = "doc", system: str = "sft") -> Ranking:
    """A ranking of pages 0, 1, … of `doc`, one for each id in `order`."""
    return Ranking(
        system=system,
        query_id=query_id,
        query="?",
        domain="x",
        shown=tuple(Candidate(doc_name=doc, page=i, image="i", score=-i) for i in range(len(order))),
        positives=tuple(gold),
        greedy=ModelAnswer(completion="", order=tuple(LocalId(i) for i in order)),
    )


def page(doc: str, number: int) -> PageId:
    return PageId(doc_name=doc, page=number)


def test_run_and_qrels_have_escaped_ids(tmp_path: Path) -> None:
    gold = [page("a 1#%.pdf", 1), page("größer", 30)]  # the second was missed by the first stage
    write_trec(tmp_path, {"sft+grpo": [ranking("a 1#%.pdf/0", [3, 1, 2], gold, "a 1#%.pdf")]})
    assert (tmp_path / "sft+grpo.run").read_text() == (
        "a%201#%25.pdf/0 Q0 a%201#%25.pdf#2 1 3 sft+grpo\n"
        "a%201#%25.pdf/0 Q0 a%201#%25.pdf#0 2 2 sft+grpo\n"
        "a%201#%25.pdf/0 Q0 a%201#%25.pdf#1 3 1 sft+grpo\n"
    )
    assert (tmp_path / QRELS).read_text() == (
        "a%201#%25.pdf/0 0 a%201#%25.pdf#1 1\na%201#%25.pdf/0 0 gr%C3%B6%C3%9Fer#30 1\n"
    )


def test_metrics_equal_ir_measures_on_the_files(tmp_path: Path) -> None:
    """ir_measures takes recall and nDCG from trec_eval, which has its own rule for ties."""
    rng = random.Random(3)
    rankings = []
    for number in range(120):
        order = rng.sample(range(1, 13), 12)
        doc = rng.choice(["plain.pdf", "mit Leerzeichen #3.pdf", "数据"])
        gold = [page(doc, p) for p in rng.sample(range(20), rng.randint(1, 6))]  # pages from 12 are not candidates
        rankings.append(ranking(f"{doc}/{number}", order, gold, doc))
    write_trec(tmp_path, {"sft": rankings})
    measures = {f"recall@{k}": R @ k for k in KS} | {f"ndcg@{k}": nDCG @ k for k in KS} | {"mrr": RR}
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / QRELS)))
    run = list(ir_measures.read_trec_run(str(tmp_path / "sft.run")))
    expected = {
        (m.query_id, m.measure): m.value for m in ir_measures.iter_calc(list(measures.values()), qrels, run)
    }
    ours = question_table(rankings)
    assert len(expected) == len(measures) * len(rankings)
    for name, measure in measures.items():
        for query_id, value in zip(ours.query_ids, ours.metrics[name], strict=True):
            assert expected[escape(query_id), measure] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("order", "gold", "recalls"),
    [
        ([2, 1, 3, 4, 5, 6], [1], [1, 1, 1]),
        ([1, 2, 3, 4, 5, 6], [3], [0, 0, 1]),  # fourth
        ([1, 2, 3, 4, 5, 6], [0, 2, 5, 40], [1 / 4, 2 / 4, 2 / 4]),  # page 5 is sixth, page 40 is not a candidate
        ([6, 5, 4, 3, 2, 1], [5, 5, 4], [1 / 2, 1, 1]),  # a duplicate label counts once
    ],
)
def test_recall_equals_the_definition_of_mmdocir(
    tmp_path: Path, order: list[int], gold: list[int], recalls: list[float]
) -> None:
    """Gold pages among the first k ÷ all gold pages (MMDocIR, section 5), computed from the files."""
    write_trec(tmp_path, {"sft": [ranking("q", order, [page("doc", p) for p in gold])]})
    relevant = [line.split()[2] for line in (tmp_path / QRELS).read_text().splitlines()]
    ranked = [docid(p) for p in read_run(tmp_path / "sft.run")["q"]]
    assert [sum(d in relevant for d in ranked[:k]) / len(relevant) for k in (1, 3, 5)] == pytest.approx(recalls)
    table = question_table([ranking("q", order, [page("doc", p) for p in gold])])
    assert [table.metrics[f"recall@{k}"][0] for k in (1, 3, 5)] == pytest.approx(recalls)


# Includes line and paragraph separators, no-break spaces, escapes, and text that looks like a docid.
names = st.one_of(st.text(min_size=1), st.text("# %2089\t\n\r\x1c\x85\xa0\u2028é", min_size=1))


@given(names)
def test_escaped_id_is_one_field_and_decodes(name: str) -> None:
    field = escape(name)
    assert field.split() == [field]
    assert field.isascii()
    assert field.isprintable()
    assert unescape(field) == name


@given(names, st.integers(0, 10**6), names)
def test_pages_round_trip_through_a_run(
    tmp_path_factory: pytest.TempPathFactory, name: str, number: int, query: str
) -> None:
    path = tmp_path_factory.mktemp("run") / "s.run"
    path.write_text(f"{escape(query)} Q0 {docid(page(name, number))} 1 1 s\n")
    assert read_run(path) == {query: (page(name, number),)}


def test_orders_round_trip_through_a_run(tmp_path: Path) -> None:
    rankings = [ranking("a b/0", [2, 3, 1], [page("a b", 0)], "a b"), ranking("c/0", [1, 2], [page("c", 1)], "c")]
    write_trec(tmp_path, {"sft": rankings})
    assert read_run(tmp_path / "sft.run") == {r.query_id: r.ranked_pages(r.greedy) for r in rankings}


def test_run_is_sorted_by_score_and_ties_keep_file_order(tmp_path: Path) -> None:
    lines = ["q Q0 d#1 1 0.5 x", "", "q Q0 d#2 2 7 x", "q Q0 d#0 3 0.5 x", "r Q0 e#0 1 -1 x"]
    (tmp_path / "s.run").write_text("\n".join(lines))
    assert read_run(tmp_path / "s.run") == {"q": (page("d", 2), page("d", 1), page("d", 0)), "r": (page("e", 0),)}


def test_percent_sign_without_escape_is_literal(tmp_path: Path) -> None:
    (tmp_path / "s.run").write_text("q Q0 50%.pdf#1 1 2 x\n")
    assert [line.doc_name for _, line in run_lines(tmp_path / "s.run")] == ["50%.pdf"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d#1 1 2.0", "expected `qid Q0 docid rank score tag`, found 5 fields; .* or %20 for a space"),
        ("q Q0 d#x 1 2 t", "docid must be <doc_name>#<page>, found 'd#x'"),
        ("q Q0 d%FF#1 1 2 t", "not UTF-8; write a percent sign as %25"),
        ("q Q0 #1 1 2 t", "field doc_name"),
        ("q Q0 d#1 1 nan t", "field score"),
        ("q Q0 d#0 1 2 t", "q lists page d#0 twice"),
    ],
)
def test_malformed_line_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "s.run").write_text(f"q Q0 d#0 1 2 t\n{line}\n")
    with pytest.raises(InputError, match=f"s.run, line 2: .*{message}"):
        read_run(tmp_path / "s.run")


def test_different_questions_are_an_error(tmp_path: Path) -> None:
    systems = {"a": [ranking("q", [1], [page("doc", 0)])], "b": [ranking("r", [1], [page("doc", 0)])]}
    with pytest.raises(InputError, match="not of the same questions"):
        write_trec(tmp_path, systems)
    assert not list(tmp_path.iterdir())
