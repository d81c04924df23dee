"""What an error means, and how long a server wants to wait."""

import email.utils
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.chat.dialect import Dialect, learn
from mmr5_train.chat.faults import Fault, read_fault


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"Retry-After": "7"}, {}, 7),
        ({"retry-after": "1.5"}, {}, 1.5),
        ({"Retry-After-Ms": "250", "Retry-After": "9"}, {}, 0.25),
        ({"Retry-After": "-3"}, {}, 0),
        ({"Retry-After": "1m30s"}, {}, 90),
        ({"Retry-After": "soon"}, {}, None),
        ({"Retry-After": "nan"}, {}, None),
        ({}, {"error": {"message": "Please try again in 1.2s."}}, 1.2),
        ({}, {"error": {"message": "Please retry after 2 minutes"}}, 120),
        ({}, {"error": {"message": "try again", "details": [{"retryDelay": "34s"}]}}, 34),
        ({}, {}, None),
    ],
)
def test_seconds_to_wait(headers, body, seconds):
    assert read_fault(429, body, headers).wait == (seconds if seconds is None else pytest.approx(seconds))


def test_seconds_until_a_date():
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert read_fault(503, {}, {"Retry-After": later}).wait == pytest.approx(100, abs=2)
    assert read_fault(503, {}, {"Retry-After": email.utils.formatdate(0, usegmt=True)}).wait == 0


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (403, {"error": {"message": "Input flagged by moderation"}}, "refused"),
        (403, {"error": {"message": "Country not supported"}}, "key"),
        (400, {"code": "data_inspection_failed", "message": "no"}, "refused"),
        (451, "", "refused"),
        (400, {"error": {"message": "prompt is too long: 9 tokens > 8"}}, "too_large"),
        (400, {"error": {"message": "image exceeds 5 MB maximum"}}, "too_large"),
        (429, {"error": {"code": "insufficient_quota", "message": "try again in 5s"}}, "no_credit"),
        (429, {"error": {"message": "quota", "details": [{"retryDelay": "3s"}]}}, "rate_limit"),
        (409, "", "server_error"),
        (529, {"type": "error", "error": {"type": "overloaded_error"}}, "server_error"),
        (200, {"error": {"type": "rate_limit_error", "message": "x"}}, "rate_limit"),
        (200, {"error": {"code": "404", "message": "x"}}, "rejected"),
        (418, [1], "rejected"),
    ],
)
def test_kinds(status, body, kind):
    assert read_fault(status, body, {}).kind == kind


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["error", "code", "message", "x"]), inner)
    ),
    max_leaves=6,
)


@given(st.integers(200, 599), json_values, st.text(max_size=10))
def test_any_body_is_a_fault(status, body, header):
    fault = read_fault(status, body, {"Retry-After": header})
    assert len(fault.message) <= 320
    assert fault.wait is None or fault.wait >= 0


REQUEST = {"max_tokens": 5, "temperature": 0, "seed": 1, "messages": [], "top_k": -1}


def refusal(message, status=400, **fields):
    return read_fault(status, {"error": {"message": message, **fields}}, {})


def test_a_refused_limit_is_renamed_once():
    start = Dialect(limit="max_tokens")
    refused = refusal("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    learned = learn(start, start.apply(REQUEST), refused)
    assert learned is not None
    assert learned.apply(REQUEST) == {
        **{k: v for k, v in REQUEST.items() if k != "max_tokens"},
        "max_completion_tokens": 5,
    }
    assert learn(learned, learned.apply(REQUEST), refusal("max_completion_tokens is unknown")) is None
    too_large = refusal("max_tokens is too large: 9000. This model supports at most 4096 completion tokens")
    assert learn(start, start.apply(REQUEST), too_large) is None


def test_refused_fields_are_left_out():
    start = Dialect()
    learned = learn(start, start.apply(REQUEST), refusal("seed and top_k are not supported"))
    assert learned is not None
    assert not {"seed", "top_k"} & learned.apply(REQUEST).keys()
    assert learn(learned, learned.apply(REQUEST), refusal("seed is not supported")) is None, "it was not sent"
    by_param = learn(start, start.apply(REQUEST), refusal("Only 1 works here", param="temperature"))
    assert by_param is not None
    assert by_param.omit == ("temperature",)


def test_a_constraint_is_never_left_out():
    request = {**REQUEST, "structured_outputs": {"grammar": "x"}}
    assert learn(Dialect(), request, refusal("structured_outputs is not supported")) is None


def test_the_detail_of_images_is_left_out():
    parts = [{"type": "image_url", "image_url": {"url": "", "detail": "high"}}, {"type": "text", "text": "a"}]
    request = {"messages": [{"role": "user", "content": parts}]}
    learned = learn(Dialect(), request, refusal("Unknown parameter: detail"))
    assert learned is not None
    [message] = learned.apply(request)["messages"]
    assert message["content"] == [{"type": "image_url", "image_url": {"url": ""}}, parts[1]]


@pytest.mark.parametrize("kind", ["server_error", "refused", "key"])
def test_other_faults_teach_nothing(kind):
    assert learn(Dialect(), REQUEST, Fault(kind, "temperature is not supported", 400)) is None
