"""Where the parts of a reply are. tests/test_server_behaviours.py has more forms, through both clients."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.chat.completion import Completion, NoCompletion, ReplyError, read_body, read_reply

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def reply(message, finish="stop", **fields):
    return {"choices": [{"message": message, "finish_reason": finish}], **fields}


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 0}, (5, 0)),
        ({"input_tokens": 5, "output_tokens": 2.0}, (5, 2)),
        ({"prompt_tokens": None, "completion_tokens": "7"}, (None, None)),
        ({"prompt_tokens": -1, "completion_tokens": True}, (None, None)),
        ([], (None, None)),
        (None, (None, None)),
    ],
)
def test_an_unknown_count_is_none_and_not_zero(usage, counts):
    completion = read_body(reply({"content": "a"}, usage=usage))
    assert (completion.prompt_tokens, completion.completion_tokens) == counts


def test_the_whole_completion_and_the_answer():
    separate = Completion("<answer>[1]</answer>", "Image 1: a map.")
    assert separate.whole == "<think>Image 1: a map.</think><answer>[1]</answer>"
    assert separate.answer == "<answer>[1]</answer>"
    assert Completion("", "Image 1: a", "length").whole == "<think>Image 1: a"
    assert Completion("<think>never ends").answer == ""
    assert Completion("a</think>b</think> c ").answer == "c"


def test_an_opening_tag_is_added_only_to_a_completion_that_has_none():
    assert read_body(reply({"content": "a</think>b"})).whole == "<think>a</think>b"
    assert read_body(reply({"content": "<think>a</think>b"})).whole == "<think>a</think>b"
    assert read_body(reply({"content": "b</think>", "reasoning": "a"})).whole == "<think>a</think>b</think>"


@pytest.mark.parametrize("field", ["error", "message", "choice"])
def test_an_error_is_found_in_each_place(field):
    error = {"message": "busy", "code": 503}
    body = {
        "error": {"error": error},
        "message": reply({"error": error}),
        "choice": {"choices": [{"error": error}]},
    }[field]
    with pytest.raises(ReplyError) as raised:
        read_body(body)
    assert raised.value.error == error


@given(values)
def test_any_json_is_a_completion_or_one_of_the_two_errors(value):
    for body in (value, reply({"content": value}), reply(value), {"choices": value}, reply({"reasoning": value})):
        try:
            assert isinstance(read_reply(json.dumps(body)), Completion)
        except (NoCompletion, ReplyError):
            continue


@given(st.text(max_size=60))
def test_any_text_is_a_completion_or_one_of_the_two_errors(text):
    for reply_text in (text, f"data: {text}\n\ndata: [DONE]"):
        try:
            assert isinstance(read_reply(reply_text), Completion)
        except (NoCompletion, ReplyError):
            continue


@given(values)
def test_any_chunk_of_a_stream_is_read_or_one_of_the_two_errors(value):
    for chunk in (
        value,
        {"choices": [value]},
        {"choices": [{"delta": value}]},
        {"choices": [{"delta": {"content": value}}]},
    ):
        try:
            assert isinstance(read_reply(f"data: {json.dumps(chunk)}\n\ndata: [DONE]"), Completion)
        except (NoCompletion, ReplyError):
            continue


def test_an_infinite_count_is_unknown():
    assert (
        read_reply('{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 1e999}}').prompt_tokens
        is None
    )
