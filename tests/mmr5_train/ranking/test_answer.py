import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.ranking.answer import MAX_ENTRIES, Defect, complete_order, parse_answer, to_model_answer
from mmr5_train.ranking.prompt import render_completion

GOOD = "<think>Image 1: a red bar chart.</think><answer>[2, 1, 3]</answer>"


def defects(text, n=3, **options):
    return [str(defect) for defect in parse_answer(text, n, **options).defects]


def test_valid_completion_has_no_defects():
    answer = parse_answer(GOOD, 3)
    assert answer.think == "Image 1: a red bar chart."
    assert answer.ids == (2, 1, 3)
    assert answer.defects == ()
    assert answer.structure_valid
    assert answer.is_complete_permutation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["no_think", "no_answer"]),
        ("<answer>[2, 1, 3]</answer>", ["no_think"]),
        ("<think>t</think>", ["no_answer"]),
        ("<think>t</think><answer>[2, 1", ["no_answer"]),
        ("<think>t</think>[2, 1, 3]", ["no_answer"]),
        ("<think>t</think><answer>2, 1, 3</answer>", ["not_a_list"]),
        ("<think>t</think><answer>(2, 1, 3)</answer>", ["not_a_list"]),
        ("<think>t</think><answer>[</answer>", ["not_a_list"]),
        ("<think>t</think><answer></answer>", ["not_a_list"]),
        ("<think>t</think><answer>[2, one, 3]</answer>", ["not_integers"]),
        ("<think>t</think><answer>[2, 1.0, 3]</answer>", ["not_integers"]),
        ("<think>t</think><answer>[[2, 1, 3]]</answer>", ["not_integers"]),
        ("<think>t</think><answer>[2, 1, 3,]</answer>", ["not_integers"]),
        ("<think>t</think><answer>['2', '1', '3']</answer>", ["not_integers"]),
        ("<think>t</think><answer>[２, 1, 3]</answer>", ["not_integers"]),
        ("<think>t</think><answer>[__import__('os').system('false')]</answer>", ["not_integers"]),
        ("<think>t</think><answer>[]</answer>", ["empty"]),
        ("<think>t</think><answer>[ ]</answer>", ["empty"]),
        ("<think>t</think><answer>[2, 1, 3, 2]</answer>", ["duplicates"]),
        ("<think>t</think><answer>[2, 1, 3, 4]</answer>", ["out_of_range"]),
        ("<think>t</think><answer>[2, 1]</answer>", ["missing_ids"]),
        ("<think>t</think><answer>[0, -1, 2, 2]</answer>", ["duplicates", "out_of_range", "missing_ids"]),
    ],
)
def test_each_defect_is_detected(text, expected):
    assert defects(text) == expected


def test_cut_off_is_reported_last():
    assert defects("<think>t", cut_off=True) == ["no_think", "no_answer", "cut_off"]
    assert defects(GOOD, cut_off=True) == ["cut_off"]
    assert parse_answer(GOOD, 3, cut_off=True).is_complete_permutation


def test_ids_include_repeated_and_out_of_range_numbers():
    assert parse_answer("<think>t</think><answer>[ 7,7 , -2,+1,03]</answer>", 3).ids == (7, 7, -2, 1, 3)


def test_answer_inside_reasoning_is_ignored():
    draft = "<think>maybe <answer>[3, 2, 1]</answer>, no</think><answer>[1, 2, 3]</answer>"
    assert parse_answer(draft, 3).ids == (1, 2, 3)
    assert parse_answer(draft, 3).structure_valid
    assert defects("<think>maybe <answer>[3, 2, 1]</answer></think>") == ["no_answer"]
    assert defects("<think>never closed <answer>[3, 2, 1]</answer>") == ["no_think", "no_answer"]
    assert parse_answer(GOOD + "<think>or <answer>[1, 2, 3]</answer>", 3).ids == (2, 1, 3)


def test_last_closed_answer_counts_and_structure_is_invalid():
    for text in (
        GOOD + "<answer>[3, 2, 1]</answer>",
        GOOD + " No, wait: <answer>[3, 2, 1]</answer>",
        GOOD + "<answer>[3, 2, 1]</answer></answer>",
        GOOD + "<answer>[3, 2, 1]</answer> and <answer>[1, 2",
        GOOD + "<answer> <answer>[3, 2, 1]</answer>",
    ):
        answer = parse_answer(text, 3)
        assert answer.ids == (3, 2, 1)
        assert answer.is_complete_permutation
        assert not answer.structure_valid


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "<|im_end|>",
        GOOD + "\n<|im_end|>\n<|endoftext|><|endoftext|> ",
        "\n " + GOOD + "\n",
        GOOD.replace("</think>", "</think>\n\n"),
        GOOD.replace("[2, 1, 3]", " [ 2,1,\n3 ] "),
        GOOD.replace("Image", "[9] </answer> Image"),
        GOOD.replace("Image 1: a red bar chart.", ""),
        GOOD.replace("3]", "99, 99]"),
        GOOD.replace("2, 1, 3", ""),
    ],
)
def test_structure_is_valid(text):
    assert parse_answer(text, 3).structure_valid


