import pytest

from mmr5_train.ranking.notes import (
    format_note,
    join_notes,
    read_verdict,
    split_notes,
    states_description,
    text_before_verdict,
)


@pytest.mark.parametrize(
    ("note", "helps"),
    [
        ("a red bar chart, so it helps.", True),
        ("a red bar chart, so it does not help.", False),
        ("The table lists the revenue, which directly answers the question.", True),
        ("The page is relevant because it states the year.", True),
        ("It shows a map and does not answer the question.", False),
        ("It doesn’t contain anything useful about revenue.", False),
        ("It can't help since it is a cover page.", False),
        ("The page is about birds and irrelevant here.", False),
        ('It says "this does not help", which answers the question.', True),
        ("It shows a map.", None),
        ("It helps with names but does not answer the question.", None),
    ],
)
def test_read_verdict_recognizes_helpful_unhelpful_and_unclear_notes(note: str, helps: bool | None):
    assert read_verdict(note) is helps


def test_notes_round_trip_through_a_think_block():
    notes = [format_note("a red bar chart", True), format_note("a map", False)]
    assert split_notes(join_notes(notes)) == {1: notes[0], 2: notes[1]}
    assert split_notes("Image 1: first\nand so on\nImage 1: again\n Image 3: third ") == {1: "first", 3: "third"}


def test_states_description_needs_the_whole_description():
    note = format_note("a red bar chart", True)
    assert states_description(note, "a red bar chart")
    assert not states_description(note, "a red bar")


def test_text_before_verdict_is_empty_for_free_wording():
    assert text_before_verdict(format_note("a map", False)) == "a map, so it"
    assert text_before_verdict("a map, which is irrelevant.") == ""


def test_read_verdict_takes_linear_time():
    assert read_verdict("not " + " " * 200_000 + "no " * 50_000) is None
