"""The prompt. SFT, GRPO, evaluation and inference all build their messages here.

The structure follows MM-R5 (arXiv 2506.12364, section 3): a system text, the question, then "Image i:" before each
page image. The model answers with a think block and an answer block. The wording is this project's own.
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

# Text in a question that could act as prompt structure: chat and vision tokens, and the tags of the answer.
_STRUCTURE = re.compile(r"<(?=\|)|<(?=/?(?:think|answer|image|img|video|tool_call)\b)", re.IGNORECASE)


class Prompt(Record):
    """The texts around a question and its pages: a file of the config group `prompt`."""

    name: str = Field(description="name of the prompt")
    system: str = Field(description="system text, used as it is")
    question: str = Field(
        description="text with the question: must contain `{query}` exactly once; "
        "may contain `{n}`, the number of pages"
    )
    image_label: str = Field(
        description="text before each page image: must contain `{i}`, the local id, exactly once, or be empty; "
        "may contain `{n}`"
    )
    images_first: bool = Field(
        default=False, description="whether all pages come before the question, as some checkpoints expect"
    )

    @field_validator("question")
    @classmethod
    def _has_query(cls, value: str) -> str:
        if value.count("{query}") != 1:
            raise ValueError("must contain {query} exactly once")
        return value

    @field_validator("image_label")
    @classmethod
    def _has_id(cls, value: str) -> str:
        if value and value.count("{i}") != 1:
            raise ValueError("must contain {i} exactly once, or be empty")
        return value


def neutralize(text: str) -> str:
    """Replaces "<" by "‹" before a tag or a special token, so that user text can't act as prompt structure."""
    return _STRUCTURE.sub("‹", text)


def build_messages(prompt: Prompt, query: str, n_pages: int) -> list[dict[str, Any]]:
    """Chat messages for a question and `n_pages` page images.

    Each image is a part `{"type": "image"}` without data, in prompt order. The caller passes the images to the
    processor in the same order, or fills them in with `insert_images`.

    Raises:
        ValueError: if `n_pages` is less than 1.
    """
    if n_pages < 1:
        raise ValueError(f"a prompt needs at least one page, got {n_pages}")
    question = fill_template(prompt.question, n=n_pages, query=neutralize(query))
    pages: list[dict[str, Any]] = []
    for i in range(1, n_pages + 1):
        if prompt.image_label:
            pages.append({"type": "text", "text": fill_template(prompt.image_label, n=n_pages, i=i)})
        pages.append({"type": "image"})
    question_part = [{"type": "text", "text": question}]
    return [
        {"role": "system", "content": [{"type": "text", "text": prompt.system}]},
        {"role": "user", "content": pages + question_part if prompt.images_first else question_part + pages},
    ]


def insert_images(
    messages: Sequence[dict[str, Any]], image_parts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A copy of the messages with the k-th image placeholder replaced by `image_parts[k]`.

    Raises:
        ValueError: if the number of placeholders and the number of images differ.
    """
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(image_parts):
        raise ValueError(f"the messages have {placeholders} image placeholders, got {len(image_parts)} images")
    parts = iter(image_parts)
    filled = []
    for message in messages:
        content = [next(parts) if part["type"] == "image" else part for part in message["content"]]
        filled.append({**message, "content": content})
    return filled


def render_completion(think: str | None, answer: Sequence[LocalId]) -> str:
    """A completion in the form that SFT trains on. If `think` is None, it is only the answer block."""
    answer_block = f"{ANSWER_OPEN}[{', '.join(str(i) for i in answer)}]{ANSWER_CLOSE}"
    return answer_block if think is None else f"{THINK_OPEN}{think}{THINK_CLOSE}{answer_block}"


def fill_template(template: str, **values: object) -> str:
    """Replaces each {name} by its value in a single pass, so braces inside a value stay unchanged."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


def read_prompt(name: str | Path) -> Prompt:
    """Reads a prompt: `name` is an option of configs/prompt or the path of a YAML file.

    Raises:
        InputError: if the file does not exist, can't be read, or is not a valid prompt.
    """
    path = config_path("prompt", str(name)) or Path(name)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return Prompt.model_validate(values)
    except FileNotFoundError:
        raise InputError(
            f"prompt: no such file: {path}; choose one of {group_choices('prompt')}, or import a prompt with "
            "python scripts/import_prompt.py"
        ) from None
    except ValidationError as error:
        raise InputError(f"{path}: {validation_message(error)}") from None
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: can't be read as a prompt ({str(error).partition(chr(10))[0]})") from None
