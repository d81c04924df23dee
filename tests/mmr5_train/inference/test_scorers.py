"""Pointwise rerankers as systems: a real `CrossEncoder` of tiny random models, and rerank endpoints."""

import json
from pathlib import Path

import pytest
from PIL import Image
from rerank_server import run_server
from sample_runs import make_data
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tiny_qwen3 import write_qwen3

from mmr5_train import evaluate
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_records
from mmr5_train.inference.scorers import (
    CrossEncoderOptions,
    CrossEncoderScorer,
    EndpointOptions,
    EndpointScorer,
    PageScores,
    PointwiseReranker,
    ranked_by_score,
    read_scores,
)
from mmr5_train.inference.systems import System
from mmr5_train.models.loading import TINY
from mmr5_train.ranking.records import Ranking

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == "text" %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif -%}
{%- endfor -%}
<|im_end|>
{% endfor -%}
<|im_start|>assistant
so it"""
TOKENS = {"true_token": " helps", "false_token": " does"}
PLAIN = {"path": str(TINY), "chat_template": TEMPLATE, "dtype": "float32", **TOKENS}


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """A Qwen3-VL reranker in the form in which Qwen3-VL-Reranker is published."""
    folder = tmp_path_factory.mktemp("cross-encoder")
    base = write_qwen3(tmp_path_factory.mktemp("qwen3-vl"))
    transformer = Transformer(
        str(base), transformer_task="any-to-any", processor_kwargs={"chat_template": TEMPLATE}
    )
    ids = [transformer.tokenizer(word, add_special_tokens=False).input_ids[0] for word in TOKENS.values()]
    CrossEncoder(modules=[transformer, LogitScore(*ids)]).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def images(page_folder):
    return [Image.open(page_folder / f"page-{i}.png").convert("RGB") for i in range(3)]


def test_a_plain_model_scores_by_the_logits_of_two_tokens(images):
    scorer = CrossEncoderScorer(CrossEncoderOptions(**PLAIN), batch_size=2)
    [scored, other] = scorer.score(["Which page is green?", "Which?"], [images, images[:1]], None)
    one_by_one = [float(scorer.model.predict([("Which page is green?", image)])[0]) for image in images]
    assert scored.scores == pytest.approx(one_by_one, abs=1e-5)
    assert len(set(scored.scores)) == 3
    assert len(other.scores) == 1
    assert scored.prompt_tokens > 3 * other.prompt_tokens > 3 * 12, (
        "more words in the question, and 12 visual tokens"
    )


def test_a_published_form_of_a_reranker_loads_by_its_path(cross_encoder, images):
    options = CrossEncoderOptions(path=str(cross_encoder), dtype="float32", instruction="Find the page.")
    scorer = CrossEncoderScorer(options, batch_size=8)
    [with_instruction] = scorer.score(["Which?"], [images], None)
    pairs = [("Which?", image) for image in images]
    reference = CrossEncoder(str(cross_encoder))
    assert with_instruction.scores == pytest.approx(
        reference.predict(pairs, prompt="Find the page.").tolist(), abs=1e-5
    )
    assert with_instruction.scores != pytest.approx(reference.predict(pairs).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/no/such/model"}, "crossencoder: /no/such/model can't be loaded"),
        ({**PLAIN, "true_token": "a red bar chart"}, "'a red bar chart' must be one token"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(options, message):
    with pytest.raises(InputError, match=message):
        CrossEncoderScorer(CrossEncoderOptions(**options), batch_size=1)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="give both or neither"):
        CrossEncoderOptions(path="a", true_token="yes")
    with pytest.raises(ValueError, match="chat_template and processor belong"):
        CrossEncoderOptions(path="a", processor="b")


def test_equal_scores_keep_the_order_of_the_input():
    ranked = ranked_by_score(PageScores([0.1, 0.7, 0.1, 0.9], 40), 4)
    assert ranked.order == [3, 1, 0, 2]
    answer = ranked.merged_answer()
    assert answer.scores == (0.9, 0.7, 0.1, 0.1)
    assert (answer.order, answer.prompt_tokens, answer.defects) == ((4, 2, 1, 3), 40, ())
    with pytest.raises(InputError, match="expected scores of 2 pages, found 1"):
        ranked_by_score(PageScores([0.5], 1), 2)


@pytest.mark.parametrize("form", ["data_url", "image", "content"])
def test_an_endpoint_ranks_with_every_form_of_a_page(images, form):
    with run_server() as server:
        scorer = EndpointScorer(EndpointOptions(url=f"{server.url}/v1", model="fake", documents=form))
        ranked = PointwiseReranker(scorer).rank_images(["red?", "again?"], [images, images[:2]])
    redness = [row.getpixel((0, 0)) for row in images]
    expected = sorted(range(3), key=lambda i: -(redness[i][0] - (redness[i][1] + redness[i][2]) / 2))
    assert ranked[0].order == expected
    assert sorted(ranked[1].order) == [0, 1]
    assert list(ranked[0].scores) == sorted(ranked[0].scores, reverse=True)


@pytest.mark.parametrize(
    "reply",
    [
        "not JSON",
        "[]",
        json.dumps({"results": [{"index": 0, "relevance_score": 1}]}),
        json.dumps({"results": [{"index": 0}, {"index": 1}]}),
        json.dumps({"error": "busy"}),
    ],
)
def test_an_unusable_reply_is_shown(reply):
    with pytest.raises(InputError, match=r"http://x/v1/rerank: expected results with index and relevance_score"):
        read_scores(reply, 2, "http://x/v1")


def test_scores_of_voyage_and_missing_usage_are_read():
    rows = [{"index": 1, "relevance_score": 0.2}, {"index": 0, "relevance_score": 0.9}]
    assert read_scores(json.dumps({"data": rows, "usage": {"total_tokens": 7}}), 2, "u") == ([0.9, 0.2], 7)
    assert read_scores(json.dumps({"results": rows}), 2, "u") == ([0.9, 0.2], None)


def test_all_kinds_are_evaluated_side_by_side(cross_encoder, tmp_path):
    make_data(tmp_path / "data", questions=3, candidates=3)
    with run_server() as server:
        systems = {
            "ours": {"checkpoint": "tiny", "mode": "logits"},
            "cross": {"crossencoder": {"path": str(cross_encoder), "dtype": "float32"}},
            "server": {"endpoint": {"url": f"{server.url}/v1", "model": "fake"}},
        }
        config = compose_stage(
            evaluate.EvaluateStage,
            "evaluate",
            [
                f"data={tmp_path}/data/heldout.jsonl",
                f"out={tmp_path}/out",
                f"systems={hydra(systems)}",
                "samples=1",
            ],
        )
        evaluate.main(config)
    for name in systems:
        rankings = read_records(tmp_path / f"out/rankings/{name}.jsonl", Ranking)
        assert [len(ranking.greedy.scores) for ranking in rankings] == [3, 3, 3], name
        assert all(not ranking.samples for ranking in rankings)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["system"] for row in results["rows"]] == ["first_stage", *systems]
    pairs = {(row["system"], row["baseline"]) for row in results["differences"]}
    assert {("cross", "ours"), ("server", "cross")} <= pairs
    timing = json.loads((tmp_path / "out/timing.json").read_text())
    assert timing["cross"]["prompt_tokens"] > 3 * 12


def hydra(value):
    """A nested dict as Hydra's command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    return f"'{value}'" if ":" in str(value) else str(value)


def test_known_cross_encoders_are_options():
    folder = Path(__file__).resolve().parents[3] / "configs/crossencoder"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    assert len(names) >= 4
    for name in names:
        assert "/" in System(crossencoder=name).crossencoder.path
    qwen = System(crossencoder={"name": "qwen3_vl_reranker_2b", "max_pixels": 400_000}).crossencoder
    assert (qwen.path, qwen.max_pixels) == ("Qwen/Qwen3-VL-Reranker-2B", 400_000)
    assert System(crossencoder="org/other").crossencoder == CrossEncoderOptions(path="org/other")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, "none of them"),
        ({"checkpoint": "tiny", "crossencoder": "a/b"}, "checkpoint and crossencoder"),
        (
            {"endpoint": {"url": "http://x", "model": "m"}, "server": {"url": "http://x", "model": "m"}},
            "endpoint and server",
        ),
    ],
)
def test_a_system_is_of_one_kind(fields, found):
    with pytest.raises(
        ValueError, match=f"expected a checkpoint, a server, a crossencoder or an endpoint, found {found}"
    ):
        System(**fields)
