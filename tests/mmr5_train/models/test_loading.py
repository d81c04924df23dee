"""Loading checkpoints and processors, and the errors for unusable ones."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, Gemma3ImageProcessor, GotOcr2ImageProcessor, SmolVLMImageProcessor

from mmr5_train.common.files import InputError
from mmr5_train.inference.local import load_backend
from mmr5_train.models.loading import (
    TINY,
    default_model_config,
    load_model,
    load_processor,
    resolve_checkpoint,
    vision_token_ids,
)


def test_resolve_checkpoint_accepts_tiny_folders_and_hub_ids(tmp_path):
    assert resolve_checkpoint("tiny") == str(TINY)
    assert resolve_checkpoint(TINY) == str(TINY)
    assert resolve_checkpoint("i2vec/MM-R5") == "i2vec/MM-R5"
    with pytest.raises(InputError, match="no such checkpoint folder; run the stage"):
        resolve_checkpoint(tmp_path / "missing")
    with pytest.raises(InputError, match=r"is not a checkpoint, since it has no config\.json"):
        resolve_checkpoint(tmp_path)


def test_resolve_checkpoint_rejects_an_adapter_without_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter without its base; use the merged checkpoint"):
        resolve_checkpoint(tmp_path)


def test_a_text_model_is_rejected(tiny, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(InputError, match="not a vision-language model"):
        load_model(tiny, tmp_path)
    with pytest.raises(InputError, match="processor"):
        load_processor(tiny, tmp_path)


def test_the_truncated_part_of_a_checkpoint_is_named(tiny, tmp_path):
    contents = {path.name: path.read_bytes() for path in TINY.iterdir()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, part, load in (
        ("model.safetensors", "model", load_model),
        ("config.json", "config", load_model),
        ("processor_config.json", "processor", load_processor),
        ("tokenizer.json", "processor", load_processor),
    ):
        (tmp_path / name).write_bytes(contents[name][: len(contents[name]) // 2])
        with pytest.raises(InputError, match=rf"its {part} can't be loaded .*write the folder again"):
            load(tiny, tmp_path)
        (tmp_path / name).write_bytes(contents[name])


def test_freeze_vision_freezes_only_the_vision_tower(tiny):
    frozen = load_model(tiny)
    assert not any(p.requires_grad for p in frozen.model.visual.parameters())
    assert all(p.requires_grad for p in frozen.model.language_model.parameters())
    trainable = load_model(tiny.model_copy(update={"freeze_vision": False}))
    assert all(p.requires_grad for p in trainable.parameters())


def test_vision_token_ids_contain_image_tokens_and_no_text_tokens(processor):
    names = processor.tokenizer.convert_ids_to_tokens(vision_token_ids(processor))
    assert "<|image_pad|>" in names
    assert "<|vision_start|>" in names
    assert not {"<|im_end|>", "<think>", "<answer>"} & set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_flash_attention_without_a_gpu_is_rejected(tiny):
    config = tiny.model_copy(update={"attention": "flash_attention_2", "dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"flash_attention_2: needs a CUDA GPU, .* found no GPU"):
        load_model(config)


def test_4bit_loading_quantizes_the_language_model_and_not_the_vision_tower(tiny):
    full, quantized = (load_model(tiny.model_copy(update={"load_in_4bit": value})) for value in (False, True))
    assert quantized.model.visual.state_dict().keys() == full.model.visual.state_dict().keys()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert quantized.get_parameter(name).numel() * 2 == full.get_parameter(name).numel()  # two weights per byte
    assert quantized.get_parameter(name).element_size() == 1


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (GotOcr2ImageProcessor, "merge_size"),  # InternVL
        (Gemma3ImageProcessor, "merge_size"),
        (SmolVLMImageProcessor, "merge_size"),
    ],
)
def test_an_image_processor_with_another_rule_is_refused(monkeypatch, kind, missing):
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda source: SimpleNamespace(image_processor=kind()))
    message = (
        rf"its {kind.__name__} has no [^;]*{missing}.*size\['shortest_edge'\].*Serve the checkpoint with vLLM"
    )
    with pytest.raises(InputError, match=message):
        default_model_config("tiny")


def test_a_model_that_takes_no_image_features_is_refused(monkeypatch):
    monkeypatch.setattr("mmr5_train.inference.local.takes_image_features", lambda model: False)
    with pytest.raises(InputError, match="tiny: model type qwen2_5_vl takes no image features"):
        load_backend("tiny")
