"""How answers are generated: every setting is set here, none is taken from the checkpoint.

A published checkpoint's generation_config may have a repetition penalty, a temperature near 0, or forbidden
tokens. GRPO trains the plain distribution of the model. So the rollouts of training, held-out ranking, evaluation,
question selection, teaching and `Reranker` all use the settings of this module: greedy, or samples from the
temperature-scaled distribution over the whole vocabulary without vision tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from mmr5_train.models.loading import vision_token_ids

# The fields of GRPOConfig that shape the distribution, set to leave it as it is.
WHOLE_VOCABULARY: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
# More settings, set to have no effect. Fields that have none when they are None are not listed.
_NO_EFFECT: dict[str, Any] = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_length": 0,
    "use_cache": True,
}


def end_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token and its padding token.

    They are the two end tokens of the published Qwen checkpoints, <|im_end|> and <|endoftext|>.
    """
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return list(dict.fromkeys(i for i in ids if i is not None))


def token_settings(processor: Any) -> dict[str, Any]:
    """The fields of a `GenerationConfig` that depend on the vocabulary.

    If a vision token were sampled, the next forward pass would expect image features and fail.
    """
    tokenizer = processor.tokenizer
    return {
        "suppress_tokens": vision_token_ids(processor),
        "eos_token_id": end_token_ids(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def sampling_settings(temperature: float | None, max_new_tokens: int) -> dict[str, Any]:
    """Settings of greedy decoding (None), or of sampling at `temperature`, as fields of a `GenerationConfig`."""
    if temperature is None:  # transformers warns of a top_k in greedy decoding, which does not use it
        sampling = {"do_sample": False, **WHOLE_VOCABULARY, "top_k": None}
    else:
        sampling = {"do_sample": True, "temperature": temperature, **WHOLE_VOCABULARY}
    return {**sampling, **_NO_EFFECT, "max_new_tokens": max_new_tokens}


def generation_config(tokens: dict[str, Any], temperature: float | None, max_new_tokens: int) -> GenerationConfig:
    """A config with `sampling_settings` and the `token_settings` `tokens`.

    Call `generate` inside `without_own_settings`.
    """
    return GenerationConfig(**tokens, **sampling_settings(temperature, max_new_tokens))


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Hides the model's generation_config, from which `generate` fills the fields that are None in its config."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def vllm_exclusions(tokens: dict[str, Any]) -> dict[str, Any]:
    """The field of vLLM's SamplingParams, which has no `suppress_tokens`, that excludes these tokens."""
    return {"logit_bias": dict.fromkeys(tokens["suppress_tokens"], -100.0)}


def rollout_settings(trainer: dict[str, Any], processor: Any) -> dict[str, Any]:
    """The fields `trainer` of `trl.GRPOConfig`, completed by the sampling settings of this module.

    TRL passes `generation_kwargs` on to transformers' GenerationConfig, or to vLLM's SamplingParams.
    """
    tokens, given = token_settings(processor), trainer.get("generation_kwargs") or {}
    generation = given | vllm_exclusions(tokens) if trainer.get("use_vllm") else _NO_EFFECT | given | tokens
    return WHOLE_VOCABULARY | trainer | {"generation_kwargs": generation}
