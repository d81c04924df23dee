"""The plan's sizes are those of real models, and its warnings name a knob."""

import pytest

from mmr5_train import plan
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError
from mmr5_train.models.loading import load_model
from mmr5_train.models.shapes import SHAPES, empty_model


def compose(*overrides):
    return compose_stage(plan.PlanStage, "plan", overrides)


@pytest.mark.parametrize(
    ("path", "billions"), [("3B", 3.75), ("7B", 8.29), ("32B", 33.45)], ids=["3B", "7B", "32B"]
)
def test_published_sizes(path, billions):
    """The parameter counts on the checkpoints' pages."""
    name = f"Qwen/Qwen2.5-VL-{path}-Instruct"
    assert name in SHAPES
    total = sum(parameter.numel() for parameter in empty_model(name).parameters())
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_tiny_model_is_counted_exactly(tiny):
    model = load_model(tiny)
    found = plan.measure(tiny)
    assert found.language + found.vision == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_papers_recipe(capsys):
    plan.main(compose("experiment=mm_r5", "gpu=a100_80gb", "gpus=4"))
    said = capsys.readouterr().out
    assert "Qwen/Qwen2.5-VL-7B-Instruct: 8.29 billion parameters" in said
    assert said.count("memory a GPU at the longest prompt") == 2
    assert "5 pages of 724 × 1024 pixels" in said  # no data has been made
    assert "WARNING" not in said
    assert "1,800 updates" not in said


def test_steps_follow_the_batch():
    """7,200 examples at 4 GPUs × 4 are 450 updates; 3,000 questions × 4 × 2 at 4 × 2 are 3,000."""
    report = plan.plan(compose("experiment=mm_r5", "gpus=4"))
    assert report["sft"][-1].startswith("450 updates")
    assert report["grpo"][-1].startswith("3,000 updates")


def test_what_does_not_fit_is_said_with_the_knob(capsys):
    plan.main(compose("experiment=mm_r5", "gpu=rtx_4090", "gpus=1"))
    said = capsys.readouterr().out
    assert "WARNING: ddp, zero2, zero3" in said
    assert "Take a smaller model" in said or "zero3_offload does" in said


def test_more_gpus_and_smaller_pages_take_less():
    def sums(*overrides):
        config = compose("experiment=recommended", *overrides)
        report = plan.plan(config)["grpo"]
        return [float(x) for x in next(line for line in report if line.strip().startswith("sum")).split()[1:]]

    few, many = sums("gpus=2"), sums("gpus=8")
    assert all(b <= a for a, b in zip(few, many, strict=True))
    assert sums("+stages.grpo.model.max_pixels=401408")[0] < few[0]


def test_page_sizes_come_from_the_data(tmp_path, capsys):
    from made_up import make_data

    from mmr5_train.common.files import read_records, write_records
    from mmr5_train.ranking.records import RankingTask

    data = tmp_path / "shared/data"
    make_data(data, questions=6)
    write_records(data / "train.jsonl", read_records(data / "heldout.jsonl", RankingTask))
    write_records(data / "select.jsonl", read_records(data / "heldout.jsonl", RankingTask))
    plan.main(compose("experiment=recommended", "size=tiny", f"shared={tmp_path}/shared", "gpus=1"))
    said = capsys.readouterr().out
    assert "6 questions of" in said
    assert "prompts: 260 tokens, longest 260" in said  # five pages of 3 × 4 visual tokens and the words


def test_an_unknown_card_is_named():
    with pytest.raises(InputError, match="gpu: no card is called b200 "):
        plan.main(compose("gpu=b200"))
