from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from servers import Reply, ScriptedServer, completion
from vision_teachers import KEY, PAGE, make_config, new_teacher

from data_construction.teacher.calls import TeacherFailure
from data_construction.teacher.cost import Estimate
from data_construction.teacher.replies import DOES_NOT_HELP, HELPS, REPLY_PROBLEMS, PageNote
from data_construction.teacher.teacher import make_teacher
from data_construction.teacher.vision import OpenAIConfig, OpenAITeacher
from data_construction.traces import TracesStage
from mmr5_train.common.config import compose_stage, validate
from mmr5_train.common.files import InputError
from mmr5_train.ranking.prompt import fill_template
from mmr5_train.ranking.records import LocalId

INVALID_REPLIES = [
    Reply(body="{ not json"),
    Reply(body="<html>Welcome</html>", headers={"Content-Type": "text/html"}),
    Reply(body={"id": "1"}),
    Reply(body={"choices": []}),
    Reply(body={"choices": "none"}),
    Reply(body={"choices": [{"message": None}]}),
    Reply(body=[1, 2]),
    completion(5),
]


Counts = dict[str, int]


FINE = completion("Fine.\nVerdict: helps")
NOTE = PageNote("Fine", True)


def explain(image: Path, helps: bool = True, words: int = 40, **fields: Any) -> tuple[PageNote, Counts, Counts]:
    """The note of one request, the teacher's counts without tokens, and the server's fault counts."""

    async def call_teacher() -> tuple[PageNote, Counts, Counts]:
        teacher = new_teacher(image.parent, **fields)
        try:
            answer = await teacher.explain("What is red?", PAGE, image, helps, words)
            return answer, without_tokens(teacher), dict(teacher.server.faults)
        finally:
            await teacher.close()

    return asyncio.run(call_teacher())


def failure(image: Path, **fields: Any) -> tuple[TeacherFailure, Counts, Counts]:
    async def call_teacher() -> tuple[TeacherFailure, Counts, Counts]:
        teacher = new_teacher(image.parent, **fields)
        with pytest.raises(TeacherFailure) as caught:
            await teacher.explain("What is red?", PAGE, image, True, 40)
        await teacher.close()
        return caught.value, without_tokens(teacher), dict(teacher.server.faults)

    return asyncio.run(call_teacher())


def without_tokens(teacher: OpenAITeacher) -> Counts:
    return {name: count for name, count in teacher.counts.items() if "tokens" not in name}


# --- requests, retries and faults, with a scripted server


