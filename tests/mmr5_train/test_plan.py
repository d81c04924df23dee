"""The plan command: exact model sizes, steps, and warnings with advice."""

import pytest

from mmr5_train import plan
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError
from mmr5_train.models.loading import load_model
from mmr5_train.models.shapes import SHAPES, empty_model
from mmr5_train.recipes import cost


def compose(*overrides):
    return compose_stage(plan.PlanStage, "plan", overrides)


@pytest.mark.parametrize(
    ("path", "billions"), [("3B", 3.75), ("7B", 8.29), ("32B", 33.45)], ids=["3B", "7B", "32B"]
)
def test_model_shapes_have_the_published_sizes(path, billions):
    """The parameter counts are those on the checkpoints' hub pages."""
    name = f"Qwen/Qwen2.5-VL-{path}-Instruct"
    assert name in SHAPES
    total = sum(parameter.numel() for parameter in empty_model(name).parameters())
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def test_measure_counts_parameters_exactly(tiny):
    model = load_model(tiny)
    network = cost.measure(tiny)
    assert network.language + network.vision == sum(p.numel() for p in model.parameters())
    assert network.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_plan_of_mm_r5_reports_size_and_memory_without_warnings(capsys):
    plan.main(compose("experiment=mm_r5", "gpu=a100_80gb", "gpus=4"))
    output = capsys.readouterr().out
    assert "Qwen/Qwen2.5-VL-7B-Instruct: 8.29 billion parameters" in output
    assert output.count("memory per GPU at the longest prompt") == 2
    assert "5 pages of 1240 × 1754 pixels, 2,772 tokens each" in output  # assumed when there is no data
    assert "examples: 7,200 of at most 8,400 traces (7 subsets × 1,200; no corpus yet;" in output
    assert "examples: at most 3,000 questions (no corpus yet)" in output
    assert "at most 49 GB, the page images of the training set at their original size" in output
    assert "WARNING" not in output


def test_number_of_updates_is_reported():
    """SFT: 7,200 examples ÷ (4 GPUs × 4). GRPO: 3,000 questions × 4 completions × 2 iterations ÷ (4 GPUs × 2)."""
    report = plan.plan(compose("experiment=mm_r5", "gpus=4"))
    assert report["sft"][-1].startswith("450 updates")
    assert report["grpo"][-1].startswith("3,000 updates")


def test_warning_if_it_does_not_fit(capsys):
    plan.main(compose("experiment=mm_r5", "gpu=rtx_4090", "gpus=1"))
    output = capsys.readouterr().out
    assert "WARNING: does not fit: ddp, zero2, zero3" in output
    assert "Use a smaller model" in output or "Use zero3_offload." in output


def test_more_gpus_and_smaller_pages_need_less_memory():
    def sums(*overrides):
        config = compose(*overrides)
        report = plan.plan(config)["grpo"]
        return [float(x) for x in next(line for line in report if line.strip().startswith("sum")).split()[1:]]

    few, many = sums("experiment=recommended", "gpus=2"), sums("experiment=recommended", "gpus=8")
    assert all(b <= a for a, b in zip(few, many, strict=True))
    assert sums("experiment=[recommended,tokens_512]", "gpus=2")[0] < few[0]


def test_page_sizes_come_from_the_data(tmp_path, capsys):
    from sample_runs import make_data

    from mmr5_train.common.files import read_records, write_records
    from mmr5_train.ranking.records import RankingTask

    data = tmp_path / "shared/data"
    make_data(data, questions=6)
    write_records(data / "train.jsonl", read_records(data / "heldout.jsonl", RankingTask))
    write_records(data / "select.jsonl", read_records(data / "heldout.jsonl", RankingTask))
    plan.main(compose("experiment=recommended", "size=tiny", f"shared={tmp_path}/shared", "gpus=1"))
    output = capsys.readouterr().out
    assert "6 questions of" in output
    assert "prompts: 260 tokens, longest 260" in output  # 5 pages of 3 × 4 visual tokens, and TEXT_TOKENS


def test_unknown_gpu_type_is_an_error():
    with pytest.raises(InputError, match="gpu: unknown GPU type b200 "):
        plan.main(compose("gpu=b200"))
