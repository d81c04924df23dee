"""The remote backend, with a real `transformers serve` and with a server whose replies are scripted."""

import json
import shutil

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


def remote_reranker(scripted_server, **options):
    server = {"url": scripted_server.base_url, "model": "m", "attempts": 2} | options.pop("server", {})
    return Reranker("tiny", server=server, **options)


def test_a_real_server_gives_the_same_answers_as_the_local_backend(openai_server, paths):
    server = {"url": openai_server.base_url, "model": str(TINY)}
    remote = Reranker("tiny", server=server, max_new_tokens=24)
    local = Reranker("tiny", constrain=False, max_new_tokens=24)
    queries, pages = ["Which page is red?", "Which shows a table?"], [paths, paths[:2]]
    for from_server, from_local in zip(
        remote.rank_many(queries, pages), local.rank_many(queries, pages), strict=True
    ):
        [answer], [expected] = from_server.answers, from_local.answers
        assert answer.completion.replace("<think>", "") == expected.completion.replace("<think>", "")
        assert (answer.tokens, answer.prompt_tokens, answer.visual_tokens) == (
            expected.tokens,
            expected.prompt_tokens,
            expected.visual_tokens,
        )
        assert from_server.order == from_local.order


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("openai", {"repetition_penalty": 1.9}),
        ("transformers", {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1}),
    ],
)
def test_sampling_settings_of_the_checkpoint_on_a_real_server_have_no_influence(
    openai_server, paths, tmp_path, kind, settings
):
    shutil.copytree(TINY, tmp_path / "odd")
    own = json.loads((TINY / "generation_config.json").read_text())
    (tmp_path / "odd/generation_config.json").write_text(json.dumps(own | settings))
    server = {"url": openai_server.base_url, "model": str(tmp_path / "odd"), "kind": kind}
    [answer] = Reranker("tiny", server=server, max_new_tokens=24).rank("Which page is red?", paths).answers
    local = Reranker("tiny", constrain=False, max_new_tokens=24)
    [expected] = local.rank("Which page is red?", paths).answers
    assert answer.completion.replace("<think>", "") == expected.completion.replace("<think>", "")


def test_requests_have_the_sampling_fields_of_each_server(scripted_server, paths):
    scripted_server.replies(completion(GOOD))
    for server in ({}, {"kind": "vllm"}, {"structured": "sglang"}, {"kind": "transformers"}):
        remote_reranker(scripted_server, server=server, samples=2, temperature=0.7).rank("Which?", paths[:2])
    openai, vllm, sglang, transformers = (bodies for bodies in scripted_server.requests[::2])
    assert all((body["top_p"], body["frequency_penalty"]) == (1.0, 0.0) for body in (openai, vllm, sglang))
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert not neutral.keys() & openai.keys()
    assert neutral.items() <= vllm.items()
    assert neutral.items() <= sglang.items()
    settings = json.loads(transformers["generation_config"])
    assert (settings["do_sample"], settings["temperature"], settings["top_k"]) == (True, 0.7, 0)
    assert (settings["repetition_penalty"], settings["no_repeat_ngram_size"]) == (1.0, 0)


def test_separate_reasoning_of_a_real_server_is_used(openai_server, reciting_model, paths):
    server = {"url": openai_server.base_url, "model": str(reciting_model)}
    results = Reranker("tiny", server=server, max_new_tokens=24).rank("Which?", paths)
    assert results.reasoning == THOUGHT
    assert results.defects == ("no_answer",)
    assert results.order == [0, 1, 2]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_read_from_either_field(scripted_server, paths, field):
    scripted_server.replies(completion("<answer>[2, 1]</answer>", **{field: "Image 2: a list, so it helps."}))
    results = remote_reranker(scripted_server).rank("Which?", paths[:2])
    assert (results.order, results.defects) == ([1, 0], ())
    assert results[0].note == "a list, so it helps."


def test_reasoning_that_is_cut_off_is_a_think_block_without_an_end(scripted_server, paths):
    scripted_server.replies(
        completion("", reasoning_content="Image 1: a table, so it", finish_reason="length"),
        completion("", reasoning_content="Image 1: a table, so it helps.", finish_reason="stop"),
    )
    [cut] = remote_reranker(scripted_server).rank("Which?", paths[:2]).answers
    assert cut.completion == "<think>Image 1: a table, so it"
    assert cut.defects == ("no_think", "no_answer", "cut_off"), (
        "as for the same text from the model in this process"
    )
    [ended] = remote_reranker(scripted_server).rank("Which?", paths[:2]).answers
    assert ended.completion == "<think>Image 1: a table, so it helps.</think>"


