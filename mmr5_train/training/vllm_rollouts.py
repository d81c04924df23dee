"""Rollouts by vLLM: hands page prompts over so that vLLM reads the trainer's tokens, and checks that it does.

In colocate mode, TRL 1.16 gives vLLM the trainer's prompt, in which each page is as many placeholder tokens as it
has features, together with the images. vLLM expands each placeholder again, so it would read a longer prompt, and
the rollouts would be noise without any error (TRL issue 6294). `check_rollouts` gives vLLM one placeholder per
page. In server mode TRL sends the features' positions, and vLLM expands nothing.

A server ignores request fields that it does not know. So the ban on vision tokens is tried once before the first
rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

from mmr5_train.common.files import InputError
from mmr5_train.inference.vllm_engine import check_prompt

ENGINE_BYTES = 3 * 2**30
"""vLLM's memory besides weights and KV cache: activations of 4,096 tokens, and of the pages in one prompt."""
MAX_SHARE = 0.6  # of the GPU's memory; training needs the rest


def check_rollouts(trainer: Any, placeholders: Sequence[int], banned: Sequence[int]) -> None:
    """Makes a GRPO trainer's vLLM engine read the trainer's prompts, and checks each of its rollout batches.

    Args:
        trainer: a `trl.GRPOTrainer` with `use_vllm`.
        placeholders: the token ids that stand for page features.
        banned: the token ids that no completion may contain.

    The trainer's later calls raise `InputError` if the engine read other tokens, or if it sampled a banned one.
    """
    engine = trainer.vllm_generation
    generate, colocated = engine.generate, engine.mode == "colocate"
    banned_ids = set(banned)
    checked_ban = colocated  # in process, an unknown field of SamplingParams is an error

    def checked_generate(prompts: list[list[int]], images: Any, *args: Any, **options: Any) -> Any:
        nonlocal checked_ban
        if not checked_ban and trainer.accelerator.is_main_process:
            check_bias(engine.vllm_client, prompts[0][:1], int(trainer.processing_class.tokenizer.eos_token_id))
        checked_ban = True
        handed = [collapse(ids, placeholders) for ids in prompts] if colocated and images is not None else prompts
        read, completions, *rest = generate(handed, images, *args, **options)
        for ids, found in zip(prompts, read, strict=True):
            check_prompt(ids, list(found))
        for ids in completions:
            if sampled := set(ids) & banned_ids:
                raise InputError(
                    f"vLLM sampled the vision token {min(sampled)}, which is excluded (logit_bias); use the vLLM "
                    "version in constraints-vllm.txt"
                )
        return prompts, completions, *rest

    engine.generate = checked_generate


@contextmanager
def engine_arguments(**arguments: Any) -> Iterator[None]:
    """Adds arguments to the vLLM engine that TRL starts in this process inside the block.

    TRL 1.16 gives vLLM neither the policy's dtype nor its page sizes. vLLM would turn float32 into 16 bits, and
    would resize pages as the checkpoint's own image processor does.
    """
    from trl.generation import vllm_generation

    engine = getattr(vllm_generation, "LLM", None)
    if engine is None:  # vLLM is not installed, which TRL reports
        yield
        return
    vllm_generation.LLM = partial(engine, **arguments)
    try:
        yield
    finally:
        vllm_generation.LLM = engine


def memory_share(model: Any, prompts: int, rollouts: int, prompt_length: int, length: int, total: int) -> float:
    """The share of a GPU's memory for a colocated vLLM engine: what the rollouts of one batch need.

    Args:
        model: the policy. Its weights are in the engine a second time.
        prompts, rollouts: distinct prompts, and completions, of a rollout batch on this GPU. The completions of a
            prompt share its part of the KV cache.
        prompt_length, length: tokens of the longest prompt, and of the longest prompt with its completion.
        total: the GPU's memory in bytes.

    With less than `MAX_SHARE`, vLLM generates a batch at once; otherwise it queues some rollouts. The share is
    never too small for one rollout.
    """
    text, weight = model.config.get_text_config(), next(model.parameters()).element_size()
    heads = text.num_key_value_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    token_bytes = 2 * text.num_hidden_layers * heads * weight
    fixed = sum(p.numel() * p.element_size() for p in model.parameters()) + ENGINE_BYTES
    all_tokens = prompts * prompt_length + rollouts * (length - prompt_length)
    least, wanted = ((fixed + token_bytes * tokens) / total for tokens in (length, all_tokens))
    return max(least, min(wanted, MAX_SHARE))


def collapse(ids: Sequence[int], placeholders: Sequence[int]) -> list[int]:
    """The ids with each run of the same placeholder shortened to one.

    Between two pages there are always other tokens, so a run belongs to one page.
    """
    kept = []
    for token, run in groupby(ids):
        kept += [token] if token in placeholders else list(run)
    return kept


def check_bias(client: Any, prompt: list[int], token: int) -> None:
    """Raises `InputError` if a server does not apply logit_bias: with a large bias it has to sample `token`."""
    output = client.generate(prompts=[prompt], n=1, max_tokens=1, generation_kwargs={"logit_bias": {token: 100.0}})
    [[sampled]] = output["completion_ids"]
    if sampled != token:
        raise InputError(
            f"the vLLM server ignores logit_bias: with a bias of 100 on token {token} it sampled {sampled}, so it "
            "would sample vision tokens; use the vLLM version in constraints-vllm.txt"
        )
