"""Odd pictures are shown as a person sees them, everywhere alike."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_construction.corpus.page_cache import PageCache
from data_construction.teacher.pages import image_url
from mmr5_train.common.files import InputError
from mmr5_train.common.pictures import as_seen, seen_size
from mmr5_train.models.pages import PageLimits, image_size, load_page, open_image, open_pages
from mmr5_train.reporting import pictures as report_pictures
from mmr5_train.serving.errors import RequestError
from mmr5_train.serving.pictures import check_picture
from mmr5_train.serving.settings import Limits

RAMP = np.tile(np.linspace(0, 1, 200), (280, 1))  # black at the left, white at the right
LIMITS = PageLimits(4, 16, 10**6)


def ramp(scale: float, kind: Any) -> Image.Image:
    return Image.fromarray((RAMP * scale).astype(kind))


def turned(orientation: int) -> tuple[Image.Image, dict[str, Any]]:
    """A ramp that is stored so that `orientation` shows it as RAMP."""
    grey = Image.fromarray((RAMP * 255).astype(np.uint8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    return grey.transpose(undo[orientation]), {"exif": exif}


def with_palette() -> Image.Image:
    return Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").quantize(256)


def transparent(mode: str) -> Image.Image:
    """White paper where the picture is transparent: the ramp as opacity of black ink."""
    layer = np.zeros((280, 200, 4), np.uint8)
    layer[..., 3] = 255 - (RAMP * 255).astype(np.uint8)
    return Image.fromarray(layer, "RGBA").convert(mode)


def cmyk() -> Image.Image:
    layer = np.zeros((280, 200, 4), np.uint8)
    layer[..., 3] = 255 - (RAMP * 255).astype(np.uint8)
    return Image.fromarray(layer, "CMYK")


# Name of a file → the picture and the options with which it is saved. All of them show RAMP.
PICTURES: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "grey8.png": (ramp(255, np.uint8), {}),
    "grey16.png": (ramp(65535, np.uint16), {}),
    "grey16.tif": (ramp(65535, np.uint16), {}),
    "grey32.tif": (ramp(65535, np.int32), {}),
    "grey32_of_8_bits.tif": (ramp(255, np.int32), {}),
    "float_to_1.tif": (ramp(1, np.float32), {}),
    "float_to_255.tif": (ramp(255, np.float32), {}),
    "palette.png": (with_palette(), {}),
    "palette.gif": (with_palette(), {}),
    "opacity.png": (transparent("RGBA"), {}),
    "opacity_grey.png": (transparent("LA"), {}),
    "opacity.webp": (transparent("RGBA"), {"lossless": True}),
    "ink.tif": (cmyk(), {}),
    "ink.jpg": (cmyk(), {"quality": 95}),
    **{f"turned_{i}.jpg": (turned(i)[0], turned(i)[1] | {"quality": 95}) for i in range(2, 9)},
    **{f"turned_{i}.png": turned(i) for i in range(2, 9)},
}


@pytest.fixture(params=PICTURES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    picture, options = PICTURES[request.param]
    picture.save(tmp_path / request.param, **options)
    return tmp_path / request.param


def assert_is_the_ramp(image: Image.Image, name: str) -> None:
    assert image.mode == "RGB", name
    scaled = image.resize((20, 28), Image.Resampling.BOX)
    expected = Image.fromarray((RAMP * 255).astype(np.uint8)).resize((20, 28), Image.Resampling.BOX)
    difference = np.abs(np.asarray(scaled, np.float64) - np.asarray(expected, np.float64)[..., None])
    assert difference.max() < 8, name


def test_every_entry_point_shows_the_same_picture(path: Path, tmp_path: Path) -> None:
    name, data = path.name, path.read_bytes()
    assert_is_the_ramp(open_image(path), name)
    assert image_size(path) == (200, 280)
    assert_is_the_ramp(load_page(path, LIMITS), name)
    for page in (path, data, Image.open(path)):  # what `Reranker` takes
        [[opened]] = open_pages([[page]], LIMITS)
        assert_is_the_ramp(opened.image, name)
    check_picture(data, "documents[0]", Limits())  # what the server takes
    cached = PageCache(tmp_path / "cache", dpi=150, max_side=None).from_bytes("d", 0, data)
    assert (cached.width, cached.height) == (200, 280)
    assert_is_the_ramp(open_image(cached.path), name)
    url = image_url(path, 10**6)  # what a teacher gets
    assert_is_the_ramp(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), name)
    picture = report_pictures._load(path, 400, 90)
    assert_is_the_ramp(Image.open(io.BytesIO(base64.b64decode(picture.url.partition(",")[2]))), name)


@pytest.mark.parametrize("values", [RAMP * 300, RAMP - 0.5, np.full((4, 4), np.nan)])
def test_grey_values_without_a_meaning_are_refused(tmp_path: Path, values: Any) -> None:
    path = tmp_path / "values.tif"
    Image.fromarray(values.astype(np.float32)).save(path)
    with pytest.raises(ValueError, match="grey values are from"):
        as_seen(Image.open(path))
    with pytest.raises(InputError, match=r"values.tif: not a readable page image \(its grey values are from"):
        open_pages([[path]], LIMITS)
    with pytest.raises(InputError, match="the page image can't be shown: its grey values are from"):
        open_pages([[Image.open(path)]], LIMITS)
    with pytest.raises(RequestError, match="grey values"):
        check_picture(path.read_bytes(), "documents[0]", Limits())


def test_the_pages_of_a_tiff_are_pages(tmp_path: Path) -> None:
    path = tmp_path / "three.tif"
    frames = [Image.new("L", (20 + i, 28), shade) for i, shade in enumerate((0, 128, 255))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    [opened] = open_pages([[path]], LIMITS)
    assert [page.document for page in opened] == [f"{path}#page={i}" for i in (1, 2, 3)]
    assert [page.image.getpixel((0, 0))[0] for page in opened] == [0, 128, 255]
    [[second], from_bytes] = open_pages([[f"{path}#page=2"], [path.read_bytes()]], LIMITS)
    assert second.image.getpixel((0, 0)) == (128, 128, 128)
    assert len(from_bytes) == 3
    with pytest.raises(InputError, match="has 3 pages; expected a page number up to 3, found 4"):
        open_pages([[f"{path}#page=4"]], LIMITS)
    with pytest.raises(InputError, match=r"three.tif: is a TIFF of 3 pages"):
        open_image(path)


def test_the_size_of_a_turned_picture_comes_from_its_header(tmp_path: Path) -> None:
    picture = Image.new("RGB", (280, 200), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, 279, 40), fill="navy")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert seen_size(image) == (200, 280)
        shown = as_seen(image)
    assert shown.size == (200, 280)
    assert shown.getpixel((190, 140))[2] > 100 > shown.getpixel((190, 140))[0]  # the blue bar at the right
    assert min(shown.getpixel((10, 140))) > 240
