"""Token counts of prompts and completions, which are known before a model runs.

The header of an image file states the page's size, the size determines its visual tokens, and the tokenizer counts
the text. So a stage counts all of its examples before it loads the model. One rule says what happens to an example
that does not fit the model's context or a limit of the config:

- Training and selection leave it out: `leave_out_too_long`. They count it in the manifest, list it in
  skipped.jsonl and print which settings to change. If more than `max_too_long` of the examples do not fit, the
  stage stops.
- Evaluation and held-out ranking leave nothing out, because that would change what they measure. They stop with a
  list of the questions that do not fit: `check_all_fit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import AutoConfig

from mmr5_train.common.environment import is_first_process
from mmr5_train.common.files import InputError
from mmr5_train.models.loading import resolve_checkpoint
from mmr5_train.models.pages import image_size, page_limits, visual_tokens
from mmr5_train.ranking.prompt import Prompt, build_messages
from mmr5_train.ranking.records import Candidate, Skipped

TOO_LONG = "too many tokens"
"""The reason in skipped.jsonl, and the key in the manifest's counts."""

SHOWN_IDS = 10
"""Number of examples that an error message lists."""

CHUNK = 1000  # prompts that are tokenized together

Sizes = Mapping[str, tuple[int, int]]
"""Image path as in `Candidate.image` → (width, height) in pixels."""


class TokenCount(NamedTuple):
    """The tokens of one example."""

    text: int
    """Tokens of the prompt without visual tokens."""
    visual: tuple[int, ...]
    """Visual tokens of each page."""
    completion: int = 0
    """Tokens of the completion, with the end of its turn; 0 if it is not known yet."""

    @property
    def prompt(self) -> int:
        return self.text + sum(self.visual)

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def __str__(self) -> str:
        completion = f" + completion {self.completion:,}" if self.completion else ""
        return f"{self.total:,} tokens (pages {sum(self.visual):,} + text {self.text:,}{completion})"


@dataclass(frozen=True)
class TokenLimit:
    """The largest number of tokens of an example."""

    tokens: int
    source: str
    """What sets the limit, for messages: "trainer.max_length"."""
    advice: str
    """The settings to change, for messages."""


def image_sizes(candidates: Iterable[Candidate], folder: Path) -> dict[str, tuple[int, int]]:
    """The size of each distinct page image, from the header of its file; paths are relative to `folder`.

    A header takes about 0.1 ms on a local disk. Raises `InputError`, which names the file, for an image that is
    missing, unreadable or too narrow.
    """
    images = list({candidate.image: None for candidate in candidates})
    with ThreadPoolExecutor() as pool:  # hides the latency of a network file system
        sizes = pool.map(lambda image: image_size(folder / image), images)
        return dict(zip(images, _progress(sizes, len(images), "page sizes"), strict=True))


