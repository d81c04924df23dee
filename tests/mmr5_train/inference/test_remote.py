"""The HTTP backend: against a real `transformers serve`, and against a server that fails as it is told."""

import pytest
from servers import THOUGHT, Reply, completion

from mmr5_train import Reranker
from mmr5_train.common.files import InputError
from mmr5_train.models.loading import TINY
from mmr5_train.ranking.answer_constraints import gbnf_grammar

GOOD = "<think>Image 1: a table, so it helps.</think><answer>[2, 1]</answer>"


@pytest.fixture(scope="module")
def paths(page_folder):
    return [page_folder / f"page-{i}.png" for i in range(3)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def behind(scripted, **options):
    where = {"url": scripted.base_url, "model": "m", "attempts": 2} | options.pop("server", {})
    return Reranker("tiny", server=where, **options)


def test_a_real_server_gives_the_same_answers(openai_server, paths):
    """`transformers serve` with the shipped model, greedily: the same text as in this process."""
    where = {"url": openai_server.base_url, "model": str(TINY)}
    served = Reranker("tiny", server=where, max_new_tokens=24)
    here = Reranker("tiny", constrain=False, max_new_tokens=24)
    queries, pages = ["Which page is red?", "Which shows a table?"], [paths, paths[:2]]
    for over_http, in_process in zip(
        served.rank_many(queries, pages), here.rank_many(queries, pages), strict=True
    ):
        [there], [own] = over_http.answers, in_process.answers
        assert there.completion.replace("<think>", "") == own.completion.replace("<think>", "")
        assert (there.tokens, there.prompt_tokens, there.visual_tokens) == (
            own.tokens,
            own.prompt_tokens,
            own.visual_tokens,
        )
        assert over_http.order == in_process.order


def test_reasoning_that_a_real_server_returns_apart(openai_server, reciting_model, paths):
    where = {"url": openai_server.base_url, "model": str(reciting_model)}
    ranked = Reranker("tiny", server=where, max_new_tokens=24).rank("Which?", paths)
    assert ranked.reasoning == THOUGHT
    assert ranked.defects == ("no_answer",)
    assert ranked.order == [0, 1, 2]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_under_either_name(scripted_server, paths, field):
    scripted_server.replies(completion("<answer>[2, 1]</answer>", **{field: "Image 2: a list, so it helps."}))
    ranked = behind(scripted_server).rank("Which?", paths[:2])
    assert (ranked.order, ranked.defects) == ([1, 0], ())
    assert ranked[0].note == "a list, so it helps."


def test_requests_are_on_the_way_at_once_and_answers_stay_in_order(scripted_server, paths):
    def script(number, body):
        n = sum(part["type"] == "image_url" for part in body["messages"][1]["content"])
        listed = ", ".join(str(i) for i in range(n, 0, -1))
        return completion(f"<think>t</think><answer>[{listed}]</answer>")._replace(delay=0.2)

    scripted_server.script = script
    pages = [paths[:1], paths[:2], paths] * 4
    ranked = behind(scripted_server, server={"concurrency": 4}).rank_many(["Which?"] * 12, pages)
    assert [one.order for one in ranked] == [[0], [1, 0], [2, 1, 0]] * 4
    assert scripted_server.most_at_once == 4
    assert {body["temperature"] for body in scripted_server.requests} == {0.0}


def test_samples_are_drawn_with_seeds_of_their_own(scripted_server, paths):
    scripted_server.replies(completion(GOOD))
    ranked = behind(scripted_server, samples=3, temperature=0.7).rank("Which?", paths[:2])
    assert len(ranked.answers) == 3
    assert len({body["seed"] for body in scripted_server.requests}) == 3
    assert {body["temperature"] for body in scripted_server.requests} == {0.7}


def test_the_servers_own_structured_outputs(scripted_server, paths):
    scripted_server.replies(completion(GOOD))
    for structured in ("vllm", "sglang", "none"):
        behind(scripted_server, server={"structured": structured}).rank("Which?", paths[:2])
    vllm, sglang, none = scripted_server.requests
    assert vllm["structured_outputs"] == {"grammar": gbnf_grammar(2)}
    assert sglang["ebnf"] == gbnf_grammar(2)
    assert not {"structured_outputs", "ebnf"} & none.keys()
    behind(scripted_server, server={"structured": "vllm"}, constrain=False).rank("Which?", paths[:2])
    assert "structured_outputs" not in scripted_server.requests[-1]


def test_an_answer_that_was_cut_off(scripted_server, paths):
    scripted_server.replies(completion("<think>Image 1: and so", finish_reason="length"))
    ranked = behind(scripted_server).rank("Which?", paths)
    assert ranked.defects == ("no_think", "no_answer", "cut_off")
    assert ranked.order == [0, 1, 2]


def test_a_passing_fault_is_waited_out(scripted_server, paths):
    scripted_server.replies(Reply(503, {"error": {"message": "busy"}}, {"Retry-After": "0.05"}), completion(GOOD))
    assert behind(scripted_server).rank("Which?", paths[:2]).order == [1, 0]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(404, {"error": {"message": "no such model"}}), r"refuses the request \(404: no such model\)"),
        (Reply(500, {"detail": "broken"}, {"Retry-After": "0.05"}), r"refuses the request \(500: broken\)"),
        (Reply(body="<html>"), "is no chat completion"),
        (Reply(body={"choices": []}), "is no chat completion"),
        (Reply(0), "can't be reached .* 2 tries"),
    ],
)
def test_what_is_not_waited_out_ends_the_run(scripted_server, paths, reply, message):
    scripted_server.replies(reply)
    with pytest.raises(InputError, match=message):
        behind(scripted_server).rank("Which?", paths)


def test_the_key_comes_from_the_environment(scripted_server, paths, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    scripted_server.replies(Reply(401, {"error": {"message": "bad key"}}))
    with pytest.raises(InputError, match="401: bad key") as raised:
        behind(scripted_server).rank("Which?", paths)
    assert scripted_server.keys[0] == "Bearer sk-secret"
    assert "sk-secret" not in str(raised.value)


def test_what_a_server_needs(scripted_server):
    with pytest.raises(InputError, match="needs the model in this process"):
        behind(scripted_server, mode="logits")
    with pytest.raises(InputError, match="expected one like http://localhost:8000/v1, found localhost"):
        Reranker("tiny", server={"url": "localhost:80", "model": "m"})
    with pytest.raises(InputError, match="nothing says with which prompt and page sizes"):
        Reranker(server={"url": scripted_server.base_url, "model": "m"}, prompt="default")
    with pytest.raises(InputError, match="field model: Field required"):
        Reranker("tiny", server={"url": scripted_server.base_url})
