"""The same code with another model type: a tiny random Qwen3-VL with the tokenizer of the tiny model."""

import json

import pytest
import torch
from PIL import Image
from tiny_qwen3 import write_qwen3
from transformers import AutoModelForImageTextToText

from mmr5_train import grpo, sft
from mmr5_train.common.config import compose_stage
from mmr5_train.inference.reranker import Reranker
from mmr5_train.models.loading import load_processor
from mmr5_train.models.pages import page_limits, prepare_page

MODEL = ["model.min_pixels=1024", "model.max_pixels=13000", "model.lora={r:4,alpha:8}"]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return write_qwen3(tmp_path_factory.mktemp("qwen3-vl"))


def test_page_sizes_are_multiples_of_its_visual_tokens(qwen3, tiny):
    processor = load_processor(tiny.model_copy(update={"min_pixels": 1024, "max_pixels": 13000}), qwen3)
    page = prepare_page(Image.new("RGB", (600, 800)), page_limits(processor))
    assert page.size == (96, 128)
    assert processor.image_processor(images=[page])["image_grid_thw"].tolist() == [[1, 8, 6]]


def test_sft_grpo_and_the_reranker_run(qwen3, traces, questions, tmp_path, capsys):
    options = [*MODEL, "trainer.max_steps=2", "trainer.logging_steps=1"]
    sft_batch = "trainer.per_device_train_batch_size=4"
    sft_overrides = [f"data={traces}", f"out={tmp_path}/sft", f"model.path={qwen3}", *options, sft_batch]
    sft.main(compose_stage(sft.SftStage, "sft", sft_overrides))
    grpo_overrides = [
        f"data={questions}",
        f"out={tmp_path}/grpo",
        f"model.path={tmp_path}/sft/model",
        *options,
        "trainer.per_device_train_batch_size=8",
        "trainer.num_generations=4",
        "trainer.max_completion_length=8",
    ]
    grpo.main(compose_stage(grpo.GrpoStage, "grpo", grpo_overrides))
    assert "grpo: prompts are shared" in capsys.readouterr().out
    history = json.loads((tmp_path / "grpo/log_history.json").read_text())
    assert sum("reward" in entry for entry in history) == 2
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict()
        for path in (tmp_path / "sft/model", tmp_path / "grpo/model")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if ".visual." in name)
    reranker = Reranker(tmp_path / "grpo/model", max_new_tokens=40)
    assert len(reranker.rank("Which?", [traces.parent / f"page-{i}.png" for i in range(3)]).order) == 3
