"""The model card is built from manifests and results. Nothing is uploaded without push_to_hub."""

import json

import pytest
from huggingface_hub import HfApi, ModelCard

from mmr5_train import publish
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, write_json, write_manifest
from mmr5_train.models.loading import SETTINGS


@pytest.fixture
def trained(tmp_path):
    """Output folders of sft, grpo and evaluate, without weights. The evaluation compared both checkpoints."""
    for stage, base in (("sft", "Qwen/Qwen2.5-VL-7B-Instruct"), ("grpo", str(tmp_path / "sft/model"))):
        folder = tmp_path / stage / "model"
        folder.mkdir(parents=True)
        write_json(folder / SETTINGS, {"think": True, "max_pixels": 12_845_056})
        config = {"model": {"path": base}, "seed": 42, "trainer": {"learning_rate": 1e-5}}
        write_manifest(tmp_path / stage, stage=stage, config=config, counts={"steps": 7})
    checkpoints = {stage: str(tmp_path / stage / "model") for stage in ("sft", "grpo")}
    systems = {
        "sft": checkpoints["sft"],
        "server": {"server": {}},
        "grpo": {"checkpoint": checkpoints["grpo"], "mode": "reason"},
    }
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    write_manifest(evaluation, stage="evaluate", config={"systems": systems, "data": "heldout.jsonl"})
    rows = [
        {"system": name, "questions": 320, "recall@1": r, "recall@3": 0.9, "recall@5": None, "mrr": 0.8}
        for name, r in (("first_stage", 0.2), ("sft", 0.6), ("grpo", 0.65))
    ]
    write_json(evaluation / "results.json", {"rows": rows})
    return tmp_path


def run(*overrides):
    publish.main(compose_stage(publish.PublishStage, "publish", ["license=apache-2.0", *overrides]))


def test_model_card_has_results_and_settings_and_is_not_uploaded(trained, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("uploaded without push_to_hub"))
    run(f"checkpoint={trained}/grpo/model", f"evaluation={trained}/evaluation", "data='7,200 traces of MMDocIR.'")
    card = ModelCard.load(trained / "grpo/model/README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert card.data.license == "apache-2.0"
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("recall@1", 0.65), ("recall@3", 0.9), ("mrr", 0.8),
    }  # fmt: skip
    assert "On 320 questions of `heldout.jsonl`" in card.text
    assert "7,200 traces of MMDocIR." in card.text
    assert card.text.index("### sft") < card.text.index("### grpo")
    assert "learning_rate: 1.0e-05" in card.text


def test_a_checkpoint_that_was_evaluated_in_several_modes(trained):
    """As the stage `modes` of a recipe does. The checkpoint's default mode gives the results in the metadata."""
    checkpoint = str(trained / "grpo/model")
    systems = {
        "direct": {"checkpoint": checkpoint, "mode": "direct", "constrain": True},
        "reason": checkpoint,
        "logits": {"checkpoint": checkpoint, "mode": "logits"},
        "other": {"checkpoint": "org/other", "mode": "reason"},
    }
    evaluation = trained / "modes"
    evaluation.mkdir()
    write_manifest(evaluation, stage="evaluate", config={"systems": systems, "data": "heldout.jsonl"})
    recalls = {"first_stage": 0.2, "direct": 0.5, "reason": 0.6, "logits": 0.55, "other": 0.9}
    rows = [
        {"system": name, "questions": 320, "recall@1": r, "recall@3": None if name == "direct" else 0.9}
        for name, r in recalls.items()
    ]
    write_json(evaluation / "results.json", {"rows": rows})
    run(f"checkpoint={checkpoint}", f"evaluation={evaluation}")
    card = ModelCard.load(trained / "grpo/model/README.md")
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("recall@1", 0.6),
        ("recall@3", 0.9),
    }
    table = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert table == [
        "| System | Mode | Recall@1 | Recall@3 |",
        "| reason | `reason` | 0.600 | 0.900 |",
        "| direct | `direct` | 0.500 | – |",
        "| logits | `logits` | 0.550 | 0.900 |",
    ]


def test_card_without_evaluation_says_so(trained):
    run(f"checkpoint={trained}/sft/model")
    assert "Not evaluated yet." in ModelCard.load(trained / "sft/model/README.md").text


def test_push_to_hub_uploads_the_checkpoint(trained, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo, **rest: calls.append((repo, rest)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **rest: calls.append(rest))
    run(f"checkpoint={trained}/grpo/model", "push_to_hub=me/reranker")
    assert calls == [
        ("me/reranker", {"private": True, "exist_ok": True}),
        {"repo_id": "me/reranker", "folder_path": trained / "grpo/model"},
    ]
    assert "https://huggingface.co/me/reranker" in capsys.readouterr().out


def test_invalid_input_is_an_error(trained, monkeypatch):
    with pytest.raises(InputError, match=rf"has no {SETTINGS}; give model/ of an sft"):
        run(f"checkpoint={trained}/grpo")
    best = trained / "grpo/best"
    best.mkdir()
    best.joinpath(SETTINGS).write_text(json.dumps({"think": True, "max_pixels": 1}))
    with pytest.raises(
        InputError, match=r"evaluation: no system of .* is .*best \(found: .*/sft/model, .*/grpo/model\)"
    ):
        run(f"checkpoint={best}", f"evaluation={trained}/evaluation")

    def refuse(*_, **__):
        raise ValueError("the token is not valid\nand more")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match="push_to_hub: me/x: the token is not valid; the model card was written"):
        run(f"checkpoint={trained}/grpo/model", "push_to_hub=me/x")
