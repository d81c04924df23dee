"""The precision of the trained weights, and the frozen vision tower."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from mmr5_train import grpo, sft
from mmr5_train.common.config import compose_stage
from mmr5_train.models.loading import TINY
from mmr5_train.ranking.rewards import REWARDS
from mmr5_train.training.adapters import keep_float32_weights

SMALL_STEPS = [
    "model.dtype=bfloat16",
    "override_checkpoint=true",
    "trainer.learning_rate=1e-5",
    "trainer.lr_scheduler_type=constant",
]
SETTINGS = {
    "sft": ["trainer={per_device_train_batch_size:2,max_steps:2,save_steps:2,warmup_steps:0}"],
    "grpo": [
        "trainer={per_device_train_batch_size:8,num_generations:4,max_completion_length:16,warmup_steps:0}",
        "trainer={max_steps:2,save_steps:2}",
    ],
}


def run(stage, data, out, *overrides):
    main, model = {"sft": (sft.main, sft.SftStage), "grpo": (grpo.main, grpo.GrpoStage)}[stage]
    main(compose_stage(model, stage, [f"data={data}", f"out={out}", *SETTINGS[stage], *SMALL_STEPS, *overrides]))


@pytest.mark.parametrize("stage", SETTINGS)
def test_small_updates_of_a_bfloat16_model_are_not_rounded_away(stage, traces, questions, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "reranking", lambda text, *_, **__: len(text) % 7 / 6)
    run(stage, {"sft": traces, "grpo": questions}[stage], tmp_path / "out", "model.lora=null")
    before = load_file(TINY / "model.safetensors")
    trained = load_file(tmp_path / "out/checkpoint-2/model.safetensors")
    names = [name for name in trained if "mlp" in name and "language_model" in name]
    changes = []
    for name in names:
        old = before[name.replace("model.language_model", "model")].bfloat16()
        assert trained[name].dtype == torch.float32
        changes.append((trained[name] != old.float()).float().mean().item())
    assert len(changes) > 5
    assert min(changes) > 0.95, "with bfloat16 weights, Adam's updates of 1e-5 change few of them"
    saved = load_file(tmp_path / "out/model/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("deepspeed", [False, True])
def test_trained_weights_are_float32_unless_deepspeed_keeps_copies(deepspeed, tiny):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).bfloat16()
    network[0].requires_grad_(False)
    trainer = SimpleNamespace(model=network, is_deepspeed_enabled=deepspeed)
    keep_float32_weights(trainer, tiny.model_copy(update={"dtype": "bfloat16"}))
    dtypes = [parameter.dtype for parameter in network.parameters()]
    assert dtypes == [torch.bfloat16] * 2 + [torch.bfloat16 if deepspeed else torch.float32] * 2


@pytest.mark.parametrize(("freeze", "lora"), [(True, "{r:4,alpha:8}"), (False, "null")])
def test_frozen_tower_has_no_backward_pass(freeze, lora, traces, tmp_path, monkeypatch):
    """With gradient checkpointing and LoRA, transformers makes the patch embeddings require gradients.

    In training mode, the layers would be checkpointed, which with `use_reentrant` warns at each forward pass.
    """
    states = []
    tower = Qwen2_5_VisionTransformerPretrainedModel
    forward = tower.forward

    def record(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        states.append((output.last_hidden_state.requires_grad, self.blocks[0].training))
        return output

    monkeypatch.setattr(tower, "forward", record)
    overrides = [f"model.freeze_vision={freeze}", f"model.lora={lora}", "trainer.gradient_checkpointing=true"]
    run("sft", traces, tmp_path / "out", *overrides)
    assert set(states) == {(not freeze, not freeze)}
