"""Trains a stand-in checkpoint (standin.py) briefly, so that it writes answers in the valid form.

    python scripts/benchmarks/standin_form.py CHECKPOINT [--steps 300]

The model learns the form of MM-R5's refined reasoning: a sentence on the page that helps, one on the other pages,
and a list of all page ids. It does not learn to read pages: the sentences are random, and the list is ascending or
descending. GRPO and evaluation then meet different completions that end, with ids and tags of several tokens.

Two approximations make training fast. Nearly all parameters are embeddings of tokens that never occur: they are
not trained (`UsedEmbeddings`). Nearly all tokens of a prompt are tokens of pages: a step uses a few of them, and
each of these counts for many in the attention (`FormPrompt`).
"""

from __future__ import annotations

import argparse
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rehearsal_data import A4_36_DPI, A4_72_DPI, Size, draw_text_page
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup

from mmr5_train.inference.local import load_backend
from mmr5_train.models.config import CheckpointOptions
from mmr5_train.models.inputs import encode
from mmr5_train.models.pages import page_limits, prepare_page
from mmr5_train.ranking.prompt import read_prompt, render_completion
from mmr5_train.ranking.records import LocalId

PAGE_COUNTS = (5, 10)  # of the recipes' prompts in training and in evaluation
PAGE_SIZES = (A4_36_DPI, A4_72_DPI)
PAGE_TOKENS = 4  # tokens of a page in a step
BATCH = 2
QUESTION = "Which page of the report ends with {}?"


