"""Pretrains the tiny Qwen2.5-VL that ships with the package.

    python scripts/pretrain_tiny.py out=outputs/tiny
    python scripts/pretrain_tiny.py out=outputs/tiny weights=mmr5_train/models/tiny from_phase=form

The model is a `Qwen2_5_VLForConditionalGeneration` of about 1.2 million parameters. Its small BPE tokenizer has
Qwen's special tokens. A model with random weights does not learn listwise reranking within minutes. So this script
trains it, in the phases of configs/tiny.yaml, to read synthetic pages: to describe each page of a prompt, and to
decide whether it matches the question. This replaces the pretraining of a real model. A short last phase shows it
think and answer blocks, so that it writes the complete form sometimes, as a real base model does from the prompt
alone. It never sees pages of the demo's corpus (other documents, other seeds), nor users' wording of questions.

A page matches a question only if both its colour and its kind match. Two things make that learnable in minutes:
cheap batches whose pages are text instead of images, and an extra loss on the verdict, which is only one token in
thirteen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    get_cosine_schedule_with_warmup,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from data_construction.corpus.drawing import COLORS, KINDS, PageContent, draw_page
from data_construction.corpus.synthetic_documents import (
    DOMAINS,
    ORGANISATIONS,
    QUERIES,
    SENTENCES,
    TOPICS,
    make_document,
)
from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import InputError, open_output, write_json, write_manifest
from mmr5_train.models.loading import SETTINGS
from mmr5_train.models.pages import page_limits, prepare_page
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.prompt import Prompt, build_messages, insert_images, render_completion
from mmr5_train.ranking.records import LocalId

MIN_PIXELS, MAX_PIXELS = 784, 9_500  # a page of 3 : 4 becomes 84 × 112 pixels: 12 visual tokens
VOCABULARY = 1_024
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ("image", "image_url") or "image" in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif "text" in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


class Phase(BaseModel):
    """One phase of training, with its own cosine schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=0)
    batch_size: int = Field(gt=0, description="prompts per batch if they have one page; fewer for longer prompts")
    learning_rate: float = Field(gt=0)
    pages: tuple[int, ...] = Field(description="numbers of pages of prompts with images, sampled uniformly")
    text_batches: float = Field(ge=0, le=1, description="share of batches whose pages are text, not images")
    random_negatives: float = Field(ge=0, le=1, description="share of random pages among the irrelevant ones")
    max_verdict_pages: int = Field(ge=0, description="notes on more pages than this have no verdicts")
    list_ids: bool = Field(description="the notes end with a list of all ids, relevant ones first")
    form: bool = Field(default=False, description="notes and list are in think and answer blocks")
    extra_loss: float = Field(ge=0, description="weight of the extra loss on the verdicts and on that list")


class TinyStage(StageConfig):
    """`python scripts/pretrain_tiny.py` (configs/tiny.yaml)."""

    prompt: Prompt
    pages: int = Field(gt=0, description="number of synthetic pages to draw")
    phases: dict[str, Phase] = Field(description="in the order in which they run")
    weights: Path | None = Field(default=None, description="checkpoint to start from; null: random weights")
    from_phase: str | None = Field(default=None, description="the first phase that runs; null: all run")
    threads: int = Field(default=2, gt=0)


def build_tokenizer(prompt: Prompt) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the words of the synthetic corpus and the prompt."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(prompt), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="left",
        model_max_length=32_768,
        clean_up_tokenization_spaces=False,
    )
    # One token each, but not special: decoded text must contain them for the answer parser.
    fast.add_tokens(list(TAGS))
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _training_texts(prompt: Prompt) -> Iterator[str]:
    rng = random.Random(0)
    # The share of sections with two relevant pages when the shipped vocabulary was trained: another share would
    # change the token ids.
    contents = [content for index in range(200) for content in make_document(index, 0, two_relevant=0.3).pages]
    yield from (content.text for content in contents)
    yield from (" ".join((*DOMAINS, *ORGANISATIONS, *TOPICS)) for _ in range(20))
    for content in contents:
        yield f"Image {rng.randint(1, 20)}: {format_note(content.description, rng.random() < 0.5)}\n"
        question = rng.choice(QUERIES).format(what=content.description, topic=rng.choice(TOPICS))
        yield f"{prompt.system}\n{prompt.question}\n{question}\nsystem\nuser\nassistant\n"
        yield "".join(f"[{i}, " for i in range(20))


def build_processor(prompt: Prompt) -> Qwen2_5_VLProcessor:
    images = Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return Qwen2_5_VLProcessor(
        images, build_tokenizer(prompt), Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )


