"""The shipped tiny Qwen2.5-VL, and the recipe that rebuilds it.

    python -m mmr5_train.models.tiny out=outputs/tiny

A real `Qwen2_5_VLForConditionalGeneration` of about 1.2 million parameters with its own small BPE tokenizer
that carries Qwen's special tokens. From random weights listwise reranking is not learned in minutes, so the
model first learns to read pages: shown one to five synthetic pages it says what is on each, and, for one or
two pages, whether that is what a question asks for. This stands in for the pretraining of a real model; it
has seen no answer block and no page of the demo's corpus (other documents, other seeds).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
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
from data_construction.corpus.synthetic import DOMAINS, ORGANISATIONS, QUERIES, SENTENCES, TOPICS, make_document
from mmr5_train.config import StageConfig, run_stage
from mmr5_train.models.loading import prepare_page
from mmr5_train.ranking.files import open_output, write_manifest
from mmr5_train.ranking.notes import described_note, join_notes
from mmr5_train.ranking.prompt import Prompt, build_messages

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


class TinyStage(StageConfig):
    """`python -m mmr5_train.models.tiny` (configs/tiny.yaml)."""

    prompt: Prompt
    pages: int = Field(gt=0, description="synthetic pages drawn for reading")
    reading_steps: int = Field(ge=0, description="steps on one or two pages, with a verdict on each")
    listing_steps: int = Field(ge=0, description="steps on one to five pages, described without a verdict")
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
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
    contents = [content for index in range(200) for content in make_document(index, seed=0).pages]
    yield from (content.text for content in contents)
    yield from (" ".join((*DOMAINS, *ORGANISATIONS, *TOPICS)) for _ in range(20))
    for content in contents:
        yield f"Image {rng.randint(1, 20)}: {described_note(content.description, rng.random() < 0.5)}\n"
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
    with ProcessPoolExecutor(workers) as pool:
        drawn = tqdm(pool.map(draw_page, contents, chunksize=64), total=count, desc="draw", unit="page")
        return [
            SeenPage(content.color, content.kind, content.description, prepare_page(image, processor))
            for content, image in zip(contents, drawn, strict=True)
        ]


class Reader:
    """Examples of page reading: pages of a pool, a question about one of them or none, notes on each."""

    def __init__(self, pool: list[SeenPage], prompt: Prompt, seed: int) -> None:
        self.rng, self.pool, self.prompt = random.Random(f"reader {seed}"), pool, prompt
        self.by_look: dict[tuple[str, str], list[SeenPage]] = {}
        for page in pool:
            self.by_look.setdefault((page.color, page.kind), []).append(page)

    def example(self, pages: int, verdict: bool) -> dict[str, Any]:
        """One prompt with `pages` pages; half of single pages are what the question asks for."""
        rng = self.rng
        asked = rng.choice(COLORS), rng.choice(KINDS)
        shown = [self._near(asked) for _ in range(pages)]
        if rng.random() < (0.5 if pages == 1 else 0.9):
            shown[rng.randrange(pages)] = rng.choice(self.by_look[asked])
        what = self.by_look[asked][0].description
        query = rng.choice(QUERIES).format(what=what, topic=rng.choice(TOPICS))
        notes = []
        for page in shown:
            note = described_note(page.description, (page.color, page.kind) == asked)
            notes.append(note if verdict else f"{page.description}.")
        text = join_notes(notes)
        return {
            "prompt": build_messages(self.prompt, query, pages),
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
            "images": [page.image for page in shown],
        }

    def _near(self, asked: tuple[str, str]) -> SeenPage:
        """A hard negative: the colour or the kind asked for, rarely neither."""
        color, kind = asked
        which = self.rng.random()
        if which < 0.45:
            kind = self.rng.choice([k for k in KINDS if k != kind])
        elif which < 0.9:
            color = self.rng.choice([c for c in COLORS if c != color])
        else:
            return self.rng.choice(self.pool)
        return self.rng.choice(self.by_look[color, kind])


def train(model: Any, processor: Any, reader: Reader, config: TinyStage) -> None:
    """Reading on one or two pages, then on one to five; one cosine schedule over both."""
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    steps = config.reading_steps + config.listing_steps
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 50, steps)
    model.train()
    bar = tqdm(range(steps), desc="read", unit="step")
    for step in bar:
        # One page count a batch: nothing is spent on padding.
        if step < config.reading_steps:
            pages, verdict = reader.rng.choice((1, 2)), True
        else:
            pages, verdict = reader.rng.choice((1, 2, 3, 4, 5)), False
            if pages < 3:
                verdict = True  # what was learned first is kept
        count = max(1, config.batch_size * 2 // (1 + pages))
        batch = collate([reader.example(pages, verdict) for _ in range(count)])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", pages=pages)


def main(config: TinyStage) -> None:
    out = open_output(config.out, config.overwrite)
    torch.set_num_threads(config.threads)
    processor = build_processor(config.prompt)
    model = build_model(processor, config.seed)
    # Seeds of the pool and of the demo's corpus never meet: one is a string, the other is "seed/index".
    reader = Reader(draw_pool(processor, config.pages, config.seed, config.threads), config.prompt, config.seed)
    train(model, processor, reader, config)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    size = sum(parameter.numel() for parameter in model.parameters())
    write_manifest(out, stage="tiny", config=config.model_dump(mode="json"), counts={"parameters": size})
    print(f"tiny model: {size:,} parameters in {out}")


if __name__ == "__main__":
    run_stage(main, TinyStage, "tiny")
