"""The packed row against rows of their own: same log-probabilities, same gradients, same sampled tokens."""

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
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from trl.trainer.utils import add_fused_lm_head

from mmr5_train.models.inputs import encode, load_pages
from mmr5_train.models.loading import load_model, vision_token_ids
from mmr5_train.models.shared_prefix import (
    generate,
    pack,
    share_prefixes,
    shared_prompts,
    takes_image_features,
    unsupported_model,
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
    """Two questions, one with three pages and one with two: ids, pixels and token types of each."""
    made = []
    for task, count in zip(tasks[:2], (3, 2), strict=True):
        shown = task.candidates[:count]
        made.append(encode(processor, prompt, [task.query], [load_pages(shown, page_folder, processor)]))
    return made


@pytest.fixture(scope="module")
def models(tiny):
    """The plain tiny model and a copy that shares prefixes, both with TRL's loss head."""
    plain, shared = load_model(tiny).eval(), load_model(tiny).eval()
    add_fused_lm_head(plain, outputs=("log_probs", "entropy"))
    add_fused_lm_head(shared, outputs=("log_probs", "entropy"))
    share_prefixes(shared)
    return plain, shared


def shared_prompt(model, encoded, features=True):
    pixels = {key: encoded[key] for key in ("pixel_values", "image_grid_thw")}
    rows = encoded["input_ids"], encoded["mm_token_type_ids"]
    return shared_prompts(model, *rows, pixels, [len(pixels["image_grid_thw"])], keep_features=features)[0]


def made_completions(lengths, vocabulary, seed):
    """(N, C) right-padded random tokens and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(max(lengths), 1)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(20, vocabulary, mask.shape, generator=generator)  # past the vision tokens
    return ids * mask, mask.long()


def plain_log_probs(model, encoded, completions, mask):
    """The plain way: each completion in a row of its own behind a copy of the prompt."""
    rows = []
    for ids, there in zip(completions, mask, strict=True):
        row = torch.cat([encoded["input_ids"][0], ids])[None]
        attended = torch.cat([encoded["attention_mask"][0], there])[None]
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
    """Gradients of a sum in which each completion token has a weight of its own."""
    model.zero_grad()
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(expected, found):
    assert expected.keys() == found.keys()
    assert expected
    for name, gradient in expected.items():
        # Relative to the largest entry: rounding of a sum over hundreds of tokens is not relative to each.
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@examples(max_examples=8)
@given(
    first=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    second=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    features=st.booleans(),
    seed=st.integers(0, 99),
)
def test_log_probabilities_entropies_and_gradients(models, prompts, first, second, features, seed):
    plain, shared = models
    completions, mask = made_completions([*first, *second], 300, seed)
    groups = completions.split([len(first), len(second)])
    masks = mask.split([len(first), len(second)])
    expected = [plain_log_probs(plain, *row) for row in zip(prompts, groups, masks, strict=True)]
    expected_log_probs, expected_entropies = (torch.cat(part) for part in zip(*expected, strict=True))
    made = [shared_prompt(shared, encoded, features) for encoded in prompts]
    log_probs, entropies = packed_log_probs(shared, made, completions, mask, [len(first), len(second)])
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies * mask, expected_entropies * mask, atol=1e-4, rtol=0)
    if mask.any():
        assert_same_gradients(gradients(plain, expected_log_probs, mask), gradients(shared, log_probs, mask))


def test_bfloat16_is_as_near_the_truth_as_rows_of_their_own(tiny, models, prompts):
    completions, mask = made_completions([12, 5, 9, 12], 300, 4)
    half = tiny.model_copy(update={"dtype": "bfloat16"})
    plain, shared = load_model(half).eval(), load_model(half).eval()
    for model in (plain, shared):
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    share_prefixes(shared)
    with torch.no_grad():
        truth, _ = plain_log_probs(models[0], prompts[0], completions, mask)
        rows, _ = plain_log_probs(plain, prompts[0], completions, mask)
        packed, _ = packed_log_probs(shared, [shared_prompt(shared, prompts[0])], completions, mask, [4])
    off = [((values - truth) * mask).abs().sum() / mask.sum() for values in (rows, packed)]
    assert 0 < off[1] < 1.3 * off[0]


def test_gradients_with_checkpointing_and_with_adapters(tiny, prompts):
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
    completions, mask = made_completions([9, 4, 7], 300, 3)
    expected, _ = plain_log_probs(plain, prompts[0], completions, mask)
    found, _ = packed_log_probs(
        shared, [shared_prompt(shared.get_base_model(), prompts[0])], completions, mask, [3]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    trained = gradients(plain, expected, mask)
    assert all("lora" in name for name in trained)
    assert_same_gradients(trained, gradients(shared, found, mask))


def test_half_precision_stays_as_close_as_rounding_allows(tiny, prompts):
    plain, shared = (load_model(tiny).to(torch.bfloat16).eval() for _ in range(2))
    exact = load_model(tiny).eval()
    for model in (plain, shared, exact):
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    share_prefixes(shared)
    completions, mask = made_completions([12, 8], 300, 5)
    with torch.no_grad():
        true, _ = plain_log_probs(exact, prompts[0], completions, mask)
        rounded, _ = plain_log_probs(plain, prompts[0], completions, mask)
        found, _ = packed_log_probs(shared, [shared_prompt(shared, prompts[0])], completions, mask, [2])
    assert (found - true).abs().mean() <= 1.5 * (rounded - true).abs().mean() + 1e-3


@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_text_models(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[kind](**SMALL)).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = [torch.randint(3, 97, (1, n)) for n in (11, 6)]
    encoded = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    completions, mask = made_completions([5, 3, 6, 0], 97, 1)
    rows = zip(encoded, completions.split([2, 2]), mask.split([2, 2]), strict=True)
    expected = torch.cat([plain_log_probs(model, *row)[0] for row in rows])
    config = GenerationConfig(max_new_tokens=12, do_sample=True, pad_token_id=0, eos_token_id=2)
    torch.manual_seed(1)
    sampled = model.generate(ids[0].repeat(3, 1), generation_config=config)[:, 11:]
    share_prefixes(model)
    prompts = shared_prompts(model, [row[0] for row in ids])
    found, _ = packed_log_probs(model, prompts, completions, mask, [2, 2])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.manual_seed(1)
    assert generate(model, prompts[:1], 3, config).tolist() == sampled.tolist()


@pytest.mark.parametrize("do_sample", [False, True])
def test_completions_are_token_identical(models, processor, prompt, tasks, page_folder, do_sample):
    """Three prompts of unequal length, four completions each: greedy, and sampled from the same seed."""
    plain, shared = models
    shown = [task.candidates[:count] for task, count in zip(tasks[:3], (3, 2, 3), strict=True)]
    pages = [load_pages(row, page_folder, processor) for row in shown]
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
    together = encode(processor, prompt, [queries[i] for i in copies], [pages[i] for i in copies])
    torch.manual_seed(7)
    expected = plain.generate(**together, generation_config=config)[:, together["input_ids"].shape[1] :]
    alone = [encode(processor, prompt, [query], [images]) for query, images in zip(queries, pages, strict=True)]
    torch.manual_seed(7)
    found = generate(shared, [shared_prompt(shared, encoded) for encoded in alone], 4, config)
    assert found.tolist() == expected.tolist()
    if do_sample:
        assert len({tuple(row) for row in found.tolist()}) > 3


def test_a_shared_model_still_answers_alone_and_saves_as_any_other(models, prompts, tmp_path):
    plain, shared = models
    inputs = prompts[0]
    torch.testing.assert_close(shared(**inputs).logits, plain(**inputs).logits, atol=1e-4, rtol=0)
    shared.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()


def test_features_are_the_towers_and_pixels_serve_where_they_are_not_taken(models, prompts):
    _, shared = models
    completions, mask = made_completions([6, 6], 300, 2)
    assert bool(shared_prompt(shared, prompts[0]).images) == takes_image_features(shared)
    assert not shared_prompt(shared, prompts[0], False).images
    with torch.no_grad():
        kept, _ = packed_log_probs(shared, [shared_prompt(shared, prompts[0])], completions, mask, [2])
        anew, _ = packed_log_probs(shared, [shared_prompt(shared, prompts[0], False)], completions, mask, [2])
    torch.testing.assert_close(kept, anew, atol=1e-5, rtol=0)


def test_unknown_models_and_settings_say_why():
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=SMALL, vision_config={**vision, "deepstack_visual_indexes": [0]})
    )
    assert "qwen3_vl is not among the tested ones" in unsupported_model(model)
    with pytest.raises(ValueError, match="prefixes can't be shared: model type qwen3_vl"):
        share_prefixes(model)
    sliding = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert "not full attention" in unsupported_model(AutoModelForCausalLM.from_config(sliding))
    dropping = LlamaConfig(**SMALL, attention_dropout=0.1)
    assert "dropout" in unsupported_model(AutoModelForCausalLM.from_config(dropping))
