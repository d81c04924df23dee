import pytest

from mmr5_train.common.files import InputError
from mmr5_train.evaluation.metrics import Interval
from mmr5_train.evaluation.paper_table import Measured, markdown, measured_rows, paper_table
from mmr5_train.evaluation.published import FIGURES, PUBLISHED


def results(**systems):
    """results.json by micro recall@1; recall@3 is 0.1 higher, recall@5 0.2 higher, macro values 0.01 higher."""

    def means(value):
        figures = {f"recall@{k}": value + offset for k, offset in ((1, 0.0), (3, 0.1), (5, 0.2))}
        return figures | {"intervals": {m: {"low": v - 0.02, "high": v + 0.03} for m, v in figures.items()}}

    rows = [
        {"system": name, "questions": 100, **means(value), "macro": means(value + 0.01)}
        for name, value in {"first_stage": 0.6, **systems}.items()
    ]
    return {"rows": rows}


def rows_by_name(blocks):
    return {row.name: row for block in blocks for row in block}


def test_table_contains_all_published_rows():
    blocks = paper_table([])
    assert [row.name for block in blocks for row in block] == list(PUBLISHED)
    assert [len(block) for block in blocks] == [2, 2, 2, 2, 11]
    assert not any(row.measured for block in blocks for row in block)


def test_measured_rows_join_their_published_row_or_the_end_of_the_block():
    evaluations = {
        "ColQwen": results(sft=0.65, grpo=0.7, other=0.5),
        "DSE": results(sft=0.5),
        "BM25": results(sft=0.4),
    }
    measured = measured_rows(evaluations, {"sft": "SFT only", "grpo": "MM-R5"})
    assert {row.name: row.published for row in measured} == {
        "ColQwen": "ColQwen",
        "ColQwen + sft": "ColQwen + SFT only",
        "ColQwen + grpo": "ColQwen + MM-R5",
        "ColQwen + other": None,
        "DSE": "DSE",
        "DSE + sft": None,  # the paper has no SFT-only row for DSE
        "BM25": None,
        "BM25 + sft": None,
    }
    blocks = paper_table(measured)
    rows = rows_by_name(blocks)
    assert [row.name for row in rows["ColQwen + MM-R5"].measured] == ["ColQwen + grpo"]
    assert [row.name for row in blocks[2]] == ["DSE", "DSE + MM-R5", "DSE + sft"]
    assert [row.name for row in blocks[-2]][-1] == "ColQwen + other"
    assert [(row.name, row.published) for row in blocks[-1]] == [("BM25", None), ("BM25 + sft", None)]
    assert sum(len(row.measured) for row in rows.values()) == len(measured) == 8


def test_difference_has_the_shifted_measured_interval():
    [_, row] = measured_rows({"ColQwen": results(grpo=0.7)}, {"grpo": "MM-R5"})
    assert list(row.figures) == list(FIGURES)
    assert row.figures["macro recall@3"].model_dump() == pytest.approx({"mean": 0.81, "low": 0.79, "high": 0.84})
    gap = row.differences["macro recall@3"]  # published 0.8520
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.81 - 0.852, 0.79 - 0.852, 0.84 - 0.852))
    assert row.differences["micro recall@1"].mean == pytest.approx(0.7 - 0.6759)


def test_two_systems_can_share_a_published_row():
    measured = measured_rows({"ColQwen": results(one=0.7, two=0.6)}, {"one": "MM-R5", "two": "MM-R5"})
    rows = rows_by_name(paper_table(measured))
    assert [row.name for row in rows["ColQwen + MM-R5"].measured] == ["ColQwen + one", "ColQwen + two"]


def test_unknown_system_or_reranker_is_an_error():
    evaluations = {"ColQwen": results(sft=0.65)}
    with pytest.raises(InputError, match=r"rows\.grpo: no evaluation has a system of that name \(found: sft\)"):
        measured_rows(evaluations, {"grpo": "MM-R5"})
    with pytest.raises(InputError, match=r"rows\.first_stage: no evaluation has"):
        measured_rows(evaluations, {"first_stage": "MM-R5"})
    with pytest.raises(InputError, match=r"rows\.sft: no published row is called 'SFT' \(choices: MM-R5; RagVL; "):
        measured_rows(evaluations, {"sft": "SFT"})


def test_markdown_has_published_measured_and_difference_rows():
    measured = measured_rows({"ColQwen": results(grpo=0.7), "a|b": results()}, {"grpo": "MM-R5"})
    lines = markdown(paper_table(measured)).splitlines()
    assert lines[0] == "|  |  | questions | " + " | ".join(FIGURES) + " |"
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) == 1
    published = lines.index(
        "| ColQwen + MM-R5 | published | 1,658 | 0.6951 | 0.8520 | 0.8842 | 0.6759 | 0.8401 | 0.8755 |"
    )
    assert lines[published + 1].startswith(
        "| **ColQwen + grpo** | measured | 100 | 0.7100 [0.6900, 0.7400] | 0.8100 "
    )
    assert lines[published + 2].startswith(
        "|  | difference |  | +0.0149 [-0.0051, +0.0449] | -0.0420 [-0.0620, -0.0120]"
    )
    assert any(line.startswith("| **a\\|b** | measured | 100 |") for line in lines)
    assert "treated as exact" in lines[-1]


def test_row_without_published_counterpart_has_no_difference():
    figures = {figure: Interval(mean=0.5, low=0.4, high=0.6) for figure in FIGURES}
    assert Measured("BM25", "BM25", None, 10, figures).differences == {}