def count_tokens(
    processor: Any,
    prompt: Prompt,
    queries: Sequence[str],
    shown: Sequence[Sequence[Candidate]],
    sizes: Sizes,
    completions: Sequence[str] | None = None,
) -> list[TokenCount]:
    """The tokens of each prompt, `queries[i]` with the pages `shown[i]`, and of `completions[i]` if given.

    The counts equal those of the processor for the same messages and prepared pages.
    """
    limits = page_limits(processor)
    distinct = {page.image for pages in shown for page in pages}
    visual = {image: visual_tokens(*sizes[image], limits) for image in distinct}
    counts: list[TokenCount] = []
    for start in _progress(range(0, len(queries), CHUNK), -(-len(queries) // CHUNK), "prompt lengths"):
        rows = range(start, min(start + CHUNK, len(queries)))
        messages = [build_messages(prompt, queries[i], len(shown[i])) for i in rows]
        answers = None if completions is None else [completions[i] for i in rows]
        prompts, endings = _render(processor, messages, answers)
        lengths = zip(_lengths(processor, prompts), _lengths(processor, endings), strict=True)
        for i, (text, completion) in zip(rows, lengths, strict=True):
            pages = tuple(visual[page.image] for page in shown[i])
            counts.append(TokenCount(text - len(pages), pages, completion))  # one placeholder per page
    return counts


def _render(processor: Any, messages: list[Any], answers: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The texts of the prompts and of the completions, as the chat template writes them and TRL splits them."""
    prompts = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if answers is None:
        return prompts, [""] * len(prompts)
    turns = [{"role": "assistant", "content": [{"type": "text", "text": answer}]} for answer in answers]
    conversations = [[*prompt, turn] for prompt, turn in zip(messages, turns, strict=True)]
    texts = processor.apply_chat_template(conversations, tokenize=False)
    shared = [_common_length(*pair) for pair in zip(prompts, texts, strict=True)]
    split = [(text[:n], text[n:]) for text, n in zip(texts, shared, strict=True)]
    return [start for start, _ in split], [end for _, end in split]


def _common_length(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _lengths(processor: Any, texts: Sequence[str]) -> list[int]:
    ids = processor.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [len(text_ids) for text_ids in ids]


def context_limit(path: str | Path, reserved: Mapping[str, int] | None = None) -> TokenLimit | None:
    """The limit that a checkpoint's context sets: its largest number of positions.

    `reserved` maps a setting to the tokens it takes from the context, such as those of a completion that is not
    written yet. Returns None if the checkpoint's config states no limit.
    """
    config = AutoConfig.from_pretrained(resolve_checkpoint(path)).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else _limit("the model's context", positions, reserved or {}, "lower ")


def setting_limit(name: str, tokens: int | None, reserved: Mapping[str, int] | None = None) -> TokenLimit | None:
    """The limit of a setting that the user may raise, less the `reserved` tokens; None without one."""
    return None if tokens is None else _limit(name, tokens, reserved or {}, f"raise {name}, or lower ")


def _limit(name: str, tokens: int, reserved: Mapping[str, int], change: str) -> TokenLimit:
    less = "".join(f" less {setting} {count:,}" for setting, count in reserved.items())
    lower = " or ".join(["model.max_pixels", *reserved])
    source = f"{name} of {tokens:,}{less}" if less else name
    return TokenLimit(tokens - sum(reserved.values()), source, f"{change}{lower}, or use fewer candidates")


def lowest(*limits: TokenLimit | None) -> TokenLimit | None:
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.tokens, default=None)


@dataclass(frozen=True)
class Fitting:
    """Which examples fit."""

    indices: list[int]
    """Indices of the examples that fit, ascending."""
    skipped: list[Skipped]
    """The others, for skipped.jsonl."""
    message: str
    """What was left out, and the settings to change; empty if all fit."""

    @property
    def counts(self) -> dict[str, int]:
        """The entry of the manifest's counts."""
        return {TOO_LONG: len(self.skipped)} if self.skipped else {}


def leave_out_too_long(
    source: Path,
    query_ids: Sequence[str],
    counts: Sequence[TokenCount],
    limit: TokenLimit | None,
    max_share: float,
) -> Fitting:
    """Separates the examples of the file `source` that fit `limit` from those that do not.

    Raises `InputError` if more than `max_share` of them, or all, do not fit.
    """
    too_long = _too_long(counts, limit)
    if limit is None or not too_long:
        return Fitting(list(range(len(counts))), [], "")
    skipped = [
        Skipped(query_id=query_ids[i], reason=TOO_LONG, detail=f"{counts[i]}; at most {limit.tokens:,}")
        for i in too_long
    ]
    what = f"{len(too_long):,} of {len(counts):,} examples have more than {limit.tokens:,} tokens ({limit.source})"
    if len(too_long) == len(counts) or len(too_long) > max_share * len(counts):
        raise InputError(
            f"{source}: {what}, and at most max_too_long={max_share:g} of them may be left out: "
            f"{_list_ids(query_ids, counts, too_long)}; {limit.advice}"
        )
    fitting = sorted(set(range(len(counts))) - set(too_long))
    return Fitting(fitting, skipped, f"{what} and are left out; to train on them, {limit.advice}")


def check_all_fit(
    source: str, query_ids: Sequence[str], counts: Sequence[TokenCount], limit: TokenLimit | None
) -> None:
    """Raises `InputError` that lists the questions whose prompts do not fit. `source` begins the message."""
    too_long = _too_long(counts, limit)
    if limit is not None and too_long:
        raise InputError(
            f"{source}: {len(too_long):,} of {len(counts):,} prompts have more than {limit.tokens:,} tokens "
            f"({limit.source}): {_list_ids(query_ids, counts, too_long)}; {limit.advice}"
        )


def _too_long(counts: Sequence[TokenCount], limit: TokenLimit | None) -> list[int]:
    """Indices of the examples above the limit."""
    return [i for i, count in enumerate(counts) if limit is not None and count.total > limit.tokens]


def _list_ids(query_ids: Sequence[str], counts: Sequence[TokenCount], indices: Sequence[int]) -> str:
    """The longest of the examples, longest first, with their tokens."""
    longest = sorted(indices, key=lambda i: -counts[i].total)
    listed = "; ".join(f"{query_ids[i]}: {counts[i]}" for i in longest[:SHOWN_IDS])
    return listed + (f"; and {len(indices) - SHOWN_IDS:,} more" if len(indices) > SHOWN_IDS else "")


def _progress(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """The items, with a progress bar on the first process if they take more than two seconds."""
    return iter(tqdm(items, total=total, desc=label, delay=2, disable=not is_first_process()))
