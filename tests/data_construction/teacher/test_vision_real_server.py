"""The vision teacher against a real OpenAI-compatible server, `transformers serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from openai import OpenAI
from packaging.version import Version
from servers import RECITED, RECITED_TEXT, THOUGHT, OpenAIServer
from vision_teachers import KEY, PAGE, make_config, new_teacher

from data_construction.teacher.calls import TeacherFailure
from data_construction.teacher.pages import image_url
from data_construction.teacher.replies import PageNote
from data_construction.teacher.vision import OpenAITeacher
from mmr5_train.ranking.prompt import fill_template
from mmr5_train.ranking.records import LocalId

# finish_reason of a truncated answer is "length" in 5.23, but "stop" in 5.17.
NO_LENGTH_REASON = Version(transformers.__version__) < Version("5.23")


def call_teacher(folder: Path, model: str, request: Callable[[OpenAITeacher], Any], **fields: Any) -> Any:
    async def send_request() -> Any:
        teacher = new_teacher(folder, model=model, temperature=0, **fields)
        try:
            return await request(teacher)
        finally:
            await teacher.close()

    return asyncio.run(send_request())


@pytest.fixture
def served(openai_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> OpenAIServer:
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return openai_server


@pytest.mark.parametrize("helps", [True, False])
def test_real_server_explains_a_page(helps: bool, served: OpenAIServer, reciting_model: Path, image: Path):
    call = lambda teacher: teacher.explain("What is red?", PAGE, image, helps, 40)  # noqa: E731
    assert call_teacher(image.parent, str(reciting_model), call) == PageNote(RECITED_TEXT, helps=True)


def test_reasoning_content_is_not_part_of_the_answer(served: OpenAIServer, reciting_model: Path, image: Path):
    config = make_config()
    text = fill_template(config.can_help, query="What is red?", words=40)
    client = OpenAI(base_url=served.base_url, api_key=KEY, max_retries=0)
    content = [
        {"type": "image_url", "image_url": {"url": image_url(image, config.max_pixels)}},
        {"type": "text", "text": text},
    ]
    answer = client.chat.completions.create(
        model=str(reciting_model),
        messages=[{"role": "system", "content": config.system}, {"role": "user", "content": content}],
        temperature=0,
    )
    client.close()
    message = answer.choices[0].message
    assert message.content == RECITED
    assert message.reasoning_content == THOUGHT


def test_real_server_refines_notes(served: OpenAIServer, reciting_model: Path, tmp_path: Path):
    notes = ["a red bar chart, so it helps.", "text, so it does not help."]
    for positives in ([LocalId(1)], [LocalId(1), LocalId(2)], []):
        call = lambda teacher, ids=positives: teacher.refine("What is red?", notes, ids, 80)  # noqa: E731
        assert call_teacher(tmp_path, str(reciting_model), call) == " ".join(RECITED.split())


@pytest.mark.skipif(NO_LENGTH_REASON, reason="this version of transformers serve never reports the token limit")
def test_answer_at_the_token_limit_fails(served: OpenAIServer, reciting_model: Path, image: Path):
    with pytest.raises(TeacherFailure, match="was cut off"):
        call_teacher(
            image.parent,
            str(reciting_model),
            lambda teacher: teacher.explain("?", PAGE, image, True, 40),
            max_tokens=2,
        )


def test_tiny_model_takes_images_from_the_server(served: OpenAIServer, image: Path):
    client = OpenAI(base_url=served.base_url, api_key=KEY, max_retries=0)
    content = [
        {"type": "image_url", "image_url": {"url": image_url(image, 40_000)}},
        {"type": "text", "text": "What?"},
    ]
    answers = []
    for parts in (content, content[1:]):
        message = {"role": "user", "content": parts}
        answers.append(
            client.chat.completions.create(model=served.model, messages=[message], max_completion_tokens=3)  # type: ignore
        )
    client.close()
    with_image, without = (answer.usage.prompt_tokens for answer in answers)
    assert with_image > without
    assert answers[0].usage.completion_tokens > 0
