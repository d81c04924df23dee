"""Trains a stand-in checkpoint (standin.py) briefly, so that it writes answers in the valid form.

    python scripts/benchmarks/standin_form.py CHECKPOINT [--steps 400]

The model learns to write one note per page and a list of all page ids. It does not learn to read pages: the notes
are random, and the list has the prompt order. GRPO and evaluation then meet completions that end, with ids and
tags of several tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup

from mmr5_train.inference.local import load_backend
from mmr5_train.models.config import CheckpointOptions
from mmr5_train.models.inputs import encode
from mmr5_train.models.pages import page_limits, prepare_page
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.prompt import Prompt, read_prompt, render_completion
from mmr5_train.ranking.records import LocalId

PAGE_SIDES = ((64, 64), (128, 96), (256, 192), (448, 640), (595, 842))  # pixels, from small to real pages
MAX_PAGES = 10
MAX_BATCH, BATCH_TOKENS = 4, 3_200  # prompts per batch, and tokens of all their pages
DESCRIPTIONS = ("a chart", "a table", "a photo", "a list", "a map")
QUESTIONS = ("Which page shows the sales?", "How many ships were built in 1912?", "Who wrote the report?")


def train_form(checkpoint: Path, steps: int = 400, seed: int = 0) -> float:
    """Trains the checkpoint in place: three quarters of the steps with small pages, then with all sizes.

    Returns the loss of the last step.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    prompt = read_prompt("default")
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    loss = torch.tensor(0.0)
    for step in (progress := trange(steps, desc="form", unit="step")):
        sides = PAGE_SIDES[:1] if step < 3 * steps // 4 else PAGE_SIDES
        inputs, labels = form_batch(processor, prompt, rng.choice(sides), rng)
        loss = sampled_loss(model, inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradient of the embeddings is large: reuse its memory
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(checkpoint)
    return loss.item()


def form_batch(
    processor: Any, prompt: Prompt, page_size: tuple[int, int], rng: random.Random
) -> tuple[Any, Tensor]:
    """Model inputs of B prompts with completions, and labels (B, T): −100 outside the completions.

    All prompts have the same number of pages, each a white page of `page_size` pixels.
    """
    limits = page_limits(processor)
    page = prepare_page(Image.new("RGB", page_size, "white"), limits)
    page_tokens = page.width * page.height // limits.factor**2
    n = rng.randint(1, min(MAX_PAGES, BATCH_TOKENS // page_tokens))
    size = min(MAX_BATCH, BATCH_TOKENS // (n * page_tokens))
    queries = [rng.choice(QUESTIONS) for _ in range(size)]
    inputs = encode(processor, prompt, queries, [[page] * n] * size)
    texts = [f"{form_completion(n, rng)}<|im_end|>" for _ in range(size)]
    completions = processor.tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    ids, mask = completions["input_ids"], completions["attention_mask"]
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids.masked_fill(mask == 0, -100)], dim=1)
    appended = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    return inputs | {key: torch.cat([inputs[key], values], dim=1) for key, values in appended.items()}, labels


def form_completion(n: int, rng: random.Random) -> str:
    """A completion for `n` pages: random notes, of which the first one helps, and the ids in prompt order."""
    think = join_notes([format_note(rng.choice(DESCRIPTIONS), i == 0) for i in range(n)])
    return render_completion(think, [LocalId(i) for i in range(1, n + 1)])


def sampled_loss(model: Any, inputs: Any, labels: Tensor, negatives: int = 1024) -> Tensor:
    """The cross-entropy of the labels, with logits of the batch's tokens and of `negatives` random other tokens.

    The vocabulary is large, and most of a small model's work would be the logits of tokens that never occur. The
    random tokens count for all others (sampled softmax).
    """
    hidden_BTD = model.model(**inputs).last_hidden_state
    labeled_BT = labels[:, 1:] != -100
    hidden_KD, targets_K = hidden_BTD[:, :-1][labeled_BT], labels[:, 1:][labeled_BT]
    head_VD = model.lm_head.weight
    used = targets_K.unique()
    others = torch.randperm(len(head_VD))[: negatives + len(used)]
    others = others[~torch.isin(others, used)][:negatives]
    logits_KS = hidden_KD @ head_VD[torch.cat([used, others])].T
    weight = torch.tensor((len(head_VD) - len(used)) / len(others)).log()
    logits_KS = torch.cat([logits_KS[:, : len(used)], logits_KS[:, len(used) :] + weight], dim=1)
    return cross_entropy(logits_KS, torch.searchsorted(used, targets_K))


def share_in_form(checkpoint: Path, page_counts: Sequence[int], seed: int = 1) -> float:
    """The share of greedy answers without a defect, to prompts with these numbers of pages."""
    rng = random.Random(seed)
    backend = load_backend(checkpoint, CheckpointOptions(prompt=read_prompt("default")), max_new_tokens=512)
    page = prepare_page(Image.new("RGB", PAGE_SIDES[-1], "white"), backend.limits)
    answers = [backend.generate([rng.choice(QUESTIONS)], [[page] * n])[0][0] for n in page_counts]
    return sum(not answer.defects for answer in answers) / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a stand-in checkpoint to write answers in the valid form.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_form(arguments.checkpoint, arguments.steps, seed=arguments.seed)
    share = share_in_form(arguments.checkpoint, page_counts=(1, 2, 5, 10))
    print(f"{share:.0%} of the answers are complete and in the valid form")


if __name__ == "__main__":
    main()
