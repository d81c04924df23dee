"""The hand-over of page prompts to vLLM, with a stub that reads prompts as vLLM does.

`make test-vllm` runs the real engine.
"""

import inspect
from types import SimpleNamespace

import pytest
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from mmr5_train.common.files import InputError
from mmr5_train.inference.vllm_engine import check_prompt
from mmr5_train.training.vllm_rollouts import (
    ENGINE_BYTES,
    MAX_SHARE,
    check_bias,
    check_rollouts,
    collapse,
    engine_arguments,
    memory_share,
)

PAD, START, END, EOS = 7, 5, 6, 2
PROMPT = [1, START, PAD, PAD, PAD, END, 3, START, PAD, PAD, END, 4]
SIZES = [3, 2]  # features of each page


def expanded(ids, sizes):
    """The prompt as vLLM reads it: each placeholder becomes as many as its page has features."""
    sizes = iter(sizes)
    return [token for i in ids for token in ([PAD] * next(sizes) if i == PAD else [i])]


class Engine:
    """`VLLMGeneration`, as far as the trainer uses it. `sampled` are the completions."""

    def __init__(self, mode, sampled=((8, EOS),), bias=True):
        self.mode, self.sampled = mode, [list(ids) for ids in sampled]
        self.handed = []
        self.vllm_client = SimpleNamespace(generate=self.client_generate)
        self.bias = bias

    def generate(self, prompts, images, num_generations, profiler=None):
        self.handed = prompts
        read = [expanded(ids, SIZES) for ids in prompts] if self.mode == "colocate" else prompts
        return read, self.sampled, [[[-0.1]]], None

    def client_generate(self, prompts, n, max_tokens, generation_kwargs):
        [(token, bias)] = generation_kwargs["logit_bias"].items()
        assert bias == 100
        return {"completion_ids": [[token if self.bias else 9]]}


def trainer(engine):
    tokenizer = SimpleNamespace(eos_token_id=EOS)
    made = SimpleNamespace(
        vllm_generation=engine,
        accelerator=SimpleNamespace(is_main_process=True),
        processing_class=SimpleNamespace(tokenizer=tokenizer),
    )
    check_rollouts(made, placeholders=[PAD], banned=[PAD, START])
    return made


def rollouts(engine, images=("page 1", "page 2")):
    made = trainer(engine)
    return made.vllm_generation.generate(prompts=[PROMPT], images=[list(images)], num_generations=1, profiler=None)


def test_a_run_of_placeholders_becomes_one_per_page():
    assert collapse(PROMPT, [PAD]) == [1, START, PAD, END, 3, START, PAD, END, 4]
    assert collapse(collapse(PROMPT, [PAD]), [PAD]) == collapse(PROMPT, [PAD])
    assert collapse([4, 4, 4], [PAD]) == [4, 4, 4]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_the_engine_reads_the_prompt_of_the_trainer(mode):
    engine = Engine(mode)
    read, completions, *_ = rollouts(engine)
    assert read == [PROMPT]
    assert completions == [[8, EOS]]
    assert engine.handed == [collapse(PROMPT, [PAD]) if mode == "colocate" else PROMPT]


def test_without_the_hand_over_the_stub_reads_another_prompt():
    """The error that rollouts would have had without a message: TRL issue 6294."""
    read = expanded(PROMPT, [3, 1, 1, 2, 1])
    with pytest.raises(InputError, match="15 tokens instead of 12, different from token 5 on"):
        check_prompt(PROMPT, read)


def test_pages_of_another_size_are_found():
    engine = Engine("colocate")
    engine_sizes = SIZES[::-1]
    engine.generate = lambda prompts, images, **_: (
        [expanded(p, engine_sizes) for p in prompts],
        [[8]],
        None,
        None,
    )
    with pytest.raises(InputError, match="12 tokens instead of 12"):
        rollouts(engine)


def test_a_sampled_vision_token_is_an_error():
    with pytest.raises(InputError, match="vLLM sampled the vision token 5"):
        rollouts(Engine("colocate", sampled=[(8, START, EOS)]))


def test_a_server_that_ignores_the_ban_is_found_before_the_first_rollouts():
    engine = Engine("server", bias=False)
    with pytest.raises(InputError, match="ignores logit_bias: with a bias of 100 on token 2 it sampled 9"):
        rollouts(engine)
    assert engine.handed == []
    check_bias(Engine("server").vllm_client, [1], EOS)


def test_trl_hands_over_expanded_prompts_still():
    """If this fails, TRL collapses the placeholders itself: delete `collapse` and its use."""
    source = inspect.getsource(VLLMGeneration.generate)
    assert 'row = {"prompt_token_ids": ids}' in source
    parameters = list(inspect.signature(VLLMGeneration.generate).parameters)
    assert parameters == ["self", "prompts", "images", "num_generations", "profiler"]


def test_the_memory_share_holds_the_rollouts_of_a_batch():
    """By hand, for the 7B shape in bfloat16: 28 layers with 4 KV heads of 128, so 57,344 bytes per token."""
    parameter = SimpleNamespace(numel=lambda: 8_292_166_656, element_size=lambda: 2)
    text = SimpleNamespace(num_hidden_layers=28, num_key_value_heads=4, hidden_size=3584, num_attention_heads=28)
    model = SimpleNamespace(
        parameters=lambda: iter([parameter]), config=SimpleNamespace(get_text_config=lambda: text)
    )
    total = 80 * 2**30
    fixed = 2 * 8_292_166_656 + ENGINE_BYTES
    few = memory_share(model, 1, 8, 14_000, 16_048, total)
    assert few == pytest.approx((fixed + 57_344 * (14_000 + 8 * 2_048)) / total)
    assert memory_share(model, 64, 512, 14_000, 16_048, total) == MAX_SHARE
    assert memory_share(model, 64, 512, 14_000, 16_048, 24 * 2**30) == pytest.approx(
        (fixed + 57_344 * 16_048) / (24 * 2**30)
    )


def test_the_engine_that_trl_starts_has_the_dtype_and_the_page_sizes_of_the_policy(monkeypatch):
    started = []
    monkeypatch.setattr(vllm_generation, "LLM", lambda **arguments: started.append(arguments), raising=False)
    original = vllm_generation.LLM
    with engine_arguments(dtype="float32"):
        vllm_generation.LLM(model="m")
    assert started == [{"model": "m", "dtype": "float32"}]
    assert vllm_generation.LLM is original


def test_trl_gives_the_engine_no_dtype_still():
    """If this fails, TRL passes it: delete `engine_arguments` and its use."""
    source = inspect.getsource(VLLMGeneration)
    engine = source[source.index("self.llm = LLM(") :]
    assert "dtype" not in engine[: engine.index("if self.enable_sleep_mode")]


def test_without_vllm_nothing_is_replaced(monkeypatch):
    monkeypatch.delattr(vllm_generation, "LLM", raising=False)
    with engine_arguments(dtype="float32"):
        assert not hasattr(vllm_generation, "LLM")
