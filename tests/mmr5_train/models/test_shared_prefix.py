"""Packed rows compared with separate rows: same log-probabilities, same gradients, same sampled tokens."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from trl.trainer.utils import add_fused_lm_head

from mmr5_train.models.inputs import encode, load_pages
from mmr5_train.models.loading import load_model, vision_token_ids
from mmr5_train.models.shared_decoding import generate
from mmr5_train.models.shared_prefix import (
    pack,
    share_prefixes,
    shared_prompts,
    takes_image_features,
    unsupported_reason,
)

TEXT_CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def prompts(tiny, prompt, processor, tasks, page_folder):
    """Model inputs of two prompts, one with three pages and one with two."""
    prompts = []
    for task, count in zip(tasks[:2], (3, 2), strict=True):
        images = load_pages(task.candidates[:count], page_folder, processor)
        prompts.append(encode(processor, prompt, [task.query], [images]))
    return prompts


@pytest.fixture(scope="module")
def models(tiny):
    """The tiny model as it is, and a copy that shares prefixes, both with TRL's loss head."""
    plain, shared = load_model(tiny).eval(), load_model(tiny).eval()
    add_fused_lm_head(plain, outputs=("log_probs", "entropy"))
    add_fused_lm_head(shared, outputs=("log_probs", "entropy"))
    share_prefixes(shared)
    return plain, shared


def shared_prompt(model, encoded, features=True):
    pixels = {key: encoded[key] for key in ("pixel_values", "image_grid_thw")}
    rows = encoded["input_ids"], encoded["mm_token_type_ids"]
    return shared_prompts(model, *rows, pixels, [len(pixels["image_grid_thw"])], keep_features=features)[0]


