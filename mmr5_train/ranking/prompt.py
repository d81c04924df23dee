"""The one prompt: SFT, GRPO, evaluation and inference all build their messages here.

Structure as in MM-R5 (arXiv 2506.12364, section 3): system text, the question, then "Image i:" before each
page image; the model answers with a think block and an answer block. The words are this project's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, field_validator
from yaml import YAMLError

from mmr5_train.common.config import config_path, group_choices
from mmr5_train.common.files import InputError, validation_message
from mmr5_train.ranking.records import LocalId, Record

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

# What would let a question act as structure: chat and vision tokens, and the answer's own tags.
_STRUCTURE = re.compile(r"<(?=\|)|<(?=/?(?:think|answer|image|img|video|tool_call)\b)", re.IGNORECASE)


class Prompt(Record):
    """The words around a question and its pages (config group `prompt`).

    `question` must hold `{query}` once; `image_label` must hold `{i}` once, or be empty for no label.
    Both may hold `{n}`, the number of pages.
    """

    name: str
    system: str
    question: str
    image_label: str
    images_first: bool = Field(
        default=False, description="all pages before the question, as some checkpoints want"
    )

    @field_validator("question")
    @classmethod
    def _has_query(cls, value: str) -> str:
        if value.count("{query}") != 1:
            raise ValueError("must hold {query} exactly once")
        return value

    @field_validator("image_label")
    @classmethod
    def _has_id(cls, value: str) -> str:
        if value and value.count("{i}") != 1:
            raise ValueError("must hold {i} exactly once, or be empty")
        return value


def neutralize(text: str) -> str:
    """User text that can't act as prompt structure: "<" before a tag or a special token becomes "‹"."""
    return _STRUCTURE.sub("‹", text)


def build_messages(prompt: Prompt, query: str, n_pages: int) -> list[dict[str, Any]]:
    """Chat messages for a question and `n_pages` page images.

    Each image is a `{"type": "image"}` part without data, in prompt order; the caller hands the images to
    the processor in the same order. Messages with data: `insert_images`.
    """
    if n_pages < 1:
        raise ValueError(f"a prompt needs at least one page, got {n_pages}")
    question = fill_template(prompt.question, n=n_pages, query=neutralize(query))
    pages: list[dict[str, Any]] = []
    for i in range(1, n_pages + 1):
        if prompt.image_label:
            pages.append({"type": "text", "text": fill_template(prompt.image_label, n=n_pages, i=i)})
        pages.append({"type": "image"})
    asked = [{"type": "text", "text": question}]
    return [
        {"role": "system", "content": [{"type": "text", "text": prompt.system}]},
        {"role": "user", "content": pages + asked if prompt.images_first else asked + pages},
    ]


def insert_images(
    messages: Sequence[dict[str, Any]], image_parts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The same messages with the k-th image placeholder replaced by `image_parts[k]`."""
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != len(image_parts):
        raise ValueError(f"the messages hold {places} images, and {len(image_parts)} were given")
    parts = iter(image_parts)
    filled = []
    for message in messages:
        content = [next(parts) if part["type"] == "image" else part for part in message["content"]]
        filled.append({**message, "content": content})
    return filled


def render_completion(think: str | None, answer: Sequence[LocalId]) -> str:
    """The completion that SFT teaches. Without `think`, the answer block alone."""
    listed = f"{ANSWER_OPEN}[{', '.join(str(i) for i in answer)}]{ANSWER_CLOSE}"
    return listed if think is None else f"{THINK_OPEN}{think}{THINK_CLOSE}{listed}"


def fill_template(template: str, **values: object) -> str:
    """Replaces {name} by its value, in one pass: braces in a question stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


def read_prompt(name: str | Path) -> Prompt:
    """A prompt: an option of configs/prompt, or a YAML file. Raises `InputError` for one that is no use."""
    path = config_path("prompt", str(name)) or Path(name)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return Prompt.model_validate(values)
    except FileNotFoundError:
        raise InputError(
            f"prompt: no such file as {path}; choose one of {group_choices('prompt')}, or import one: "
            "python scripts/import_prompt.py"
        ) from None
    except ValidationError as error:
        raise InputError(f"{path}: {validation_message(error)}") from None
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: can't be read as a prompt ({str(error).partition(chr(10))[0]})") from None
