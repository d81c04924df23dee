from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pypdfium2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_corpora import image_bytes, write_pdf

from data_construction.corpus.page_cache import PageCache, UnreadablePageError, folder_name, page_text
from mmr5_train.common.files import InputError


def cache_in(folder: Path, dpi: int = 72, max_side: int = 500) -> PageCache:
    return PageCache(folder, dpi, max_side)


def render(cache: PageCache, path: Path, number: int = 0, source: str = "hash") -> Path:
    with pypdfium2.PdfDocument(path) as pdf:
        return cache.from_pdf("a.pdf", number, pdf[number], source).path


def test_small_images_are_stored_unchanged(tmp_path: Path) -> None:
    for kind, suffix in (("JPEG", ".jpg"), ("PNG", ".png")):
        data = image_bytes("red", kind=kind)
        image = cache_in(tmp_path).from_bytes("a", 3, data)
        assert image.path.read_bytes() == data
        assert image.path.suffix == suffix
        assert (image.width, image.height) == (60, 80)


def test_without_max_side_pages_keep_their_size(tmp_path: Path) -> None:
    """An A4 page at 150 dpi, as bytes and as a PDF: 2,772 visual tokens instead of 962 at 1,024 pixels."""
    cache = PageCache(tmp_path / "c", dpi=150, max_side=None)
    data = image_bytes("red", size=(1240, 1754))
    image = cache.from_bytes("a", 0, data)
    assert image.path.read_bytes() == data
    assert (image.width, image.height, image.source_width, image.source_height) == (1240, 1754, 1240, 1754)
    write_pdf(tmp_path / "a.pdf", ["one"], size=(595, 842))
    with pypdfium2.PdfDocument(tmp_path / "a.pdf") as pdf:
        rendered = cache.from_pdf("a", 0, pdf[0], "h")
    assert (rendered.width, rendered.height) == (1240, 1755)
    assert (rendered.source_width, rendered.source_height) == (1240, 1755)


def test_pages_record_the_size_before_a_limit_shrank_them(tmp_path: Path) -> None:
    small = cache_in(tmp_path, max_side=40).from_bytes("a", 0, image_bytes("red", size=(600, 800)))
    assert (small.width, small.height, small.source_width, small.source_height) == (30, 40, 600, 800)
    write_pdf(tmp_path / "a.pdf", ["one"], size=(300, 400))
    with pypdfium2.PdfDocument(tmp_path / "a.pdf") as pdf:
        page = cache_in(tmp_path, dpi=144, max_side=100).from_pdf("a", 0, pdf[0], "h")
    assert (page.width, page.height, page.source_width, page.source_height) == (75, 100, 600, 800)
    huge = image_bytes("white", size=(4100, 4100))
    limited = PageCache(tmp_path, 150, None).from_bytes("a", 1, huge)
    assert (limited.width, limited.height, limited.source_width) == (4096, 4096, 4100)


def test_large_and_transparent_images_become_jpeg(tmp_path: Path) -> None:
    large = cache_in(tmp_path, max_side=40).from_bytes("a", 0, image_bytes("red"))
    assert (large.width, large.height, large.path.suffix) == (30, 40, ".jpg")
    stream = io.BytesIO()
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(stream, "PNG")
    clear = cache_in(tmp_path).from_bytes("a", 1, stream.getvalue())
    with Image.open(clear.path) as image:
        assert image.mode == "RGB"
        assert image.getpixel((5, 5)) == (255, 255, 255)  # transparent pixels become white