def random_completions(lengths, vocabulary, seed):
    """(N, C) right-padded random tokens and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(max(lengths), 1)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(20, vocabulary, mask.shape, generator=generator)  # past the vision tokens
    return ids * mask, mask.long()


def plain_log_probs(model, encoded, completions, mask):
    """The expected values: each completion in a separate row, after its own copy of the prompt."""
    rows = []
    for ids, completion_mask in zip(completions, mask, strict=True):
        row = torch.cat([encoded["input_ids"][0], ids])[None]
        attended = torch.cat([encoded["attention_mask"][0], completion_mask])[None]
        labels = row.masked_fill(attended == 0, -100)
        labels[:, : encoded["input_ids"].shape[1]] = -100
        inputs = {key: encoded[key] for key in ("pixel_values", "image_grid_thw") if key in encoded}
        if inputs:
            types = encoded["mm_token_type_ids"][0]
            inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(ids)])[None]
        outputs = model(input_ids=row, attention_mask=attended, labels=labels, fused_lm_head=True, **inputs)
        rows.append((outputs.log_probs[0, -len(ids) :], outputs.entropy[0, -len(ids) :]))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def packed_log_probs(model, prompts, completions, mask, counts):
    packed = pack(prompts, completions.split(counts), mask)
    outputs = model(**packed.inputs, labels=packed.labels, fused_lm_head=True)
    return packed.unpack(outputs.log_probs), packed.unpack(outputs.entropy)


def gradients(model, values, mask):
    """Gradients of a sum in which each completion token has a different weight."""
    model.zero_grad()
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(expected, actual):
    assert expected.keys() == actual.keys()
    assert expected
    for name, gradient in expected.items():
        # Relative to the largest entry: the rounding error of a sum over hundreds of tokens is not relative to
        # each.
        assert (actual[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@examples(max_examples=8)
@given(
    first=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    second=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    features=st.booleans(),
    seed=st.integers(0, 99),
)
def test_log_probabilities_entropies_and_gradients_are_the_same(models, prompts, first, second, features, seed):
    plain, shared = models
    completions, mask = random_completions([*first, *second], 300, seed)
    groups = completions.split([len(first), len(second)])
    masks = mask.split([len(first), len(second)])
    expected = [plain_log_probs(plain, *row) for row in zip(prompts, groups, masks, strict=True)]
    expected_log_probs, expected_entropies = (torch.cat(part) for part in zip(*expected, strict=True))
    shared_by_group = [shared_prompt(shared, encoded, features) for encoded in prompts]
    log_probs, entropies = packed_log_probs(shared, shared_by_group, completions, mask, [len(first), len(second)])
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies * mask, expected_entropies * mask, atol=1e-4, rtol=0)
    if mask.any():
        assert_same_gradients(gradients(plain, expected_log_probs, mask), gradients(shared, log_probs, mask))


def test_the_error_in_bfloat16_is_that_of_separate_rows(tiny, models, prompts):
    completions, mask = random_completions([12, 5, 9, 12], 300, 4)
    half = tiny.model_copy(update={"dtype": "bfloat16"})
    plain, shared = load_model(half).eval(), load_model(half).eval()
    for model in (plain, shared):
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    share_prefixes(shared)
    with torch.no_grad():
        exact, _ = plain_log_probs(models[0], prompts[0], completions, mask)
        separate, _ = plain_log_probs(plain, prompts[0], completions, mask)
        packed, _ = packed_log_probs(shared, [shared_prompt(shared, prompts[0])], completions, mask, [4])
    separate_error, packed_error = (
        ((values - exact) * mask).abs().sum() / mask.sum() for values in (separate, packed)
    )
    assert 0 < packed_error < 1.3 * separate_error


def test_gradients_are_the_same_with_adapters_and_checkpointing(tiny, prompts):
    torch.manual_seed(0)
    plain, shared = load_model(tiny), load_model(tiny)
    adapters = LoraConfig(
        r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", init_lora_weights=False
    )
    for model in (plain, shared):
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    share_prefixes(shared)
    plain = get_peft_model(plain, adapters)
    shared = get_peft_model(shared, copy.deepcopy(adapters))
    shared.load_state_dict(plain.state_dict())
    for model in (plain, shared):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    completions, mask = random_completions([9, 4, 7], 300, 3)
    expected, _ = plain_log_probs(plain, prompts[0], completions, mask)
    actual, _ = packed_log_probs(
        shared, [shared_prompt(shared.get_base_model(), prompts[0])], completions, mask, [3]
    )
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    expected_gradients = gradients(plain, expected, mask)
    assert all("lora" in name for name in expected_gradients)
    assert_same_gradients(expected_gradients, gradients(shared, actual, mask))


@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_text_models_give_the_same_log_probabilities_and_samples(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[kind](**SMALL)).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = [torch.randint(3, 97, (1, n)) for n in (11, 6)]
    encoded = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    completions, mask = random_completions([5, 3, 6, 0], 97, 1)
    rows = zip(encoded, completions.split([2, 2]), mask.split([2, 2]), strict=True)
    expected = torch.cat([plain_log_probs(model, *row)[0] for row in rows])
    config = GenerationConfig(max_new_tokens=12, do_sample=True, pad_token_id=0, eos_token_id=2)
    torch.manual_seed(1)
    sampled = model.generate(ids[0].repeat(3, 1), generation_config=config)[:, 11:]
    share_prefixes(model)
    prompts = shared_prompts(model, [row[0] for row in ids])
    actual, _ = packed_log_probs(model, prompts, completions, mask, [2, 2])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    torch.manual_seed(1)
    assert generate(model, prompts[:1], 3, config).tolist() == sampled.tolist()


@pytest.mark.parametrize("do_sample", [False, True])
def test_generated_completions_are_identical(models, processor, prompt, tasks, page_folder, do_sample):
    """Four completions of three prompts that differ in length: greedy, and sampled with the same seed."""
    plain, shared = models
    candidates = [task.candidates[:count] for task, count in zip(tasks[:3], (3, 2, 3), strict=True)]
    images = [load_pages(row, page_folder, processor) for row in candidates]
    queries = [task.query for task in tasks[:3]]
    tokenizer = processor.tokenizer
    config = GenerationConfig(
        max_new_tokens=60,
        do_sample=do_sample,
        temperature=1.0 if do_sample else None,
        top_k=0 if do_sample else None,
        suppress_tokens=vision_token_ids(processor),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    copies = [i for i in range(3) for _ in range(4)]
    batch = encode(processor, prompt, [queries[i] for i in copies], [images[i] for i in copies])
    torch.manual_seed(7)
    expected = plain.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
    single = [encode(processor, prompt, [query], [row]) for query, row in zip(queries, images, strict=True)]
    torch.manual_seed(7)
    actual = generate(shared, [shared_prompt(shared, encoded) for encoded in single], 4, config)
    assert actual.tolist() == expected.tolist()
    if do_sample:
        assert len({tuple(row) for row in actual.tolist()}) > 3


def test_ordinary_forward_and_saving_are_not_affected(models, prompts, tmp_path):
    plain, shared = models
    inputs = prompts[0]
    torch.testing.assert_close(shared(**inputs).logits, plain(**inputs).logits, atol=1e-4, rtol=0)
    shared.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()


def test_image_features_and_pixels_give_the_same_values(models, prompts):
    _, shared = models
    completions, mask = random_completions([6, 6], 300, 2)
    with_features = shared_prompt(shared, prompts[0])
    with_pixels = shared_prompt(shared, prompts[0], features=False)
    assert bool(with_features.images) == takes_image_features(shared)
    assert not with_pixels.images
    with torch.no_grad():
        from_features, _ = packed_log_probs(shared, [with_features], completions, mask, [2])
        from_pixels, _ = packed_log_probs(shared, [with_pixels], completions, mask, [2])
    torch.testing.assert_close(from_features, from_pixels, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def qwen3_vl():
    """A random Qwen3-VL with two DeepStack layers, and its input: 30 text tokens around two images."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = Qwen3VLConfig(
        text_config={**SMALL, "num_hidden_layers": 3, "rope_scaling": {"mrope_section": [2, 1, 1]}},
        vision_config={**vision, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        image_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
        video_token_id=8,
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():  # zero in a new model, so nothing would depend on these features
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.bias.normal_()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    text = torch.randint(20, 97, (30,)).split(10)
    grids = torch.tensor([[1, 4, 4], [1, 2, 6]])
    images = [torch.tensor([6, *[5] * (int(grid.prod()) // 4), 7]) for grid in grids]
    ids = torch.cat([text[0], images[0], text[1], images[1], text[2]])[None]
    encoded = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 5).long(),
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 3 * 2 * 16 * 16),
        "image_grid_thw": grids,
    }
    return model, encoded


@pytest.mark.parametrize("lengths", [[5, 0, 7], [2, 2], [20, 20]])  # a masked block, or a row for each completion
@pytest.mark.parametrize("features", [False, True])
def test_qwen3_vl_with_deepstack_gives_the_same_values(qwen3_vl, lengths, features):
    model, encoded = qwen3_vl
    completions, mask = random_completions(lengths, 97, 1)
    expected, entropies = plain_log_probs(model, encoded, completions, mask)
    config = GenerationConfig(max_new_tokens=9, do_sample=True, pad_token_id=0, eos_token_id=2)
    torch.manual_seed(1)
    sampled = model.generate(**encoded, generation_config=config, num_return_sequences=3)
    expected_gradients = gradients(model, expected, mask)
    share_prefixes(model)
    prompt = shared_prompt(model, encoded, features)
    assert [len(image) for image in prompt.images] == ([3, 3] if features else [])
    actual, actual_entropies = packed_log_probs(model, [prompt], completions, mask, [len(lengths)])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(actual_entropies * mask, entropies * mask, atol=1e-4, rtol=0)
    actual_gradients = gradients(model, actual, mask)
    if not features:  # with features, the vision tower gets no gradients
        assert_same_gradients(expected_gradients, actual_gradients)
    torch.manual_seed(1)
    tokens = generate(model, [prompt], 3, config)
    assert tokens.tolist() == sampled[:, encoded["input_ids"].shape[1] :].tolist()


def test_unsupported_models_are_rejected_with_a_reason():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97))
    assert "gpt2 is not among the tested ones" in unsupported_reason(model)
    with pytest.raises(ValueError, match="prefixes can't be shared: model type gpt2"):
        share_prefixes(model)
    sliding = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert "not full attention" in unsupported_reason(AutoModelForCausalLM.from_config(sliding))
    dropping = LlamaConfig(**SMALL, attention_dropout=0.1)
    assert "dropout" in unsupported_reason(AutoModelForCausalLM.from_config(dropping))
