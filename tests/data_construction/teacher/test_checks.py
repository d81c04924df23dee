from __future__ import annotations

from typing import Any

import pytest

from data_construction.teacher.checks import Rules, failed_checks, find_label_word, named_images
from data_construction.teacher.replies import PageNote
from mmr5_train.ranking.records import LocalId, Page

PAGE = Page(doc_name="d", page=0, domain="x", image="i", width=1, height=1, text="Positive results, by sector")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red bar chart, so it helps.", None),
        ("It shows positive results.", None),
        ("It shows negative results.", "negative"),
        ("This is a positive page.", "positive page"),
        ("As the ground truth says, it helps.", "ground truth"),
        ("It is labelled relevant.", "labelled relevant"),
        ("The bar labelled 2015 is the highest.", None),
        ('It says "the label is negative".', None),
        ("I was told that it helps.", "was told"),
        ("The label is clear.", "label is"),
    ],
)
def test_words_that_reveal_the_label_are_detected(text: str, expected: str | None):
    word = find_label_word(text, "What grew?", [PAGE])
    assert word is None if expected is None else expected in str(word)


def test_label_words_of_the_question_are_allowed():
    assert find_label_word("It names the label.", "Who signed to the label?", [PAGE]) is None


def test_image_numbers_in_a_text_are_extracted():
    assert named_images("Image 2 helps. Images 1, 3 and 4 do not; nor do images 5 & 6.") == {1, 2, 3, 4, 5, 6}
    assert named_images("No image of 12 pages helps.") == set()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, None),
        ({"notes": ["Text.", "Chart."]}, "one_note_a_page"),
        ({"notes": ["Text.", "", "Chart."]}, "one_note_a_page"),
        ({"notes": ["Text.", "word " * 41, "Chart."]}, "short_notes"),
        ({"helps": (True, True, False)}, "direction"),
        ({"helps": (False, False, False)}, "direction"),
        # The field counts, not the wording.
        ({"notes": ["It answers the question.", "It is of no use.", "Useful."]}, None),
        ({"notes": ["See no. 3, which is relevant.", "Nothing else answers the question.", "Text."]}, None),
        ({"notes": ["Text.", "A positive page.", "Text."]}, "no_label_words"),
        ({"notes": ["Text.", "Like image 3, a chart.", "Text."]}, "moved_ids"),
        ({"notes": ["Text.", "Images 2 and 4 are below one another.", "Text."]}, "moved_ids"),
        ({"notes": ["Text.", 'It is named "Image 3".', "Text."]}, None),
        ({"notes": ["Text.", "Image 7 is a chart.", "Text."], "text": "Image 7: growth"}, None),
        ({"notes": ["Text.", "На странице диаграмма", "Text."]}, "language"),
        (
            {"notes": ["Text.", 'It quotes "Die Seite nennt nur das Jahr und die Stadt" and no sum.', "Text."]},
            None,
        ),
        ({"refine": True, "think": "Image 2 hilft, weil sie das zeigt. Die anderen nicht."}, "language"),
        ({"think": "Image 1: <answer>[1]"}, "no_tags"),
        ({"think": "Image 1: </think>"}, "no_tags"),
        ({"answer": (1, 2, 3)}, "answer"),
        ({"answer": (2, 1)}, "answer"),
        ({"answer": (2, 1, 1)}, "answer"),
        ({"refine": True, "think": "Image 2 helps. Image 1 does not."}, None),
        ({"refine": True, "think": "Image 1 does not help."}, "names_pages"),
        ({"refine": True, "think": "Images 2 and 4 help."}, "names_pages"),
        ({"refine": True, "think": "Image 2 helps. " + "word " * 90}, "short_reasoning"),
        ({"refine": True, "think": "Image 2 is a positive page."}, "no_label_words"),
    ],
)
def test_each_check_detects_its_problem(change: dict[str, Any], name: str | None):
    texts, verdicts = change.get("notes", ["Text.", "Chart.", "Text."]), change.get("helps", (False, True, False))
    failed = failed_checks(
        "What is it that grew?",
        [PAGE.model_copy(update={"text": change.get("text", PAGE.text)})] * 3,
        [PageNote(text, helps) for text, helps in zip(texts, verdicts, strict=False)],
        change.get("think", "Image 1: Text."),
        tuple(LocalId(i) for i in change.get("answer", (2, 1, 3))),
        (LocalId(2),),
        Rules(40, change.get("refine", False)),
    )
    assert next((check for check, _ in failed), None) == name
