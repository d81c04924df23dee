"""Which pictures pass, and what is said of those that do not."""

import io
import struct
import zlib

import bench_serve
import pytest
from PIL import Image

from mmr5_train.serving.errors import RequestError
from mmr5_train.serving.pictures import FORMATS, check_picture, read_document
from mmr5_train.serving.settings import Limits

LIMITS = Limits()


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def refusal(data, limits=LIMITS):
    with pytest.raises(RequestError) as refused:
        check_picture(data, "documents[0]", limits)
    assert refused.value.status == 422
    assert refused.value.param == "documents[0]"
    return refused.value.message


def png_that_claims(width, height):
    chunk = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + chunk + check + b"\0\0\0\1IDAT"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_passes_whole_and_fails_in_half(kind):
    data = bench_serve.encoded(kind)
    check_picture(data, "documents[0]", LIMITS)
    assert "documents[0]: " in refusal(data[: len(data) // 2])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_pixel_passes(mode):
    check_picture(saved(Image.new(mode, (40, 50)), "PNG"), "documents[0]", LIMITS)


def test_cmyk_and_floats_pass():
    check_picture(saved(Image.new("CMYK", (40, 50)), "JPEG"), "documents[0]", LIMITS)
    check_picture(saved(Image.new("F", (40, 50)), "TIFF"), "documents[0]", LIMITS)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "EPS", "PDF", "TGA"])
def test_other_kinds_are_not_even_tried(kind):
    assert "no picture of a known kind" in refusal(saved(Image.new("RGB", (40, 50)), kind))


def test_an_animation_gives_its_first_frame_and_a_tiff_with_pages_is_refused():
    frames = [Image.new("RGB", (40, 50), color) for color in ("red", "green")]
    check_picture(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "documents[0]", LIMITS)
    assert "several pages" in refusal(saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("side", [7_000, 60_000])
def test_pixels_are_counted_before_anything_is_decoded(side):
    assert "megapixels" in refusal(png_that_claims(side, side))


def test_a_small_file_of_many_pixels_is_refused():
    data = saved(Image.new("L", (2000, 1000)), "WEBP", lossless=True)
    assert len(data) < 1000
    assert "is 2000 × 1000 pixels, more than 1.5" in refusal(data, Limits(megapixels=1.5))


def test_what_comes_back_is_nothing_but_the_picture():
    picture = bench_serve.encoded("PNG")
    url = bench_serve.data_url(picture)
    assert read_document({"image": url, "more": 1}, "documents[0]", LIMITS, None) == (picture, {"image": url})


@pytest.mark.parametrize(
    "head", ["DATA:image/png;base64", "data:IMAGE/PNG;base64", "data:image/png;name=a.png;base64"]
)
def test_the_head_of_a_data_url_may_be_written_otherwise(head):
    url = head + "," + bench_serve.data_url(bench_serve.encoded("PNG")).partition(",")[2]
    assert read_document(url, "documents[0]", LIMITS, None)[1] == {"image": url}