def test_invalid_and_truncated_images_raise(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    with pytest.raises(UnreadablePageError, match="not an image"):
        cache.from_bytes("a", 0, b"nothing like it")
    with pytest.raises(UnreadablePageError, match="not an image"):
        cache.from_bytes("a", 0, b"")
    noise = Image.effect_noise((80, 80), 90).convert("RGB")
    for kind in ("JPEG", "PNG"):
        stream = io.BytesIO()
        noise.save(stream, kind)
        with pytest.raises(UnreadablePageError, match="can't be decoded"):
            cache.from_bytes("a", 0, stream.getvalue()[:-2000])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_rendering_respects_dpi_and_max_side(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["one"], size=(300, 400))
    with pypdfium2.PdfDocument(tmp_path / "a.pdf") as pdf:
        small = cache_in(tmp_path / "c", dpi=72, max_side=500).from_pdf("a", 0, pdf[0], "h")
        capped = cache_in(tmp_path / "c", dpi=600, max_side=128).from_pdf("a", 0, pdf[0], "h")
    assert (small.width, small.height) == (300, 400)
    assert (capped.width, capped.height) == (96, 128)


def test_a_page_is_rendered_once(tmp_path: Path, no_render: Callable[[], None]) -> None:
    write_pdf(tmp_path / "a.pdf", ["one", "two"])
    first = [render(cache_in(tmp_path / "c"), tmp_path / "a.pdf", number) for number in (0, 1)]
    no_render()
    assert [render(cache_in(tmp_path / "c"), tmp_path / "a.pdf", number) for number in (0, 1)] == first


def test_file_name_depends_on_source_and_settings(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["one", "two"])
    names = {
        render(cache_in(tmp_path / "c"), tmp_path / "a.pdf"),
        render(cache_in(tmp_path / "c"), tmp_path / "a.pdf", number=1),
        render(cache_in(tmp_path / "c"), tmp_path / "a.pdf", source="another file"),
        render(cache_in(tmp_path / "c", dpi=80), tmp_path / "a.pdf"),
        render(cache_in(tmp_path / "c", max_side=300), tmp_path / "a.pdf"),
    }
    assert len(names) == 5


def test_the_same_page_gives_the_same_bytes(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["some words on a page"])
    paths = [render(cache_in(tmp_path / name), tmp_path / "a.pdf") for name in ("c", "d")]
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in paths}) == 1
    assert paths[0].relative_to(tmp_path / "c") == paths[1].relative_to(tmp_path / "d")


def test_damaged_cache_file_is_rewritten(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["one"])
    path = render(cache_in(tmp_path / "c"), tmp_path / "a.pdf")
    original = path.read_bytes()
    path.write_bytes(b"")
    assert render(cache_in(tmp_path / "c"), tmp_path / "a.pdf").read_bytes() == original


def test_unwritable_cache_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"page images can't be written .*corpus.page_cache="):
        cache_in(tmp_path / "file").from_bytes("a", 0, image_bytes())


def test_page_text_is_the_text_layer(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["First line\nsecond line", ""])
    with pypdfium2.PdfDocument(tmp_path / "a.pdf") as pdf:
        assert page_text(pdf[0]) == "First line\nsecond line"
        assert page_text(pdf[1]) == ""


@given(st.text(min_size=1), st.text(min_size=1))
def test_folder_names_are_safe_and_distinct(first: str, second: str) -> None:
    assert Path(folder_name(first)).name == folder_name(first)
    assert not folder_name(first).startswith(".")
    assert (folder_name(first) == folder_name(second)) == (first == second)


def test_strips_and_images_of_too_many_pixels_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later stage could show them to a model."""
    cache = cache_in(tmp_path)
    with pytest.raises(UnreadablePageError, match=r"a strip of 2100 × 10 pixels, an aspect ratio above 200:1"):
        cache.from_bytes("a", 0, image_bytes("red", size=(2100, 10)))
    with pytest.raises(UnreadablePageError, match="a strip of 440 × 2 pixels"):  # rounded when it was shrunk
        cache_in(tmp_path, max_side=440).from_bytes("a", 1, image_bytes("red", size=(4400, 22)))
    assert cache.from_bytes("a", 2, image_bytes("red", size=(490, 3))).width == 490
    write_pdf(tmp_path / "a.pdf", ["one"], size=(10, 2400))
    with pytest.raises(UnreadablePageError, match="a strip of 10 × 2400 pixels"):
        render(cache, tmp_path / "a.pdf")
    monkeypatch.setattr("data_construction.corpus.page_cache.MAX_DECODED_PIXELS", 5_000)
    with pytest.raises(UnreadablePageError, match="it has 100 × 60 pixels, more than 5,000"):
        cache.from_bytes("a", 3, image_bytes("red", size=(100, 60)))