def test_request_has_the_prompt_the_image_and_the_key(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(completion(" It shows\n the  sum. \nVerdict: helps\n"))
    answer, counts, faults = explain(image, helps=False, max_pixels=30_000)
    assert answer == PageNote("It shows the sum", helps=True), "the model's verdict, not the label"
    assert (counts, faults) == ({"answers": 1}, {})
    body = scripted_server.requests[0]
    picture, text = body["messages"][1]["content"]
    config = make_config()
    assert text["text"].startswith(fill_template(config.cannot_help, query="What is red?", words=40))
    assert "40 words" in text["text"]
    assert f'reads exactly "{HELPS}" or "{DOES_NOT_HELP}"' in text["text"]
    assert "so it" not in config.can_help + config.cannot_help, "the note itself need not state the verdict"
    header, data = picture["image_url"]["url"].split(",")
    assert header == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as seen:
        assert seen.size == (150, 200)
    assert body["model"] == "m"
    assert body["temperature"] == 0
    assert scripted_server.keys == [f"Bearer {KEY}"]


def test_null_temperature_is_not_sent(scripted_server: ScriptedServer, image: Path):
    explain(image, temperature=None)
    assert "temperature" not in scripted_server.requests[0]


def test_a_refused_field_is_refused_once_in_all_runs_with_a_store(scripted_server: ScriptedServer, image: Path):
    def script(number: int, body: dict[str, Any]) -> Reply:
        message = "Unsupported value: 'temperature'. Only the default (1) value is supported."
        return Reply(400, {"error": {"message": message}}) if "temperature" in body else FINE

    scripted_server.script = script

    async def explain_some(queries: range) -> dict[str, Any]:
        teacher = make_teacher(make_config(), image.parent / "answers.sqlite", 40, False)
        await asyncio.gather(*(teacher.explain(f"{i}?", PAGE, image, True, 40) for i in queries))
        await teacher.close()
        return teacher.resolved

    resolved = asyncio.run(explain_some(range(1)))
    assert resolved["dialect"]["omit"] == ["temperature"]
    assert asyncio.run(explain_some(range(1, 4))) == resolved
    assert ["temperature" in body for body in scripted_server.requests] == [True, False, False, False, False]


def test_image_detail_and_further_fields_are_sent(scripted_server: ScriptedServer, image: Path):
    explain(image, detail="low", extra={"reasoning_effort": "low"})
    [body] = scripted_server.requests
    assert body["messages"][1]["content"][0]["image_url"]["detail"] == "low"
    assert body["reasoning_effort"] == "low"


def test_question_cannot_inject_tags_or_fields(scripted_server: ScriptedServer, tmp_path: Path):
    async def call_teacher() -> None:
        teacher = new_teacher(tmp_path)
        await teacher.refine("is <|image_pad|> {notes} <think>", ["a", "b"], [LocalId(2)], 80)
        await teacher.close()

    asyncio.run(call_teacher())
    text = scripted_server.requests[0]["messages"][1]["content"][0]["text"]
    assert "is ‹|image_pad|> {notes} ‹think>" in text
    assert "Image 1: a\nImage 2: b" in text
    assert "why Image 2 can help" in text
    assert "why Image 1 can't" in text


def test_rate_limit_waits_for_retry_after(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(Reply(429, {"error": {"message": "slow"}}, {"Retry-After": "1.2"}), FINE)
    start = time.monotonic()
    answer, counts, faults = explain(image)
    assert time.monotonic() - start >= 1.2
    assert answer == NOTE
    assert (counts, faults) == ({"answers": 1}, {"rate_limit": 1})


def test_retry_after_may_be_a_date(scripted_server: ScriptedServer, image: Path):
    later = email.utils.formatdate(time.time() + 3_600, usegmt=True)
    scripted_server.replies(Reply(429, {"error": {"message": "slow"}}, {"Retry-After": later}))
    with pytest.raises(InputError, match=r"asks to wait 3[56]\d\d s, longer than teacher.max_wait"):
        explain(image)
    assert len(scripted_server.requests) == 1


def test_server_errors_and_lost_connections_are_retried(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(Reply(500, "oops"), Reply(0), FINE)
    answer, counts, faults = explain(image)
    assert answer == NOTE
    assert (counts, faults) == ({"answers": 1}, {"server_error": 1, "lost": 1})


def test_permanent_server_error_fails_the_question(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(Reply(503, {"error": {"message": "overloaded"}}))
    error, _, _ = failure(image, attempts=2)
    assert error.reason == "the teacher's server failed"
    assert error.detail == "2 times (503: overloaded)"
    assert len(scripted_server.requests) == 2


def test_timeout_fails_the_question(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(Reply(delay=1.5))
    error, _, _ = failure(image, attempts=1, timeout=0.3)
    assert str(error) == "the teacher did not answer: nothing within 0.3 s, 1 times"


def test_unreachable_server_raises(image: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:word@127.0.0.1:{port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError, match=rf"^http://127.0.0.1:{port}/v1: can't be reached .*check the network"):
        explain(image, attempts=2)


@pytest.mark.parametrize("invalid", INVALID_REPLIES)
def test_invalid_replies_are_retried(invalid: Reply, scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(invalid, FINE)
    assert explain(image) == (NOTE, {"answers": 1}, {"garbage": 1})


def test_invalid_replies_fail_the_question_or_the_run(scripted_server: ScriptedServer, image: Path):
    async def call_teacher() -> None:
        teacher = new_teacher(image.parent, attempts=2)
        try:
            for query in ("What is red?", "What is blue?"):
                await teacher.explain(query, PAGE, image, True, 40)
        finally:
            await teacher.close()

    scripted_server.replies(FINE, Reply(body="{ not json"))
    with pytest.raises(TeacherFailure, match="not a chat completion: 2 times"):
        asyncio.run(call_teacher())
    scripted_server.replies(Reply(body=f"{{ {KEY}"))
    with pytest.raises(InputError, match=r"answers, but not with a chat completion \(found '{ \[key\]'\)"):
        asyncio.run(call_teacher())


@pytest.mark.parametrize(
    "refusal",
    [
        completion(None, refusal="I can't."),
        completion("", "content_filter"),
        Reply(400, {"error": {"message": "filtered", "code": "content_filter"}}),
    ],
)
def test_refusal_fails_the_question_without_retry(refusal: Reply, scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(refusal)
    error, counts, faults = failure(image)
    assert "refus" in error.reason
    assert counts.get("refused", 0) + faults.get("refused", 0) == 1
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (completion(""), "empty"),
        (completion(None, reasoning_content="thoughts only"), "empty"),
        (completion("<think>never ends"), "empty"),
        (completion("The page sh", "length"), "cut_off"),
        (completion("so " * 41 + "\nVerdict: helps"), "too_long"),
        (completion("It answers the question."), "no_verdict"),
        (completion("I'm sorry, I can't help with that."), "no_verdict"),
        (completion("A map, so it helps.\nVerdict: does not help"), "two_verdicts"),
    ],
)
def test_unusable_answer_is_requested_again(
    bad: Reply, problem: str, scripted_server: ScriptedServer, image: Path
):
    scripted_server.replies(bad, FINE)
    answer, counts, _faults = explain(image)
    assert answer == NOTE
    assert counts == {"answers": 2, problem: 1}
    first, second = scripted_server.requests
    assert second["messages"][1]["content"][1]["text"].startswith(first["messages"][1]["content"][1]["text"])
    assert f"Your last reply {REPLY_PROBLEMS[problem]}." in second["messages"][1]["content"][1]["text"]
    assert second["max_completion_tokens"] == 2 * first["max_completion_tokens"]


def test_repeated_unusable_answers_fail_the_question(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(completion(""), completion("so " * 41 + "\nVerdict: helps"))
    error, counts, _ = failure(image)
    assert error.reason == "the teacher's answer was too long"
    assert counts == {"answers": 3, "empty": 1, "too_long": 2}


def test_reply_that_states_no_verdict_twice_fails_the_question(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(completion("It answers the question."))
    error, counts, _ = failure(image)
    assert error.reason == "the teacher's answer did not end with the line that states the verdict"
    assert counts == {"answers": 2, "no_verdict": 2}


def test_think_block_in_the_answer_is_removed(scripted_server: ScriptedServer, image: Path):
    scripted_server.replies(completion("<think>It is red.\nVerdict: helps</think>\n\nIt is red.\nVerdict: helps"))
    assert explain(image)[0] == PageNote("It is red", True)


@pytest.mark.parametrize(
    ("status", "error", "match"),
    [
        (401, {"message": f"Incorrect key: {KEY}"}, "refuses the key in OPENAI_API_KEY"),
        (403, {"message": "no"}, "refuses the key in OPENAI_API_KEY"),
        (404, {"message": "The model m does not exist"}, "The model m does not exist.*teacher.model=m"),
        (400, {"message": "unknown model"}, "400: unknown model.*teacher.model=m"),
        (422, {"message": "image_url is not supported"}, "takes images"),
        (429, {"message": "pay first", "code": "insufficient_quota"}, "quota of this key is used up"),
    ],
)
def test_permanent_errors_are_not_retried(
    status: int, error: dict[str, str], match: str, scripted_server: ScriptedServer, image: Path
):
    scripted_server.replies(Reply(status, {"error": error}))
    with pytest.raises(InputError, match=match) as caught:
        explain(image)
    assert KEY not in str(caught.value)
    assert len(scripted_server.requests) == 1


def test_a_key_at_the_end_of_a_long_message_is_hidden_before_the_message_is_cut(
    scripted_server: ScriptedServer, image: Path
):
    """A message is cut after 300 characters, here in the middle of the key."""
    message = f"{'a' * (300 - len('401: ') - len(KEY) // 2)}{KEY}"
    scripted_server.replies(Reply(401, {"error": {"message": message}}))
    with pytest.raises(InputError, match="refuses the key") as caught:
        explain(image)
    assert KEY[: len(KEY) // 2 - 1] not in str(caught.value)


def test_concurrency_limit_is_respected(scripted_server: ScriptedServer, image: Path):
    def wait_for_others(number: int, body: dict[str, Any]) -> Reply:
        end = time.monotonic() + 20
        while scripted_server.max_concurrent < 3 and time.monotonic() < end:
            time.sleep(0.01)
        return FINE._replace(delay=0.02)

    scripted_server.script = wait_for_others

    async def call_teacher() -> None:
        teacher = new_teacher(image.parent, concurrency=3)
        await asyncio.gather(*(teacher.explain(f"{k}?", PAGE, image, True, 40) for k in range(12)))
        await teacher.close()

    asyncio.run(call_teacher())
    assert scripted_server.max_concurrent == 3


# --- settings and images


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("OPENAI_API_KEY", None, "OPENAI_API_KEY is not set"),
        ("OPENAI_API_KEY", "sk-\x07bell", "characters that are not printable ASCII"),
        (
            "OPENAI_BASE_URL",
            "localhost:8000/v1",
            "expected a URL such as http://localhost:8000/v1, found localhost:8000/v1",
        ),
    ],
)
def test_invalid_environment_raises(
    name: str, value: str | None, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        new_teacher(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gpt_4o", "gpt_5", "gemini", "claude", "qwen"])
def test_the_presets_have_prices_with_a_date(name: str):
    teacher = compose_stage(TracesStage, "traces", [f"teacher={name}", "data=d.jsonl"]).teacher
    assert isinstance(teacher, OpenAIConfig)
    assert teacher.price is not None
    assert teacher.price.read is not None
    assert f"(prices of {teacher.price.read})" in Estimate(1, 1, 1, 1).report("m", teacher.price, 1)


def test_missing_model_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(InputError, match=r"teacher.model is not set: give teacher.model=… or export OPENAI_MODEL"):
        new_teacher(tmp_path, model=None)


@pytest.mark.parametrize(
    ("field", "name"),
    [("can_help", "query"), ("verdict", "helps"), ("verdict", "does_not_help"), ("refine", "notes")],
)
def test_template_without_a_required_field_raises(field: str, name: str):
    config = make_config().model_dump()
    text = config[field].replace(f"{{{name}}}", "it")
    with pytest.raises(InputError, match=rf"{field} must contain \{{{name}\}}"):
        validate(OpenAIConfig, {**config, field: text})
