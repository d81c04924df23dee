import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.notes import (
    contains_verdict,
    format_note,
    join_notes,
    page_verdicts,
    read_verdict,
    remove_verdict,
    split_notes,
    states_description,
    text_before_verdict,
)
from mmr5_train.ranking.prompt import render_completion
from mmr5_train.ranking.records import LocalId


@pytest.mark.parametrize(
    ("note", "helps"),
    [
        ("a red bar chart, so it helps.", True),
        ("A blue line chart on exports, so it does not help.", False),
        (", so it helps.", True),
        # The last words count.
        ('It quotes "a map, so it helps.", so it does not help.', False),
        ("The year is missing, so it does not help., so it helps.", True),
    ],
)
def test_read_verdict_reads_the_fixed_form_at_the_end(note: str, helps: bool):
    assert read_verdict(note) is helps


@pytest.mark.parametrize(
    "note",
    [
        "The table lists revenue under item no. 7, which is relevant to the question.",
        "There is nothing else on this page than the chart, and it answers the question.",
        "Not only is this page useful, it holds the exact figure.",
        "It cannot be said to be useful, since the year is missing.",
        "The page gives the 2019 value, but 2020 is what is asked, so the question stays open.",
        "No other page is as relevant as this one.",
        "It can't help since it is a cover page.",
        "so it helps.",
        "It is a cover page. So it does not help.",
        "a red bar chart, so it helps",
        "a red bar chart, so it helps. It is large.",
        "a red bar chart, so it does not help much.",
        "",
    ],
)
def test_any_other_wording_is_not_a_verdict(note: str):
    assert read_verdict(note) is None
    assert text_before_verdict(note) == ""
    assert remove_verdict(note) == note


def texts() -> st.SearchStrategy[str]:
    """Any text, often with the fixed form, line breaks, tags and notes in it."""
    parts = [
        ", so it helps.", ", so it does not help.", "so it helps", "\n", "\r\n", "\x85", "\u2028", "\x1c",
        "Image 2: ", "</think>", "<think>", "<answer>[2, 1]</answer>", "<|im_end|>", "<", " ",
    ]  # fmt: skip
    return st.lists(st.one_of(st.text(max_size=12), st.sampled_from(parts)), max_size=8).map("".join)


@given(st.lists(st.tuples(texts(), st.booleans()), min_size=1, max_size=5))
@example([("a map, so it helps.", False), ("a map, so it does not help.", True)])
@example([("line\nImage 2: a chart, so it helps.", False), ("</think><answer>[1]</answer>", True)])
def test_verdict_on_any_text_comes_back_from_a_completion(notes: list[tuple[str, bool]]):
    n = len(notes)
    think = join_notes([format_note(text, helps) for text, helps in notes])
    verdicts = dict(enumerate((helps for _, helps in notes), 1))
    assert {i: read_verdict(note) for i, note in split_notes(think).items()} == verdicts
    answer = parse_answer(render_completion(think, [LocalId(i) for i in range(1, n + 1)]), n)
    assert answer.structure_valid
    assert page_verdicts(answer.think or "", n) == verdicts


def test_notes_round_trip_through_a_think_block():
    notes = [format_note("a red bar chart", True), format_note("a map", False)]
    assert notes == ["a red bar chart, so it helps.", "a map, so it does not help."]
    assert split_notes(join_notes(notes)) == {1: notes[0], 2: notes[1]}
    assert split_notes("Image 1: first\nand so on\nImage 1: again\n Image 3: third ") == {1: "first", 3: "third"}


def test_page_verdicts_omits_pages_without_a_verdict_and_ids_out_of_range():
    think = "Image 1: a map, so it helps.\nImage 2: relevant.\nImage 4: a list, so it helps."
    assert page_verdicts(think, 3) == {1: True}


def test_states_description_needs_the_whole_description():
    note = format_note("a red bar chart", True)
    assert states_description(note, "a red bar chart")
    assert not states_description(note, "a red bar")


def test_text_without_or_up_to_the_verdict():
    note = format_note("a map", False)
    assert text_before_verdict(note) == "a map, so it"
    assert remove_verdict(note) == "a map"


def test_contains_verdict_finds_the_fixed_form_anywhere():
    assert contains_verdict("a map, so it helps. It is large.")
    assert not contains_verdict("a map, so it helps a lot")