@pytest.mark.parametrize(
    "text",
    [
        "Sure! " + GOOD,
        GOOD + " Done.",
        GOOD.replace("</think>", "</think>So: "),
        "<think>a</think>" + GOOD,
        GOOD + "<think>a</think>",
        GOOD + "<think>",
        GOOD.removeprefix("<think>"),
        GOOD.removesuffix("</answer>"),
        GOOD.replace("[2, 1, 3]", "2, 1, 3"),
        GOOD.replace("[2, 1, 3]", "[2, 1, 3] pages"),
        "<|im_end|>" + GOOD,
        "<answer>[2, 1, 3]</answer><think>after</think>",
        GOOD.upper(),
    ],
)
def test_structure_is_invalid(text):
    assert not parse_answer(text, 3).structure_valid


def test_without_expected_think_block_only_the_answer_block_is_valid():
    plain = parse_answer("<answer>[2, 1, 3]</answer>\n", 3, expect_think=False)
    assert plain.defects == ()
    assert plain.think is None
    assert plain.structure_valid
    with_think = parse_answer(GOOD, 3, expect_think=False)
    assert with_think.ids == (2, 1, 3)
    assert with_think.defects == ()
    assert not with_think.structure_valid


def test_prompt_without_pages_raises_value_error():
    with pytest.raises(ValueError, match="at least one page"):
        parse_answer(GOOD, 0)


def test_complete_order_appends_missing_ids():
    assert complete_order([], 4) == (1, 2, 3, 4)
    assert complete_order([3, 3, 9, 0, -1, 1, 3], 4) == (3, 1, 2, 4)
    assert complete_order([4, 3, 2, 1], 4) == (4, 3, 2, 1)


@given(st.lists(st.integers(-3, 12)), st.integers(1, 9))
def test_complete_order_is_a_permutation_that_starts_with_the_valid_ids(ids, n):
    order = complete_order(ids, n)
    assert sorted(order) == list(range(1, n + 1))
    valid_ids = list(dict.fromkeys(i for i in ids if 1 <= i <= n))
    assert list(order[: len(valid_ids)]) == valid_ids
    rest = list(order[len(valid_ids) :])
    assert rest == sorted(rest)


@given(st.data(), st.integers(1, 12), st.booleans())
def test_rendered_completions_parse_without_loss(data, n, thinks):
    order = data.draw(st.permutations(range(1, n + 1)))
    think = data.draw(st.text("ab <>/[1,2]é\n")) if thinks else None
    answer = parse_answer(render_completion(think, order), n, expect_think=thinks)
    assert answer.ids == tuple(order)
    assert answer.think == think
    assert answer.structure_valid
    assert answer.is_complete_permutation


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "[",
    "]",
    ",",
    "1",
    "2",
    "30",
    " ",
    "\n",
    "a",
    "<|im_end|>",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.integers(1, 5), st.booleans())
def test_any_text_gives_a_consistent_result(text, n, expect_think):
    answer = parse_answer(text, n, expect_think=expect_think)
    assert list(answer.defects) == [defect for defect in Defect if defect in answer.defects]
    assert answer.is_complete_permutation == (sorted(answer.ids) == list(range(1, n + 1)))
    if answer.structure_valid:
        assert set(answer.defects) <= {"empty", "duplicates", "out_of_range", "missing_ids"}
        listed = text.replace(" ", "").replace("\n", "").replace("<|im_end|>", "")
        assert listed.endswith(f"[{','.join(map(str, answer.ids))}]</answer>")
    assert sorted(complete_order(answer.ids, n)) == list(range(1, n + 1))


MEGA = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * (MEGA // 7),
        "<think></think>" * (MEGA // 15),
        "<answer>" * (MEGA // 8),
        "</answer>" * (MEGA // 9),
        "<answer>[1]</answer>" * (MEGA // 20),
        "<answer>" + "</think>" * (MEGA // 8) + "</answer>",
        "<think>t</think><answer>[" + "1," * (MEGA // 2) + "1]</answer>",
        "<think>t</think><answer>[" + "1" * MEGA + "]</answer>",
        "<think>t</think><answer>[" + "-" * MEGA + "]</answer>",
        "<think>t</think><answer>" + "[" * MEGA + "]</answer>",
        "<think>t</think><answer>[" + " " * MEGA + "]</answer>",
        "<think>t</think><answer>[1]</answer>" + "<|im_end|> " * (MEGA // 11),
        " " * MEGA + GOOD + "\n" * MEGA,
    ],
    ids=range(13),
)
def test_parsing_a_megabyte_takes_under_a_second(text):
    start = time.process_time()
    answer = parse_answer(text, 3)
    assert time.process_time() - start < 1
    assert len(answer.ids) <= MAX_ENTRIES


def test_long_lists_and_long_numbers_are_rejected():
    def listed(count):
        return f"<think>t</think><answer>[{', '.join(['1'] * count)}]</answer>"

    assert len(parse_answer(listed(MAX_ENTRIES), 3).ids) == MAX_ENTRIES
    assert defects(listed(MAX_ENTRIES + 1)) == ["not_a_list"]
    assert defects(f"<think>t</think><answer>[1, 2, 3, {'9' * 18}]</answer>") == ["out_of_range"]
    assert defects(f"<think>t</think><answer>[1, 2, 3, {'9' * 19}]</answer>") == ["not_integers"]


def test_to_model_answer_completes_the_order_and_records_defects():
    record = to_model_answer("<think>t</think><answer>[3, 3]</answer>", 3, counts={"tokens": 12}, cut_off=True)
    assert record.order == (3, 1, 2)
    assert record.defects == ("duplicates", "missing_ids", "cut_off")
    assert all(type(defect) is str for defect in record.defects)
    assert record.tokens == 12
    assert to_model_answer("[2, 1, 3]", 3, expect_think=False).order == (1, 2, 3)