class UsedEmbeddings(nn.Module):
    """The rows of an embedding matrix (V, D) that belong to K token ids, as a trainable matrix (K, D)."""

    def __init__(self, weight_VD: Tensor, ids_K: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(5 * weight_VD[ids_K])  # with larger embeddings training starts faster
        self.index_V = torch.zeros(len(weight_VD), dtype=torch.long)
        self.index_V[ids_K] = torch.arange(len(ids_K))
        self.others, self.variance = len(weight_VD) - len(ids_K), weight_VD.var().item()

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(self.index_V[ids], self.weight)

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """The cross-entropy over all V tokens.

        The rows of the other tokens are random with variance v. Their logits for a state h are normal with
        variance v·|h|², so the sum of their exponentials is about exp(v·|h|²/2) times their number.
        """
        others_N1 = math.log(self.others) + self.variance / 2 * hidden_ND.square().sum(dim=1, keepdim=True)
        logits_NS = torch.cat([hidden_ND @ self.weight.T, others_N1], dim=1)
        return cross_entropy(logits_NS, self.index_V[targets_N])


@dataclass(frozen=True)
class FormPrompt:
    """A prompt of T tokens with `n` pages, as the model passes it to its language model."""

    n: int
    ids_T: Tensor
    embeddings_TD: Tensor  # used at the page tokens only
    positions_AT: Tensor  # for each of the A axes of the rotary embeddings
    pages: list[Tensor]  # for each page, the positions of its tokens in the prompt
    deepstack: list[Tensor]  # Qwen3-VL adds (all page tokens, D) to the states after a layer

    def sample(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """A prompt of U of the tokens: all of the text, and `PAGE_TOKENS` of each page.

        Returns their positions (U), whether each is of a page (U), and what to add to the logits of attention to
        it (U), so that the tokens of a page together get the attention of all its tokens.
        """
        bias_T = torch.zeros(len(self.ids_T))
        keep_T = torch.ones(len(self.ids_T), dtype=torch.bool)
        is_page_T = torch.zeros_like(keep_T)
        for tokens in self.pages:
            chosen = tokens[rng.sample(range(len(tokens)), PAGE_TOKENS)]
            keep_T[tokens], is_page_T[tokens] = False, True
            keep_T[chosen] = True
            bias_T[chosen] = math.log(len(tokens) / PAGE_TOKENS)
        return keep_T.nonzero()[:, 0], is_page_T[keep_T], bias_T[keep_T]


def train_form(checkpoint: Path, steps: int = 300, seed: int = 0) -> float:
    """Trains the language model of the checkpoint in place. Returns the loss of the last step."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = [form_prompt(model, processor, n, size, rng) for n in PAGE_COUNTS for size in PAGE_SIZES]
    complete = model.get_input_embeddings()
    texts = [form_completion(n, rng) for n in PAGE_COUNTS for _ in range(1000)]
    used = torch.cat([*(prompt.ids_T for prompt in prompts), *tokenize(processor, texts)]).unique()
    embeddings = UsedEmbeddings(complete.weight.detach(), used)
    model.set_input_embeddings(embeddings)
    trained = list(model.model.language_model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    loss = torch.tensor(0.0)
    for _ in (progress := trange(steps, desc="form", unit="step")):
        prompt = rng.choice(prompts)
        completions = tokenize(processor, [form_completion(prompt.n, rng) for _ in range(BATCH)])
        loss = form_loss(model.model.language_model, embeddings, prompt, completions, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        complete.weight[used] = embeddings.weight
    model.set_input_embeddings(complete)
    model.save_pretrained(checkpoint)
    return loss.item()


def form_prompt(model: Any, processor: Any, n: int, size: Size, rng: random.Random) -> FormPrompt:
    """A prompt with `n` text pages of `size` pixels."""
    inputs = encode_prompt(processor, n, size, rng)
    passed: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, arguments: passed.update(arguments), with_kwargs=True
    )
    with torch.no_grad():
        model.model(**inputs)
    hook.remove()
    tokens = (inputs["mm_token_type_ids"][0] == 1).nonzero()[:, 0]
    per_page = inputs["image_grid_thw"].prod(dim=1) // processor.image_processor.merge_size**2
    return FormPrompt(
        n=n,
        ids_T=inputs["input_ids"][0],
        embeddings_TD=passed["inputs_embeds"][0],
        positions_AT=passed["position_ids"][:, 0],
        pages=list(tokens.split(per_page.tolist())),
        deepstack=list(passed.get("deepstack_visual_embeds") or []),
    )


def form_loss(
    language_model: nn.Module,
    embeddings: UsedEmbeddings,
    prompt: FormPrompt,
    completions: Sequence[Tensor],
    rng: random.Random,
) -> Tensor:
    """The mean cross-entropy of the tokens of B completions of a prompt, of which U tokens are sampled."""
    kept_U, is_page_U, bias_U = prompt.sample(rng)
    batch, n_prompt = len(completions), len(kept_U)
    labels_BC = pad_sequence(list(completions), batch_first=True, padding_value=-100)
    length = n_prompt + labels_BC.shape[1]
    states_UD = torch.where(is_page_U[:, None], prompt.embeddings_TD[kept_U], embeddings(prompt.ids_T[kept_U]))
    inputs_BLD = torch.cat([states_UD.expand(batch, -1, -1), embeddings(labels_BC.clamp(min=0))], dim=1)
    following_C = prompt.positions_AT.max() + 1 + torch.arange(labels_BC.shape[1])
    positions_AL = torch.cat(
        [prompt.positions_AT[:, kept_U], following_C.expand(len(prompt.positions_AT), -1)], dim=1
    )
    mask_LL = torch.full((length, length), -torch.inf).triu(1)
    mask_LL[:, :n_prompt] += bias_U
    extra = {}
    if prompt.deepstack:
        page_tokens = torch.cat(prompt.pages)
        kept = torch.isin(page_tokens, kept_U[is_page_U])
        mask_BL = torch.cat([is_page_U, torch.zeros(labels_BC.shape[1], dtype=torch.bool)]).expand(batch, -1)
        extra = {
            "visual_pos_masks": mask_BL,
            "deepstack_visual_embeds": [layer[kept].repeat(batch, 1) for layer in prompt.deepstack],
        }
    hidden_BLD = language_model(
        inputs_embeds=inputs_BLD,
        position_ids=positions_AL[:, None].expand(-1, batch, -1),
        attention_mask=mask_LL.expand(batch, 1, -1, -1),
        use_cache=False,
        **extra,
    ).last_hidden_state
    labeled_BC = labels_BC != -100
    return embeddings.loss(hidden_BLD[:, n_prompt - 1 : -1][labeled_BC], labels_BC[labeled_BC])


def encode_prompt(processor: Any, n: int, size: Size, rng: random.Random) -> Any:
    """Model inputs of a prompt with `n` text pages of `size` pixels."""
    question = QUESTION.format(rng.randint(1000, 9999))
    return encode(processor, read_prompt("default"), [question], [[text_page(processor, size, rng)] * n])


def text_page(processor: Any, size: Size, rng: random.Random) -> Image.Image:
    text = " ".join(str(rng.randrange(100_000)) for _ in range(60))
    return prepare_page(Image.open(io.BytesIO(draw_text_page(text, size))), page_limits(processor))


def form_completion(n: int, rng: random.Random) -> str:
    """A completion for `n` pages. The helping page, its figure, and the direction of the list are random."""
    think = f"Image {rng.randint(1, n)} of {n} can help with figure {rng.randrange(10)}. The other images can't."
    return render_completion(think, [LocalId(i) for i in range(1, n + 1)][:: rng.choice((1, -1))])


def tokenize(processor: Any, texts: Sequence[str]) -> list[Tensor]:
    """The token ids of each completion, with the token that ends it."""
    ended = [f"{text}<|im_end|>" for text in texts]
    return [torch.tensor(ids) for ids in processor.tokenizer(ended, add_special_tokens=False)["input_ids"]]


def share_in_form(checkpoint: Path, page_counts: Sequence[int] = PAGE_COUNTS, seed: int = 1) -> float:
    """The share of greedy answers without a defect, to prompts with these numbers of pages, of each page size."""
    rng = random.Random(seed)
    backend = load_backend(checkpoint, CheckpointOptions(prompt=read_prompt("default")), max_new_tokens=256)
    defects = []
    for n in page_counts:
        for size in PAGE_SIZES:
            pages = [text_page(backend.processor, size, rng) for _ in range(n)]
            [[answer]] = backend.generate([QUESTION.format(rng.randint(1000, 9999))], [pages])
            defects.append(answer.defects)
    return sum(not found for found in defects) / len(defects)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a stand-in checkpoint to write answers in the valid form.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_form(arguments.checkpoint, arguments.steps, seed=arguments.seed)
    print(f"{share_in_form(arguments.checkpoint):.0%} of the answers are complete and in the valid form")


if __name__ == "__main__":
    main()
