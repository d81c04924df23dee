import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmr5_train.common.files import InputError
from mmr5_train.models.loading import TINY, load_model, load_processor, resolve_checkpoint, vision_token_ids
from mmr5_train.models.pages import load_page, page_size, prepare_page

sides = st.integers(30, 4000)


@given(width=sides, height=sides)
def test_page_size_keeps_the_limits_and_is_final(width, height):
    low, high = 4 * 28 * 28, 500_000
    size = page_size(width, height, 28, low, high)
    assert size[0] % 28 == size[1] % 28 == 0
    assert low <= size[0] * size[1] <= high
    assert page_size(*size, 28, low, high) == size


def test_the_processor_leaves_a_prepared_page_as_it_is(processor):
    noise = torch.randint(0, 256, (800, 600, 3), dtype=torch.uint8).numpy()
    page = prepare_page(Image.fromarray(noise), processor)
    assert page.size == (84, 112)
    patches = processor.image_processor(images=[page], return_tensors="pt")
    assert patches["image_grid_thw"].tolist() == [[1, 8, 6]]
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    pixels = torch.tensor(list(page.tobytes()), dtype=torch.float32).view(112, 84, 3).permute(2, 0, 1) / 255
    expected = ((pixels - mean) / std)[:, :14, :14]
    first_patch = patches["pixel_values"][0].view(3, 2, 14, 14)[:, 0]
    assert torch.allclose(first_patch, expected, atol=1e-5)


def test_a_page_file_that_cannot_be_read_is_named(processor, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png: no such page image"):
        load_page(tmp_path / "nowhere.png", processor)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but then nothing")
    with pytest.raises(InputError, match=r"broken\.png: not a readable page image"):
        load_page(tmp_path / "broken.png", processor)
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((300, 300), 40).convert("RGB").save(whole)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"half\.jpg: not a readable page image"):
        load_page(tmp_path / "half.jpg", processor)


def test_a_ribbon_is_no_page(processor):
    with pytest.raises(InputError, match="too long for its width"):
        prepare_page(Image.new("RGB", (4000, 10)), processor)


def test_checkpoints_are_checked_before_they_are_loaded(tiny, tmp_path):
    assert resolve_checkpoint("tiny") == str(TINY)
    assert resolve_checkpoint("i2vec/MM-R5") == "i2vec/MM-R5"
    with pytest.raises(InputError, match="no such checkpoint folder; run the stage"):
        resolve_checkpoint(tmp_path / "missing")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(InputError, match="not a vision-language model"):
        load_model(tiny, tmp_path)
    with pytest.raises(InputError, match="processor"):
        load_processor(tiny, tmp_path)


def test_a_broken_checkpoint_is_named(tiny, tmp_path):
    whole = {path.name: path.read_bytes() for path in TINY.iterdir()}
    for name in whole:
        (tmp_path / name).write_bytes(whole[name])
    for name, part, load in (
        ("model.safetensors", "model", load_model),
        ("config.json", "config", load_model),
        ("processor_config.json", "processor", load_processor),
        ("tokenizer.json", "processor", load_processor),
    ):
        (tmp_path / name).write_bytes(whole[name][: len(whole[name]) // 2])
        with pytest.raises(InputError, match=rf"its {part} can't be loaded .*write the folder again"):
            load(tiny, tmp_path)
        (tmp_path / name).write_bytes(whole[name])


def test_the_vision_tower_is_frozen_only_where_asked(tiny):
    frozen = load_model(tiny)
    assert not any(p.requires_grad for p in frozen.model.visual.parameters())
    assert all(p.requires_grad for p in frozen.model.language_model.parameters())
    free = load_model(tiny.model_copy(update={"freeze_vision": False}))
    assert all(p.requires_grad for p in free.parameters())


def test_vision_tokens_are_known_by_id(processor):
    names = processor.tokenizer.convert_ids_to_tokens(vision_token_ids(processor))
    assert "<|image_pad|>" in names
    assert "<|vision_start|>" in names
    assert not {"<|im_end|>", "<think>", "<answer>"} & set(names)


def test_an_adapter_without_its_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter without its base; take the merged checkpoint"):
        resolve_checkpoint(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so(tiny):
    wants = tiny.model_copy(update={"attention": "flash_attention_2", "dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"flash_attention_2: needs a CUDA GPU, .* found no GPU"):
        load_model(wants)


def test_four_bits_keep_the_tower_and_are_a_quarter(tiny):
    whole, small = (load_model(tiny.model_copy(update={"load_in_4bit": bits})) for bits in (False, True))
    assert small.model.visual.state_dict().keys() == whole.model.visual.state_dict().keys()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert small.get_parameter(name).numel() * 2 == whole.get_parameter(name).numel()  # two numbers a byte
    assert small.get_parameter(name).element_size() == 1