def build_model(processor: Any, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "window_size": 112,
            "fullatt_block_indexes": [2],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


@dataclass(frozen=True)
class PoolPage:
    """A synthetic page; `image` is resized as for the model's input."""

    color: str
    kind: str
    description: str
    image: Image.Image


def draw_pool(processor: Any, count: int, seed: int, workers: int) -> list[PoolPage]:
    """Draws `count` pages, with all combinations of colour and kind equally often."""
    rng = random.Random(f"pool {seed}")
    contents = []
    for index in range(count):
        topic, organisation = rng.choice(TOPICS), rng.choice(ORGANISATIONS)
        lines = tuple(s.format(topic=topic) for s in rng.sample(SENTENCES, rng.randint(3, 5)))
        color, kind = COLORS[index % len(COLORS)], KINDS[index // len(COLORS) % len(KINDS)]
        title, domain = f"{organisation}: {topic}", rng.choice(DOMAINS)
        contents.append(PageContent(title, lines, color, kind, domain, rng.randint(1, 12), rng.getrandbits(32)))
    limits = page_limits(processor)
    with ProcessPoolExecutor(workers) as pool:
        images = tqdm(pool.map(draw_page, contents, chunksize=64), total=count, desc="draw", unit="page")
        return [
            PoolPage(content.color, content.kind, content.description, prepare_page(image, limits))
            for content, image in zip(contents, images, strict=True)
        ]


class ExampleSampler:
    """Samples training examples: pages from a pool, a question, and a note on each page."""

    def __init__(self, pool: list[PoolPage], prompt: Prompt, seed: str) -> None:
        self.rng, self.pool, self.prompt = random.Random(f"reader {seed}"), pool, prompt
        self.by_content: dict[tuple[str, str], list[PoolPage]] = {}
        for page in pool:
            self.by_content.setdefault((page.color, page.kind), []).append(page)

    def batch(self, phase: Phase) -> list[dict[str, Any]]:
        """Examples in TRL's prompt-completion format, all with the same number of pages, which avoids padding."""
        as_text = self.rng.random() < phase.text_batches
        count = self.rng.choice(range(1, max(5, *phase.pages) + 1) if as_text else phase.pages)
        size = max(1, phase.batch_size * 3 // (2 + count))
        return [self.example(phase, count, as_text) for _ in range(size)]

    def example(self, phase: Phase, pages: int, as_text: bool) -> dict[str, Any]:
        """One example with `pages` pages, of which about 40 % match the question."""
        rng = self.rng
        target = rng.choice(COLORS), rng.choice(KINDS)
        random_share = phase.random_negatives
        shown = [
            rng.choice(self.by_content[target]) if rng.random() < 0.4 else self._negative(target, random_share)
            for _ in range(pages)
        ]
        description = self.by_content[target][0].description
        query = rng.choice(QUERIES).format(what=description, topic=rng.choice(TOPICS))
        verdicts = [(page.color, page.kind) == target for page in shown]
        notes = [format_note(page.description, helps) for page, helps in zip(shown, verdicts, strict=True)]
        if pages > phase.max_verdict_pages:
            notes = [f"{page.description}." for page in shown]
        text = join_notes(notes)
        order = sorted(range(1, pages + 1), key=lambda i: not verdicts[i - 1])
        if phase.form:
            text = render_completion(text, [LocalId(i) for i in order])
        elif phase.list_ids:
            text += f"\n{order}"
        messages = build_messages(self.prompt, query, pages)
        if as_text:
            messages = insert_images(
                messages, [{"type": "text", "text": f"{page.description}."} for page in shown]
            )
        return {
            "prompt": messages,
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
            "images": [] if as_text else [page.image for page in shown],
        }

    def _negative(self, target: tuple[str, str], random_share: float) -> PoolPage:
        """A page that shares only colour or only kind with `target`; with probability `random_share`, any page."""
        color, kind = target
        if self.rng.random() < random_share:
            return self.rng.choice(self.pool)
        if self.rng.random() < 0.5:
            kind = self.rng.choice([k for k in KINDS if k != kind])
        else:
            color = self.rng.choice([c for c in COLORS if c != color])
        return self.rng.choice(self.by_content[color, kind])


def train(name: str, phase: Phase, model: Any, processor: Any, sampler: ExampleSampler) -> None:
    """Trains the model for one phase."""
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    # The tokens in which "helps" and "does not help" first differ, and the token that opens the list of ids.
    yes, no, opening = (processor.tokenizer(word).input_ids[0] for word in (" helps", " does", "["))
    optimizer = torch.optim.AdamW(model.parameters(), phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, phase.steps // 50, phase.steps)
    model.train()
    bar = tqdm(range(phase.steps), desc=name, unit="step")
    for step in bar:
        batch = collate(sampler.batch(phase))
        output = model(**batch)
        logits_BTV, labels_BT = output.logits[:, :-1], batch["labels"][:, 1:]
        in_list_BT = ((labels_BT == opening).cumsum(1) > 0) & (labels_BT != -100)
        in_extra_loss_BT = (labels_BT == yes) | (labels_BT == no) | in_list_BT
        loss, metrics = output.loss, {"loss": f"{output.loss.item():.3f}"}
        if in_extra_loss_BT.any():
            logits_NV, labels_N = logits_BTV[in_extra_loss_BT], labels_BT[in_extra_loss_BT]
            loss = loss + phase.extra_loss * cross_entropy(logits_NV, labels_N)
            metrics["verdict accuracy"] = f"{(logits_NV.argmax(-1) == labels_N).float().mean().item():.2f}"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(metrics)


def main(config: TinyStage) -> None:
    names = list(config.phases)
    first = config.from_phase or names[0]
    if first not in names:
        raise InputError(f"from_phase: no phase is called {first} (choices: {', '.join(names)})")
    phases = {name: config.phases[name] for name in names[names.index(first) :]}
    out = open_output(config.out, config.overwrite)
    torch.set_num_threads(config.threads)
    if config.weights is None:
        processor = build_processor(config.prompt)
        model = build_model(processor, config.seed)
    else:
        processor = Qwen2_5_VLProcessor.from_pretrained(config.weights)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.weights)
    pool = draw_pool(processor, config.pages, config.seed, config.threads)
    for name, phase in phases.items():
        train(name, phase, model, processor, ExampleSampler(pool, config.prompt, f"{name} {config.seed}"))
    model.save_pretrained(out)
    processor.save_pretrained(out)
    size = processor.image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], "dtype": "float32"}
    write_json(out / SETTINGS, {**limits, "think": True, "prompt": config.prompt.model_dump()})
    size = sum(parameter.numel() for parameter in model.parameters())
    write_manifest(out, stage="tiny", config=config.model_dump(mode="json"), counts={"parameters": size})
    print(f"tiny model: {size:,} parameters in {out}")


if __name__ == "__main__":
    run_stage(main, TinyStage, "tiny")
