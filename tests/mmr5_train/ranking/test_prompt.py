from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError

from mmr5_train.ranking.prompt import Prompt, build_messages, insert_images, neutralize, render_completion

CONFIGS = Path(__file__).parents[3] / "configs" / "prompt"


def prompt(**changes):
    fields = {
        "name": "t",
        "system": "Rank {n}.",
        "question": "Q of {n}: {query}\n",
        "image_label": "Page {i}/{n}: ",
    }
    return Prompt(**{**fields, **changes})


def text_of(messages):
    parts = (part for message in messages for part in message["content"])
    return "".join("<IMAGE>" if part["type"] == "image" else part["text"] for part in parts)


def test_question_comes_before_labelled_pages():
    messages = build_messages(prompt(), "how many?", 2)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert text_of(messages) == "Rank {n}.Q of 2: how many?\nPage 1/2: <IMAGE>Page 2/2: <IMAGE>"


def test_pages_can_come_first_and_without_labels():
    messages = build_messages(prompt(images_first=True, image_label=""), "how many?", 2)
    assert text_of(messages[1:]) == "<IMAGE><IMAGE>Q of 2: how many?\n"


def test_braces_in_a_question_are_not_filled_in():
    assert "{n} {i} {query} {x} %s {" in text_of(build_messages(prompt(), "{n} {i} {query} {x} %s {", 1))


def test_prompt_without_pages_raises_value_error():
    with pytest.raises(ValueError, match="at least one page"):
        build_messages(prompt(), "how many?", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "no place"}, "question\n.*must contain {query} exactly once"),
        ({"question": "{query} {query}"}, "exactly once"),
        ({"image_label": "Page: "}, "image_label\n.*must contain {i} exactly once, or be empty"),
        ({"sistem": "x"}, "sistem\n.*not permitted"),
    ],
)
def test_invalid_prompt_error_names_the_field(changes, message):
    with pytest.raises(ValidationError, match=message):
        prompt(**changes)


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "</think>",
        "<ANSWER>",
        "<image>",
        "<tool_call>",
    ],
)
def test_tags_in_a_question_are_neutralized(text):
    message_text = text_of(build_messages(prompt(), f"is a {text} b?", 1))
    assert text not in message_text
    assert text.replace("<", "‹") in message_text


def test_neutralize_leaves_ordinary_text_unchanged():
    for text in ("is 3 < 5?", "x <y> z", "a<b", "<thinking>", "<<>>", "‹think›"):
        assert neutralize(text) == text


@given(st.text("<|/>thinkanswer_im _"))
def test_neutralize_is_idempotent_and_keeps_the_length(text):
    clean = neutralize(text)
    assert neutralize(clean) == clean
    assert "<|" not in clean
    assert "<think>" not in clean
    assert len(clean) == len(text)


def test_insert_images_fills_placeholders_in_order():
    messages = build_messages(prompt(), "how many?", 2)
    parts = [{"type": "image", "image": name} for name in ("a.png", "b.png")]
    filled = insert_images(messages, parts)
    assert [part["image"] for part in filled[1]["content"] if part["type"] == "image"] == ["a.png", "b.png"]
    assert all("image" not in part for part in messages[1]["content"])
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"have 2 image placeholders, got {count} images"):
            insert_images(messages, (parts * 2)[:count])


def test_render_completion_wraps_reasoning_and_order_in_tags():
    assert render_completion("Image 1: x", [2, 1]) == "<think>Image 1: x</think><answer>[2, 1]</answer>"
    assert render_completion(None, [1]) == "<answer>[1]</answer>"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_prompts_are_valid(path):
    loaded = Prompt.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    assert loaded.name == path.stem
