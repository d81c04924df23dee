from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from data_construction.teacher.pages import image_url, page_hash
from mmr5_train.common.files import InputError


def decoded_image(path: Path, max_pixels: int) -> bytes:
    header, data = image_url(path, max_pixels).split(",")
    assert header == "data:image/jpeg;base64"
    return base64.b64decode(data)


def test_small_jpeg_is_sent_unchanged(tmp_path: Path):
    path = tmp_path / "page.jpg"
    for mode in ("RGB", "L"):
        Image.new(mode, (300, 400), "red" if mode == "RGB" else 7).save(path, quality=55)
        assert decoded_image(path, 120_000) == path.read_bytes()
        smaller = decoded_image(path, 119_999)
        assert smaller != path.read_bytes()
        with Image.open(io.BytesIO(smaller)) as image:
            assert image.width * image.height <= 119_999


def test_rotated_and_cmyk_jpegs_are_reencoded(tmp_path: Path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.new("RGB", (300, 400), "red").save(tmp_path / "rotated.jpg", exif=rotated)
    Image.new("CMYK", (300, 400)).save(tmp_path / "cmyk.jpg")
    for name, size in (("rotated.jpg", (400, 300)), ("cmyk.jpg", (300, 400))):
        with Image.open(io.BytesIO(decoded_image(tmp_path / name, 10**6))) as image:
            assert (image.mode, image.size) == ("RGB", size)
            assert 0x0112 not in image.getexif()


def test_other_images_are_shrunk_and_put_on_white(tmp_path: Path):
    path = tmp_path / "page.png"
    Image.new("RGBA", (400, 100), (0, 0, 0, 0)).save(path)
    with Image.open(io.BytesIO(decoded_image(path, 10_000))) as image:
        assert image.size == (200, 50)
        assert image.format == "JPEG"
        assert image.getpixel((9, 9)) == (255, 255, 255)
    with Image.open(io.BytesIO(decoded_image(path, 50_000))) as image:
        assert image.size == (400, 100)


def test_missing_and_invalid_images_raise(tmp_path: Path):
    with pytest.raises(InputError, match=r"no\.jpg: no such image"):
        image_url(tmp_path / "no.jpg", 1_000)
    with pytest.raises(InputError, match=r"no\.jpg: no such image"):
        page_hash(tmp_path / "no.jpg")
    stream = io.BytesIO()
    Image.new("RGB", (300, 400), "red").save(stream, "JPEG")
    for content in (b"not a picture", stream.getvalue()[:200], stream.getvalue()[:-20], b""):
        (tmp_path / "broken.jpg").write_bytes(content)
        with pytest.raises(InputError, match=r"broken\.jpg: not a readable image"):
            image_url(tmp_path / "broken.jpg", 10**6)


def test_page_hash_depends_on_the_content(tmp_path: Path):
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (30, 40), color).save(tmp_path / f"{name}.png")
    a, b, c = (page_hash(tmp_path / f"{name}.png") for name in "abc")
    assert a == b != c
