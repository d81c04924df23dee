"""The shipped tiny Qwen2.5-VL, and the recipe that rebuilds it.

    python scripts/pretrain_tiny.py out=outputs/tiny

A real `Qwen2_5_VLForConditionalGeneration` of about 1.2 million parameters with its own small BPE tokenizer
that carries Qwen's special tokens. From random weights listwise reranking is not learned in minutes, so the
model first learns, in the phases of configs/tiny.yaml, to read synthetic pages: to say what is on each page of
a prompt, and whether that is what the question asks for. This stands in for the pretraining of a real model;
it has seen no think or answer block and no page of the demo's corpus (other documents, other seeds).

A page must match a question in both colour and kind. Two things make that learnable in minutes: batches whose
pages are given in words (no pictures, so cheap and easy to bind), and a loss on the verdict by itself, which is
one token in thirteen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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
from mmr5_train.common.files import open_output, write_json, write_manifest
from mmr5_train.models.loading import SETTINGS
from mmr5_train.models.pages import page_limits, prepare_page
from mmr5_train.ranking.notes import format_note, join_notes
from mmr5_train.ranking.prompt import Prompt, build_messages, insert_images

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
    """One phase of training, with a cosine schedule of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=0)
    batch_size: int = Field(gt=0, description="prompts of one page; fewer where prompts are longer")
    learning_rate: float = Field(gt=0)
    pages: tuple[int, ...] = Field(description="page counts of prompts with pictures, drawn evenly")
    words: float = Field(ge=0, le=1, description="share of batches whose pages are given in words")
    easy: float = Field(ge=0, le=1, description="share of other pages that need not resemble what is asked for")
    verdicts_up_to: int = Field(ge=0, description="prompts of more pages are described without verdicts")
    order: bool = Field(description="the notes end with a list of all ids, those that help first")
    key_loss: float = Field(ge=0, description="weight of the loss on the verdicts and that list alone")


class TinyStage(StageConfig):
    """`python scripts/pretrain_tiny.py` (configs/tiny.yaml)."""

    prompt: Prompt
    pages: int = Field(gt=0, description="synthetic pages drawn for reading")
    phases: dict[str, Phase] = Field(description="in the order in which they run")
    threads: int = Field(default=2, gt=0)


def build_tokenizer(prompt: Prompt) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the synthetic corpus' words and the prompt."""
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
    tokenizer.train_from_iterator(_words(prompt), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="left",
        model_max_length=32_768,
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(list(TAGS))  # one token each, but text: they are read back by the answer grammar
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _words(prompt: Prompt) -> Iterator[str]:
    rng = random.Random(0)
    # The share of two-page sections that the shipped vocabulary was learned with: another would number it anew.
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
    """The architecture with random weights."""
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
class SeenPage:
    color: str
    kind: str
    description: str
    image: Image.Image


def draw_pool(processor: Any, count: int, seed: int, workers: int) -> list[SeenPage]:
    """Pages of every colour and kind, as the model sees them."""
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
        drawn = tqdm(pool.map(draw_page, contents, chunksize=64), total=count, desc="draw", unit="page")
        return [
            SeenPage(content.color, content.kind, content.description, prepare_page(image, limits))
            for content, image in zip(contents, drawn, strict=True)
        ]


class Reader:
    """Examples of page reading: pages of a pool, a question about one of them or none, notes on each."""

    def __init__(self, pool: list[SeenPage], prompt: Prompt, seed: str) -> None:
        self.rng, self.pool, self.prompt = random.Random(f"reader {seed}"), pool, prompt
        self.by_look: dict[tuple[str, str], list[SeenPage]] = {}
        for page in pool:
            self.by_look.setdefault((page.color, page.kind), []).append(page)

    def batch(self, phase: Phase) -> list[dict[str, Any]]:
        """Prompts of one page count, so that nothing is spent on padding, in TRL's prompt-completion form."""
        in_words = self.rng.random() < phase.words
        count = self.rng.choice(range(1, 6) if in_words else phase.pages)
        size = max(1, phase.batch_size * 3 // (2 + count))
        return [self.example(phase, count, in_words) for _ in range(size)]

    def example(self, phase: Phase, pages: int, in_words: bool) -> dict[str, Any]:
        """One prompt with `pages` pages, about two in five of them what is asked for."""
        rng = self.rng
        asked = rng.choice(COLORS), rng.choice(KINDS)
        shown = [rng.choice(self.by_look[asked]) if rng.random() < 0.4 else self._other(asked, phase.easy)
                 for _ in range(pages)]  # fmt: skip
        what = self.by_look[asked][0].description
        query = rng.choice(QUERIES).format(what=what, topic=rng.choice(TOPICS))
        helps = [(page.color, page.kind) == asked for page in shown]
        notes = [format_note(page.description, help_) for page, help_ in zip(shown, helps, strict=True)]
        if pages > phase.verdicts_up_to:
            notes = [f"{page.description}." for page in shown]
        text = join_notes(notes)
        if phase.order:
            text += f"\n{sorted(range(1, pages + 1), key=lambda i: not helps[i - 1])}"
        messages = build_messages(self.prompt, query, pages)
        if in_words:
            messages = insert_images(
                messages, [{"type": "text", "text": f"{page.description}."} for page in shown]
            )
        return {
            "prompt": messages,
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
            "images": [] if in_words else [page.image for page in shown],
        }

    def _other(self, asked: tuple[str, str], easy: float) -> SeenPage:
        """A page that shares the colour or the kind asked for; with probability `easy`, any page."""
        color, kind = asked
        if self.rng.random() < easy:
            return self.rng.choice(self.pool)
        if self.rng.random() < 0.5:
            kind = self.rng.choice([k for k in KINDS if k != kind])
        else:
            color = self.rng.choice([c for c in COLORS if c != color])
        return self.rng.choice(self.by_look[color, kind])


def train(name: str, phase: Phase, model: Any, processor: Any, reader: Reader) -> None:
    """Runs one phase."""
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    # The first token in which "helps" and "does not help" differ, and the one that opens the list of ids.
    yes, no, opening = (processor.tokenizer(word).input_ids[0] for word in (" helps", " does", "["))
    optimizer = torch.optim.AdamW(model.parameters(), phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, phase.steps // 50, phase.steps)
    model.train()
    bar = tqdm(range(phase.steps), desc=name, unit="step")
    for step in bar:
        batch = collate(reader.batch(phase))
        output = model(**batch)
        logits_BTV, labels_BT = output.logits[:, :-1], batch["labels"][:, 1:]
        in_list_BT = ((labels_BT == opening).cumsum(1) > 0) & (labels_BT != -100)
        is_key_BT = (labels_BT == yes) | (labels_BT == no) | in_list_BT
        loss, shown = output.loss, {"loss": f"{output.loss.item():.3f}"}
        if is_key_BT.any():
            logits_NV, labels_N = logits_BTV[is_key_BT], labels_BT[is_key_BT]
            loss = loss + phase.key_loss * cross_entropy(logits_NV, labels_N)
            shown["keys right"] = f"{(logits_NV.argmax(-1) == labels_N).float().mean().item():.2f}"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(shown)


def main(config: TinyStage) -> None:
    out = open_output(config.out, config.overwrite)
    torch.set_num_threads(config.threads)
    processor = build_processor(config.prompt)
    model = build_model(processor, config.seed)
    pool = draw_pool(processor, config.pages, config.seed, config.threads)
    for name, phase in config.phases.items():
        train(name, phase, model, processor, Reader(pool, config.prompt, f"{name} {config.seed}"))
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
