"""Fixtures of the teacher's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "page.jpg"
    Image.new("RGB", (300, 400), "red").save(path)
    return path
