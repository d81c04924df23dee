"""Vision teachers with small settings and an empty store."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import yaml

from data_construction.teacher.teacher import make_teacher
from data_construction.teacher.vision import OpenAIConfig, OpenAITeacher
from mmr5_train.common.config import CONFIGS
from mmr5_train.ranking.records import Page

KEY = "sk-secret-0123456789"
PAGE = Page(doc_name="d", page=0, domain="x", image="page.jpg", width=1, height=1)


def make_config(**fields: Any) -> OpenAIConfig:
    values = yaml.safe_load((CONFIGS / "teacher" / "openai.yaml").read_text(encoding="utf-8"))
    return OpenAIConfig(**{**values, "model": "m", "attempts": 3, "timeout": 20, "max_wait": 5, **fields})


def new_teacher(folder: Path, **fields: Any) -> OpenAITeacher:
    """A teacher with an empty store."""
    teacher = make_teacher(make_config(**fields), folder / f"{secrets.token_hex(4)}.sqlite", 40, False)
    assert isinstance(teacher, OpenAITeacher)
    return teacher
