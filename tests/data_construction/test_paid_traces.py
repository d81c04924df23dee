from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_tasks import file_bytes, make_config, make_data, skipped
from servers import RECITED_TEXT, OpenAIServer, Reply, ScriptedServer, completion

from data_construction.traces import TracesStage, main
from mmr5_train.common.files import InputError, read_manifest, read_records
from mmr5_train.ranking.records import RankingTask, Trace

KEY = "sk-secret-0123456789"


@pytest.fixture
def openai_config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TracesStage]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(data: Path, out: Path, *overrides: str) -> TracesStage:
        return make_config(data, out, "teacher=openai", "teacher.model=m", "teacher.attempts=2", *overrides)

    return make


def test_real_server_explains_every_page(
    openai_config: Callable[..., TracesStage],
    openai_server: OpenAIServer,
    reciting_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setenv("OPENAI_BASE_URL", openai_server.base_url)
    data = make_data(tmp_path / "data", questions=2, positives=(0, 1, 2, 3))
    for concurrency in (1, 4):
        out = tmp_path / str(concurrency)
        main(openai_config(data, out, f"teacher.model='{reciting_model}'", f"teacher.concurrency={concurrency}"))
        for trace in read_records(out / "traces.jsonl", Trace):
            assert trace.think == "\n".join(f"Image {i}: {RECITED_TEXT}, so it helps." for i in (1, 2, 3, 4))
        assert read_manifest(out)["counts"]["teacher"]["answers"] == 8
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "4")


def scripted_teacher(number: int, body: dict[str, Any]) -> Reply:
    """Answers depend only on the request: correct, wrong, leaking the label or failing, with various delays."""
    parts = body["messages"][1]["content"]
    text = parts[-1]["text"]
    document = next(q for q in range(30) if f"document {q}?" in text)
    helps = "This page is of use" in text
    delay = 0.05 * (document % 3)
    verdict = f"Verdict: {'helps' if helps else 'does not help'}"
    if len(parts) == 1:
        named = text.partition("why ")[2].partition(" can help")[0]
        return completion(f"{named} can help. The others can't.")._replace(delay=delay)
    if document == 3 and helps:
        return Reply(500, {"error": {"message": "no luck"}}, delay=delay)
    if document == 4:
        return completion("word " * 50)._replace(delay=0.0 if helps else 0.1)
    if document == 5:
        return completion("It does not answer the question.\nVerdict: helps")._replace(delay=delay)
    if document == 6:
        return completion(f"{'It is labelled relevant' if helps else 'Text'}.\n{verdict}")
    if document == 7:
        return completion("" if helps else "word " * 50)._replace(delay=0.2 if helps else 0.0)
    if document == 8:  # the wording does not matter
        text = "It lists them under no. 7, which is relevant" if helps else "Nothing else answers the question"
        return completion(f"{text}.\n{verdict}")
    if document == 9 and not helps:
        return completion("I'm sorry, I can't help with that.")
    return completion(f"It is chart {document}.\n{verdict}")._replace(delay=delay)


def test_failed_questions_are_skipped_independently_of_concurrency(
    openai_config: Callable[..., TracesStage], scripted_server: ScriptedServer, tmp_path: Path
):
    scripted_server.script = scripted_teacher
    data = make_data(tmp_path / "data", questions=10)
    for concurrency in (1, 8):
        out = tmp_path / str(concurrency)
        main(openai_config(data, out, "refine=true", f"teacher.concurrency={concurrency}"))
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "8")
    out = tmp_path / "1"
    assert [trace.query_id for trace in read_records(out / "traces.jsonl", Trace)] == [
        "q0",
        "q1",
        "q2",
        "q8",
    ]
    reasons = {skip.query_id: skip.reason for skip in skipped(out)}
    first_page_helps = read_records(data, RankingTask)[7].in_prompt_order("shuffled", 42).local_positives == (1,)
    assert reasons == {
        "q3": "the teacher's server failed",
        "q4": "the teacher's answer was too long",
        "q5": "check direction",
        "q6": "check no_label_words",
        "q7": f"the teacher's answer was {'empty' if first_page_helps else 'too long'}",
        "q9": "the teacher's answer did not end with the line that states the verdict",
    }
    counts = read_manifest(out)["counts"]
    assert counts["teacher"]["too_long"] == 8 + 6
    assert counts["teacher"]["empty"] == 2
    assert counts["teacher"]["no_verdict"] == 3 * 2
    notes = read_records(out / "traces.jsonl", Trace)[-1].notes
    assert sorted(set(notes)) == [
        "It lists them under no. 7, which is relevant, so it helps.",
        "Nothing else answers the question, so it does not help.",
    ]
    assert KEY not in "".join(path.read_text() for path in out.iterdir())


def test_server_without_any_completion_stops_the_run(
    openai_config: Callable[..., TracesStage], scripted_server: ScriptedServer, tmp_path: Path
):
    scripted_server.replies(Reply(body="<html>", headers={"Content-Type": "text/html"}))
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    with pytest.raises(
        InputError, match=r"answers, but not with a chat completion \(found '<html>'\); check that OPENAI_BASE_URL"
    ):
        main(openai_config(data, out))
    assert not (out / "traces.jsonl").exists()


def test_corrupt_page_image_stops_the_run(
    openai_config: Callable[..., TracesStage], scripted_server: ScriptedServer, tmp_path: Path
):
    data = make_data(tmp_path / "data")
    (tmp_path / "data" / "images" / "1-2.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1-2\.jpg: not a readable image"):
        main(openai_config(data, tmp_path / "out"))
