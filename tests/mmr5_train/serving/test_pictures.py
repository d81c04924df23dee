"""Which images are accepted, and the errors for the others."""

import io
import struct
import zlib

import pytest
from malformed_requests import data_url, encode_image
from PIL import Image

from mmr5_train.serving.errors import RequestError
from mmr5_train.serving.pictures import FORMATS, check_picture, read_document
from mmr5_train.serving.settings import Limits

LIMITS = Limits()


def to_bytes(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rejection_message(data, limits=LIMITS):
    with pytest.raises(RequestError) as rejected:
        check_picture(data, "documents[0]", limits)
    assert rejected.value.status == 422
    assert rejected.value.param == "documents[0]"
    return rejected.value.message


def png_header(width, height):
    chunk = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + chunk + check + b"\0\0\0\1IDAT"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_accepted_unless_truncated(kind):
    data = encode_image(kind)
    check_picture(data, "documents[0]", LIMITS)
    assert "documents[0]: " in rejection_message(data[: len(data) // 2])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_pixel_mode_is_accepted(mode):
    check_picture(to_bytes(Image.new(mode, (40, 50)), "PNG"), "documents[0]", LIMITS)


def test_cmyk_and_float_pixels_are_accepted():
    check_picture(to_bytes(Image.new("CMYK", (40, 50)), "JPEG"), "documents[0]", LIMITS)
    check_picture(to_bytes(Image.new("F", (40, 50)), "TIFF"), "documents[0]", LIMITS)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "EPS", "PDF", "TGA"])
def test_other_formats_are_rejected(kind):
    assert "is not an image in a supported format" in rejection_message(to_bytes(Image.new("RGB", (40, 50)), kind))


def test_animated_gif_is_accepted_and_multi_page_tiff_is_rejected():
    frames = [Image.new("RGB", (40, 50), color) for color in ("red", "green")]
    check_picture(to_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]), "documents[0]", LIMITS)
    tiff = to_bytes(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert "several pages" in rejection_message(tiff)


@pytest.mark.parametrize("side", [7_000, 60_000])
def test_image_size_is_checked_before_decoding(side):
    assert "megapixels" in rejection_message(png_header(side, side))


def test_small_file_with_many_pixels_is_rejected():
    data = to_bytes(Image.new("L", (2000, 1000)), "WEBP", lossless=True)
    assert len(data) < 1000
    assert "is 2000 × 1000 pixels, more than 1.5" in rejection_message(data, Limits(megapixels=1.5))


def test_returned_document_contains_only_the_image():
    image = encode_image("PNG")
    url = data_url(image)
    assert read_document({"image": url, "more": 1}, "documents[0]", LIMITS, None) == (
        image,
        {"image": url, "text": ""},
    )


@pytest.mark.parametrize(
    "head", ["DATA:image/png;base64", "data:IMAGE/PNG;base64", "data:image/png;name=a.png;base64"]
)
def test_data_url_header_variants_are_accepted(head):
    url = head + "," + data_url(encode_image("PNG")).partition(",")[2]
    assert read_document(url, "documents[0]", LIMITS, None)[1] == {"image": url, "text": ""}
