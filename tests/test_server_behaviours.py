"""Every behaviour of a server leads to the stated result, for the teacher and for the reranker."""

import asyncio
import os
from pathlib import Path

import pytest
from server_behaviours import BEHAVIOURS, NOTE, ORDER, table
from vision_teachers import KEY, PAGE, new_teacher

from data_construction.teacher.calls import TeacherFailure
from mmr5_train import Reranker
from mmr5_train.common.files import InputError

DOCS = Path(__file__).parents[1] / "docs/engines.md"
IDS = [behaviour.name for behaviour in BEHAVIOURS]
# outcome → words of the error that the teacher raises
TEACHER_ERRORS = {
    "dropped: was empty": (TeacherFailure, "was empty"),
    "dropped: was cut off": (TeacherFailure, "was cut off"),
    "dropped: was a refusal": (TeacherFailure, "was a refusal"),
    "dropped: refused": (TeacherFailure, "refused to answer"),
    "dropped: too large": (TeacherFailure, "too large"),
    "dropped: server failed": (TeacherFailure, "server failed"),
    "run ends: key": (InputError, "refuses the key"),
    "run ends: wait": (InputError, "asks to wait 3600 s"),
    "run ends: credit": (InputError, "quota of this key is used up, or it has no credit"),
    "run ends: no completion": (InputError, "not with a chat completion"),
    "run ends: rejected": (InputError, "refuses the request"),
    "run ends: redirects": (InputError, "redirects to https://x.example/v1"),
}


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr("mmr5_train.chat.client.ChatClient._seconds_to_wait", lambda *_: 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def play(server, behaviour, reasoning, answer):
    """Makes the server reply to each request as the behaviour says."""
    replies = behaviour.replies(reasoning, answer)
    server.script = lambda number, body: replies[min(number, len(replies) - 1)]


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=IDS)
def test_the_teacher(behaviour, scripted_server, page_folder, tmp_path):
    play(scripted_server, behaviour, "I see a table.", "A table of exports.\nVerdict: helps")

    async def explain():
        teacher = new_teacher(tmp_path)
        try:
            return await teacher.explain("What is red?", PAGE, page_folder / "page-0.png", True, 40)
        finally:
            await teacher.close()

    if behaviour.teacher == NOTE:
        assert asyncio.run(explain()) == ("A table of exports", True)
        return
    kind, words = TEACHER_ERRORS[behaviour.teacher]
    with pytest.raises(kind, match=words) as caught:
        asyncio.run(explain())
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=IDS)
def test_the_reranker(behaviour, scripted_server, page_folder):
    note = "Image 1: a map, so it does not help.\nImage 2: a table, so it helps."
    play(scripted_server, behaviour, note, "<answer>[2, 1]</answer>")
    server = {"url": scripted_server.base_url, "model": "m", "attempts": 3}
    reranker = Reranker("tiny", server=server)
    pages = [page_folder / f"page-{i}.png" for i in range(2)]
    outcome, _, words = behaviour.reranker.partition("stops: ")
    if words:
        with pytest.raises(InputError, match=words) as caught:
            reranker.rank("Which?", pages)
        assert KEY not in str(caught.value)
        return
    ranked = reranker.rank("Which?", pages)
    if outcome == ORDER:
        assert (ranked.order, ranked.defects, ranked.reasoning) == ([1, 0], (), note)
    else:
        assert outcome == "no answer"
        assert "no_answer" in ranked.defects
        assert ranked.order == [0, 1]


def test_the_documented_table_is_this_one():
    """UPDATE_DOCS=1 writes it."""
    text = DOCS.read_text(encoding="utf-8")
    start, end = (text.index(f"<!-- {mark} of the table of behaviours -->") for mark in ("start", "end"))
    current = text[start:end].split("\n", 1)[1].strip()
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(text.replace(current, table()) if current else text[:end] + table() + "\n" + text[end:])
        return
    assert current == table()


def test_there_are_at_least_forty():
    assert len(set(IDS)) == len(IDS) >= 40
