"""Published settings of MM-R5 (arXiv 2506.12364v2 and its released code), one `Fact` per setting.

`mmr5_train.recipes.departures` compares every recipe with them and prints the differences. A setting that neither
the paper nor the released code states has the default of the framework that the code is built on: ms-swift for
SFT, VLM-R1 (with transformers' training arguments) for GRPO.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PAPER = "paper"
CODE = "released code"
SWIFT = "not stated by the paper: default of ms-swift, which the SFT code is built on"
VLM_R1 = "not stated by the paper: default of VLM-R1, which the RL code is built on"
NOT_STATED = "not stated"


class Fact(NamedTuple):
    """A published setting of a stage.

    `field` is the dotted name of the setting in the stage's config. The stage `launch` and `evaluate.decoding` are
    made by `mmr5_train.recipes.departures`.
    `reason` says why the recipe `mm_r5` differs; empty: it does not.
    """

    stage: str
    field: str
    value: Any
    source: str
    reason: str = ""


_OWN_PROMPT = (
    "the project's own wording; scripts/import_prompt.py reads the prompts of a copy of the released code"
)
_FLASH = "auto: flash attention where it is installed, otherwise PyTorch's attention with the same result"
_LAUNCH = "launch=zero2 starts 4 processes; with another number, change gradient_accumulation_steps"

FACTS = (
    Fact("launch", "processes", 4, PAPER, _LAUNCH),
    Fact("launch", "zero_stage", 2, PAPER, _LAUNCH),
    Fact("candidates", "corpus.format", "mmdocir_train", PAPER),
    Fact("candidates", "corpus.subsets", 7, PAPER),
    Fact("candidates", "corpus.questions", None, CODE),
    Fact("candidates", "corpus.max_side", None, CODE),
    Fact(
        "candidates", "retriever.model", "ColQwen", PAPER,
        "a released ColQwen checkpoint; the paper does not say which one it used",
    ),
    Fact("candidates", "candidates", 5, PAPER),
    Fact("candidates", "policy.rule", "top", CODE),
    Fact("candidates", "missed", "drop", PAPER),
    Fact("candidates", "train_per_domain", 1200, CODE),
    Fact("candidates", "seed", 42, CODE),
    Fact(
        "candidates", "split.train", 1, CODE,
        "SFT draws from 69 % of the documents, so that GRPO's questions are about other documents, and 2 % choose "
        "checkpoints; the paper does not say how the two sets of questions are kept apart",
    ),
    Fact("traces", "teacher.model", "gpt-4o", PAPER),
    Fact("traces", "max_words", 40, CODE),
    Fact("traces", "order", "shuffled", CODE),
    Fact("traces", "refine", True, PAPER),
    Fact("traces", "missed", "drop", PAPER),
    Fact("sft", "limit", 7200, PAPER),
    Fact("sft", "think", True, PAPER),
    Fact("sft", "prompt.name", "released", CODE, _OWN_PROMPT),
    Fact("sft", "prompt.images_first", False, CODE),
    Fact("sft", "model.path", "Qwen/Qwen2.5-VL-7B-Instruct", PAPER),
    Fact("sft", "model.min_pixels", 3136, CODE),
    Fact("sft", "model.max_pixels", 12_845_056, CODE),
    Fact("sft", "model.dtype", "bfloat16", PAPER),
    Fact("sft", "model.attention", "flash_attention_2", CODE, _FLASH),
    Fact("sft", "model.freeze_vision", True, PAPER),
    Fact("sft", "model.load_in_4bit", False, PAPER),
    Fact("sft", "model.lora.r", 8, PAPER),
    Fact("sft", "model.lora.alpha", 32, PAPER),
    Fact("sft", "model.lora.plus_ratio", 16, CODE),
    Fact("sft", "model.lora.dropout", 0.05, SWIFT),
    Fact("sft", "trainer.per_device_train_batch_size", 1, PAPER),
    Fact("sft", "trainer.gradient_accumulation_steps", 4, PAPER),
    Fact("sft", "trainer.num_train_epochs", 1, PAPER),
    Fact("sft", "trainer.max_steps", -1, PAPER),
    Fact("sft", "trainer.learning_rate", 1e-4, PAPER),
    Fact("sft", "trainer.warmup_steps", 0.05, PAPER),
    Fact("sft", "trainer.max_length", 32_768, CODE),
    Fact("sft", "trainer.lr_scheduler_type", "cosine", SWIFT),
    Fact("sft", "trainer.weight_decay", 0.1, SWIFT),
    Fact("sft", "trainer.adam_beta1", 0.9, SWIFT),
    Fact("sft", "trainer.adam_beta2", 0.95, SWIFT),
    Fact("sft", "trainer.max_grad_norm", 1.0, SWIFT),
    Fact("sft", "trainer.gradient_checkpointing", True, SWIFT),
    Fact("sft", "seed", 42, CODE),
    Fact("select", "balanced.count", 3000, PAPER),
    Fact("select", "balanced.groups", 10, PAPER),
    Fact("select", "difficulty", None, PAPER),
    Fact("grpo", "limit", None, PAPER),
    Fact("grpo", "think", True, PAPER),
    Fact("grpo", "prompt.name", "released", CODE, _OWN_PROMPT),
    Fact(
        "grpo", "prompt.images_first", True, CODE,
        "one prompt for SFT, GRPO and evaluation; the released code shows the pages of SFT and RL differently",
    ),
    Fact("grpo", "reward.weights.reranking", 1, PAPER),
    Fact("grpo", "reward.weights.template", 1, PAPER),
    Fact("grpo", "model.min_pixels", 3136, CODE),
    Fact("grpo", "model.max_pixels", 12_845_056, CODE),
    Fact("grpo", "model.dtype", "bfloat16", PAPER),
    Fact("grpo", "model.attention", "flash_attention_2", CODE, _FLASH),
    Fact("grpo", "model.freeze_vision", True, PAPER),
    Fact("grpo", "model.load_in_4bit", False, PAPER),
    Fact("grpo", "model.lora.r", 64, PAPER),
    Fact("grpo", "model.lora.alpha", 128, PAPER),
    Fact("grpo", "model.lora.plus_ratio", None, CODE),
    Fact(
        "grpo", "model.lora.dropout", 0.05, VLM_R1,
        "with dropout, the ratio of new to old probabilities is noise before the first update, and the "
        "completions of a prompt can't share its computation",
    ),
    Fact(
        "grpo", "model.lora.target_modules", "all linear layers outside the vision tower, with lm_head", VLM_R1,
        "the linear layers of the language model, as in SFT; an adapter on lm_head needs far more memory",
    ),
    Fact("grpo", "trainer.per_device_train_batch_size", 1, PAPER),
    Fact("grpo", "trainer.gradient_accumulation_steps", 2, PAPER),
    Fact("grpo", "trainer.num_generations", 4, PAPER),
    Fact("grpo", "trainer.num_iterations", 2, PAPER),
    Fact("grpo", "trainer.num_train_epochs", 1, PAPER),
    Fact("grpo", "trainer.max_steps", -1, PAPER),
    Fact("grpo", "trainer.learning_rate", 1e-5, PAPER),
    Fact("grpo", "trainer.max_completion_length", 2048, PAPER),
    Fact("grpo", "max_prompt_length", 32_768, CODE),
    Fact("grpo", "trainer.gradient_checkpointing", True, PAPER),
    Fact("grpo", "trainer.epsilon", 0.2, VLM_R1),
    Fact("grpo", "trainer.epsilon_high", None, VLM_R1),
    Fact("grpo", "trainer.beta", 0.04, VLM_R1),
    Fact("grpo", "trainer.loss_type", "grpo", VLM_R1),
    Fact("grpo", "trainer.scale_rewards", "group", VLM_R1),
    Fact("grpo", "trainer.importance_sampling_level", "token", VLM_R1),
    Fact("grpo", "trainer.mask_truncated_completions", False, VLM_R1),
    Fact("grpo", "trainer.temperature", 1.0, VLM_R1),
    Fact("grpo", "trainer.top_p", 1.0, VLM_R1),
    Fact(
        "grpo", "trainer.top_k", 50, VLM_R1,
        "off: GRPO's ratios are those of the whole distribution, and samples of its 50 likeliest tokens are not",
    ),
    Fact("grpo", "trainer.repetition_penalty", 1.0, VLM_R1),
    Fact("grpo", "trainer.lr_scheduler_type", "linear", VLM_R1),
    Fact("grpo", "trainer.warmup_steps", 0, VLM_R1),
    Fact("grpo", "trainer.weight_decay", 0.0, VLM_R1),
    Fact("grpo", "trainer.adam_beta1", 0.9, VLM_R1),
    Fact("grpo", "trainer.adam_beta2", 0.999, VLM_R1),
    Fact("grpo", "trainer.max_grad_norm", 1.0, VLM_R1),
    Fact(
        "evaluate", "decoding", "temperature 0.3", PAPER,
        "greedy answers are the same in each run; sampling makes results irreproducible",
    ),
    Fact(
        "evaluate", "max_new_tokens", 8192, CODE,
        "the longest completion that GRPO trains; a longer answer repeats itself",
    ),
    Fact("evaluate", "constrain", False, CODE),
    Fact("evaluate", "think", True, PAPER),
    Fact(
        "heldout", "n_heldout", NOT_STATED, PAPER,
        "the paper's recall@5 exceeds that of its first stage, so it ranked more than five pages",
    ),
)  # fmt: skip
"""What is published about the data, SFT, GRPO and inference."""
