"""Notes are written, read back, and their verdicts told."""

import pytest

from mmr5_train.ranking.notes import format_note, join_notes, read_verdict, split_notes, states_description


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
def test_the_verdict_of_a_note(note: str, helps: bool | None):
    assert read_verdict(note) is helps


def test_notes_are_read_back():
    notes = [format_note("a red bar chart", True), format_note("a map", False)]
    assert split_notes(join_notes(notes)) == {1: notes[0], 2: notes[1]}
    assert states_description(notes[0], "a red bar chart")
    assert not states_description(notes[0], "a red bar")
    assert split_notes("Image 1: first\nand so on\nImage 1: again\n Image 3: third ") == {1: "first", 3: "third"}


def test_a_long_note_takes_no_time():
    assert read_verdict("not " + " " * 200_000 + "no " * 50_000) is None