def test_requests_are_concurrent_and_answers_keep_their_order(scripted_server, paths):
    def script(number, body):
        n = sum(part["type"] == "image_url" for part in body["messages"][1]["content"])
        order = ", ".join(str(i) for i in range(n, 0, -1))
        return completion(f"<think>t</think><answer>[{order}]</answer>")._replace(delay=0.2)

    scripted_server.script = script
    pages = [paths[:1], paths[:2], paths] * 4
    reranker = remote_reranker(scripted_server, server={"concurrency": 4})
    results = reranker.rank_many(["Which?"] * 12, pages)
    assert [ranked.order for ranked in results] == [[0], [1, 0], [2, 1, 0]] * 4
    assert scripted_server.max_concurrent == 4
    assert {body["temperature"] for body in scripted_server.requests} == {0.0}


def test_each_sample_has_its_own_seed(scripted_server, paths):
    scripted_server.replies(completion(GOOD))
    results = remote_reranker(scripted_server, samples=3, temperature=0.7).rank("Which?", paths[:2])
    assert len(results.answers) == 3
    assert len({body["seed"] for body in scripted_server.requests}) == 3
    assert {body["temperature"] for body in scripted_server.requests} == {0.7}


def test_structured_outputs_use_the_parameters_of_each_server(scripted_server, paths):
    scripted_server.replies(completion(GOOD))
    for structured in ("vllm", "sglang", "none"):
        remote_reranker(scripted_server, server={"structured": structured}).rank("Which?", paths[:2])
    vllm, sglang, none = scripted_server.requests
    assert vllm["structured_outputs"] == {"grammar": gbnf_grammar(2, think=True)}
    assert sglang["ebnf"] == gbnf_grammar(2, think=True)
    assert not {"structured_outputs", "ebnf"} & none.keys()
    unconstrained = remote_reranker(scripted_server, server={"structured": "vllm"}, constrain=False)
    unconstrained.rank("Which?", paths[:2])
    assert "structured_outputs" not in scripted_server.requests[-1]
    remote_reranker(scripted_server, server={"structured": "vllm"}, mode="direct").rank("Which?", paths[:2])
    assert scripted_server.requests[-1]["structured_outputs"] == {"grammar": gbnf_grammar(2)}


def test_a_completion_at_the_token_limit_is_cut_off(scripted_server, paths):
    scripted_server.replies(completion("<think>Image 1: and so", finish_reason="length"))
    results = remote_reranker(scripted_server).rank("Which?", paths)
    assert results.defects == ("no_think", "no_answer", "cut_off")
    assert results.order == [0, 1, 2]


def test_a_temporary_error_is_retried(scripted_server, paths):
    scripted_server.replies(Reply(503, {"error": {"message": "busy"}}, {"Retry-After": "0.05"}), completion(GOOD))
    assert remote_reranker(scripted_server).rank("Which?", paths[:2]).order == [1, 0]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(404, {"error": {"message": "no such model"}}), r"rejects the request \(404: no such model\)"),
        (Reply(500, {"detail": "broken"}, {"Retry-After": "0.05"}), r"rejects the request \(500: broken\)"),
        (Reply(body="<html>"), "is not a chat completion"),
        (Reply(body={"choices": []}), "is not a chat completion"),
        (Reply(0), "can't be reached .* after 2 attempts"),
    ],
)
def test_a_permanent_error_is_raised(scripted_server, paths, reply, message):
    scripted_server.replies(reply)
    with pytest.raises(InputError, match=message):
        remote_reranker(scripted_server).rank("Which?", paths)


def test_the_api_key_comes_from_the_environment_and_stays_out_of_errors(scripted_server, paths, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    scripted_server.replies(Reply(401, {"error": {"message": "bad key"}}))
    with pytest.raises(InputError, match="401: bad key") as raised:
        remote_reranker(scripted_server).rank("Which?", paths)
    assert scripted_server.keys[0] == "Bearer sk-secret"
    assert "sk-secret" not in str(raised.value)


def test_wrong_or_missing_server_settings_are_named(scripted_server):
    with pytest.raises(InputError, match="needs the model in this process"):
        remote_reranker(scripted_server, mode="logits")
    with pytest.raises(InputError, match="expected a URL such as http://localhost:8000/v1, found localhost"):
        Reranker("tiny", server={"url": "localhost:80", "model": "m"})
    with pytest.raises(InputError, match="the prompt and page sizes that its model was trained with are unknown"):
        Reranker(server={"url": scripted_server.base_url, "model": "m"}, prompt="default")
    with pytest.raises(InputError, match="field model: Field required"):
        Reranker("tiny", server={"url": scripted_server.base_url})
