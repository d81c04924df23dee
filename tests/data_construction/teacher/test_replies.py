from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_construction.teacher.replies import (
    DOES_NOT_HELP,
    HELPS,
    PageNote,
    read_line,
    read_note,
    read_verdict_line,
    reply_text,
)
from data_construction.teacher.store import Answer
from mmr5_train.ranking.notes import read_verdict


@pytest.mark.parametrize(
    ("reply", "text", "helps"),
    [
        ("A bar chart of the sum.\nVerdict: helps", "A bar chart of the sum", True),
        ("A map.\n\nVerdict: does not help\n", "A map", False),
        ("Two lines\nof text!\r\nVerdict: helps", "Two lines of text", True),
        ("A map.\n**Verdict:** Does not help.", "A map", False),
        ("A map.\n- `Verdict: helps`", "A map", True),
        ("A map.\nVerdict：helps", "A map", True),
        ("图表显示收入。\nVerdict: helps", "图表显示收入", True),
        # The note may close with the same verdict; nothing else in it matters.
        ("A map, so it helps.\nVerdict: helps", "A map", True),
        ("A map, so it does not help\nVerdict: does not help", "A map", False),
        ("Item no. 7, which is relevant to the question.\nVerdict: does not help",
         "Item no. 7, which is relevant to the question", False),
    ],
)  # fmt: skip
def test_verdict_is_read_from_the_last_line(reply: str, text: str, helps: bool):
    assert read_note(reply, 40) == (PageNote(text, helps), "")
    assert read_verdict(str(PageNote(text, helps))) is helps


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("It answers the question.", "no_verdict"),
        ("I'm sorry, I can't help with that.", "no_verdict"),
        ("It answers the question, so it helps.", "no_verdict"),
        ("It answers the question. Verdict: helps", "no_verdict"),
        ("Verdict: helps\nIt answers the question.", "no_verdict"),
        ("A map.\nVerdict: helps a little", "no_verdict"),
        ("A map.\nVerdict: helpful", "no_verdict"),
        ("A map.\nVerdict: helps\nVerdict: does not help", "two_verdicts"),
        ("Verdict: helps\nA map.\nVerdict: helps", "two_verdicts"),
        ("A map, so it helps.\nVerdict: does not help", "two_verdicts"),
        ("A map, so it helps. The year is missing.\nVerdict: does not help", "two_verdicts"),
        ("A map, so it helps. It is large.\nVerdict: helps", "two_verdicts"),
        ("Verdict: helps", "empty"),
        ("...\nVerdict: helps", "empty"),
        (", so it helps.\nVerdict: helps", "empty"),
        ("so " * 41 + "\nVerdict: helps", "too_long"),
        ("so " * 41, "too_long"),
    ],
)
def test_reply_without_exactly_one_verdict_is_unusable(reply: str, problem: str):
    assert read_note(reply, 40) == (None, problem)


def test_verdict_does_not_count_as_words():
    note, problem = read_note("so " * 40 + "\nVerdict: does not help", 40)
    assert (len(note.text.split()) if note else 0, problem) == (40, "")


@given(st.text(), st.booleans())
def test_a_usable_reply_gives_the_stated_verdict(text: str, helps: bool):
    note, problem = read_note(f"{text}\n{HELPS if helps else DOES_NOT_HELP}", 1000)
    assert (note is None) == bool(problem)
    if note:
        assert note.helps is helps
        assert read_verdict(str(note)) is helps


def test_other_lines_are_not_verdicts():
    for line in (
        "",
        ":",
        "Verdict",
        "Verdict: ",
        "helps",
        "Verdict helps",
        "The verdict: helps",
        "Verdict: helps: no",
    ):
        assert read_verdict_line(line) is None


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        (" a\nb ", "stop", ("a\nb", "")),
        ("<think>Verdict: helps</think>\nA map.\nVerdict: helps", "stop", ("A map.\nVerdict: helps", "")),
        ("<think>never ends", "stop", ("", "empty")),
        (" \n", "stop", ("", "empty")),
        ("A map.\nVerdict: helps", "length", ("", "cut_off")),
        ("I can't.", "refusal", ("", "refused")),
    ],
)
def test_reply_text_leaves_out_the_think_block(text: str, finish: str, expected: tuple[str, str]):
    assert reply_text(Answer(text, finish, 1, 1)) == expected


def test_reply_on_one_line_has_a_word_limit():
    assert read_line("a\n b", 2) == ("a b", "")
    assert read_line("a b c", 2) == (None, "too_long")
