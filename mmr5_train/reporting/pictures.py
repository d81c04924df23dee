"""Page pictures for the report: each page is embedded once, as large as the size limit of the file allows."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mmr5_train.common.pictures import as_seen

KeyT = TypeVar("KeyT", bound=Hashable)

# (longest side in pixels, JPEG quality), from large to small: the first entry that fits the budget is used.
SIZES = ((1200, 80), (1000, 78), (800, 75), (640, 72), (520, 68), (400, 62), (300, 58), (220, 50), (120, 40))
PLACEHOLDER = (600, 800)


@dataclass(frozen=True)
class Picture:
    """A page as a JPEG data URL. If the file can't be shown, `url` is empty and `problem` says why."""

    url: str
    width: int
    height: int
    problem: str = ""


def inline_pictures(paths: Mapping[KeyT, Path], budget: int) -> dict[KeyT, Picture]:
    """The pictures of `paths`, at the largest size for which their data URLs fit in `budget` characters.

    If even the smallest size exceeds `budget`, it is used anyway. A missing or unreadable file becomes a picture
    without `url`, so that the report can still be written.
    """
    for side, quality in SIZES[:-1]:
        pictures: dict[KeyT, Picture] = {}
        used = 0
        for key, path in paths.items():
            pictures[key] = _load(path, side, quality)
            used += len(pictures[key].url)
            if used > budget:
                break
        else:
            return pictures
    return {key: _load(path, *SIZES[-1]) for key, path in paths.items()}


def _load(path: Path, side: int, quality: int) -> Picture:
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image.draft("RGB", (side, side))
            page = as_seen(image)
        page.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        page.save(stream, "JPEG", quality=quality, optimize=True, progressive=True)
    except FileNotFoundError:
        return Picture("", *PLACEHOLDER, problem="page image not found")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Picture("", *PLACEHOLDER, problem="page image not readable")
    encoded = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{encoded}", page.width, page.height)
