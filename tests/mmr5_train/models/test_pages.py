"""Opening and preparing page images."""

import io

import pypdfium2
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mmr5_train.common.files import InputError
from mmr5_train.models.pages import (
    MAX_PAGE_PIXELS,
    PageLimits,
    image_size,
    load_page,
    open_pages,
    page_limits,
    page_size,
    prepare_page,
    render_pdf_pages,
    visual_tokens,
)

LIMITS = PageLimits(factor=28, min_pixels=4 * 28 * 28, max_pixels=500_000)
SIDES = st.integers(30, 4000)


def open_list(pages):
    [opened] = open_pages([pages], LIMITS)
    return opened


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "a page.png"
    Image.new("RGB", (60, 80), "red").save(path)
    return path


@pytest.fixture
def report(tmp_path):
    """A PDF of three pages that differ in width."""
    return write_pdf(tmp_path / "report.pdf", [(300, 400), (400, 400), (5000, 400)])


def write_pdf(path, page_sizes):
    pdf = pypdfium2.PdfDocument.new()
    for width, height in page_sizes:
        pdf.new_page(width, height)
    pdf.save(path)
    return path


@given(width=SIDES, height=SIDES)
def test_page_size_is_within_the_limits_and_stable(width, height):
    size = page_size(width, height, LIMITS)
    assert size[0] % 28 == size[1] % 28 == 0
    assert LIMITS.min_pixels <= size[0] * size[1] <= LIMITS.max_pixels
    assert page_size(*size, LIMITS) == size


@pytest.mark.parametrize(
    ("min_pixels", "max_pixels"),
    [(784, 9_500), (4 * 784, 500_000), (56 * 56, 14 * 14 * 4 * 1280), (256 * 784, 1280 * 784), (10**6, 10**6)],
)
@pytest.mark.parametrize("factor", [28, 32])
def test_page_size_equals_that_of_the_transformers_image_processor(factor, min_pixels, max_pixels):
    """From half a visual token up, where the processor rounds no side to 0, and where it respects max_pixels."""
    limits = PageLimits(factor, min_pixels, max_pixels)
    sides = [17, 28, 31, 41, 42, 43, 100, 255, 777, 1024, 1654, 2339, 4096]
    compared = 0
    for width in sides:
        for height in sides:
            if max(width, height) <= 200 * min(width, height):
                expected = smart_resize(height, width, factor, min_pixels, max_pixels)
                is_valid = max(expected) <= 200 * min(expected) and expected[0] * expected[1] <= max_pixels
                if is_valid or max_pixels < 2 * min_pixels:
                    compared += 1
                    assert page_size(width, height, limits) == expected[::-1], (width, height)
    assert compared > 100


@pytest.mark.parametrize("factor", [28, 32])
@pytest.mark.parametrize("tokens", [1, 2, 12, 40, 100, 199, 512, 16_384])
def test_long_pages_are_within_the_limits(factor, tokens):
    """The processor's own rule exceeds max_pixels for a page of 150:1 if it allows fewer than 150 tokens.

    It also rejects some of its own sizes: 39 × 7800 pixels would become 28 × 7812, which is above 200:1.
    """
    limits = PageLimits(factor, factor**2, tokens * factor**2 + 100)
    for shorter in (1, 13, 20, 28, 39, 60, 700):
        for ratio in (1, 3, 11, 13, 41, 99, 150, 199, 200):
            for width, height in ((shorter, shorter * ratio), (shorter * ratio, shorter)):
                size = page_size(width, height, limits)
                assert size[0] % factor == size[1] % factor == 0
                assert factor**2 <= size[0] * size[1] <= limits.max_pixels, (width, height)
                assert smart_resize(size[1], size[0], *limits) == size[::-1], "the processor resizes it again"


@given(width=SIDES, height=SIDES, low=st.integers(1, 60), spread=st.integers(0, 60))
def test_visual_tokens_are_those_that_the_processor_computes(width, height, low, spread):
    """Also with limits so close that the processor resizes a prepared page again."""
    limits = PageLimits(28, low * 784, (low + spread) * 784)
    assume(max(width, height) <= 100 * min(width, height))
    prepared = page_size(width, height, limits)
    rows, columns = (side // 28 for side in smart_resize(prepared[1], prepared[0], *limits))
    assert visual_tokens(width, height, limits) == rows * columns


def test_processor_does_not_resize_a_prepared_page(processor):
    noise = torch.randint(0, 256, (800, 600, 3), dtype=torch.uint8).numpy()
    page = prepare_page(Image.fromarray(noise), page_limits(processor))
    assert page.size == (84, 112)
    patches = processor.image_processor(images=[page], return_tensors="pt")
    assert patches["image_grid_thw"].tolist() == [[1, 8, 6]]
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    pixels = torch.tensor(list(page.tobytes()), dtype=torch.float32).view(112, 84, 3).permute(2, 0, 1) / 255
    expected = ((pixels - mean) / std)[:, :14, :14]
    first_patch = patches["pixel_values"][0].view(3, 2, 14, 14)[:, 0]
    assert torch.allclose(first_patch, expected, atol=1e-5)


def test_transparent_areas_become_white():
    page = prepare_page(Image.new("RGBA", (280, 280), (255, 0, 0, 0)), LIMITS)
    assert page.mode == "RGB"
    assert page.getcolors() == [(280 * 280, (255, 255, 255))]


def test_prepare_page_rejects_an_extreme_aspect_ratio():
    with pytest.raises(InputError, match="aspect ratio above 200:1"):
        prepare_page(Image.new("RGB", (4000, 10)), LIMITS)


@pytest.mark.parametrize("limits", [LIMITS, PageLimits(28, 784, 9_500)], ids=["large", "small and cached"])
def test_load_page_names_an_unreadable_file(tmp_path, limits):
    with pytest.raises(InputError, match=r"nowhere\.png: no such page image"):
        load_page(tmp_path / "nowhere.png", limits)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but then nothing")
    with pytest.raises(InputError, match=r"broken\.png: not a readable page image"):
        load_page(tmp_path / "broken.png", limits)
    complete = tmp_path / "complete.jpg"
    Image.effect_noise((300, 300), 40).convert("RGB").save(complete)
    (tmp_path / "truncated.jpg").write_bytes(complete.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"truncated\.jpg: not a readable page image"):
        load_page(tmp_path / "truncated.jpg", limits)


def test_image_size_reads_the_header_and_names_the_file(red, tmp_path):
    assert image_size(red) == (60, 80)
    (tmp_path / "truncated.png").write_bytes(red.read_bytes()[:60])
    assert image_size(tmp_path / "truncated.png") == (60, 80)
    Image.new("RGB", (4000, 10)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match=r"strip\.png has 4000 × 10 pixels, an aspect ratio above 200:1"):
        image_size(tmp_path / "strip.png")
    with pytest.raises(InputError, match=r"nowhere\.png: no such page image"):
        image_size(tmp_path / "nowhere.png")


def test_only_small_pages_are_cached(red):
    small = PageLimits(28, 784, 9_500)
    assert load_page(red, small) is load_page(red, small)
    assert load_page(red, LIMITS) is not load_page(red, LIMITS)


def test_every_form_of_input_gives_the_same_image(red):
    inputs = [red, str(red), red.as_uri(), red.read_bytes(), Image.open(red)]
    opened = open_list(inputs)
    assert [page.document for page in opened] == inputs
    expected = prepare_page(Image.open(red), LIMITS)
    assert all(page.image.tobytes() == expected.tobytes() for page in opened)


def test_pdf_path_becomes_all_of_its_pages(report):
    opened = open_list([report])
    assert [page.document for page in opened] == [f"{report}#page={i}" for i in (1, 2, 3)]
    assert len({page.image.size for page in opened}) == 3
    [second] = open_list([f"{report}#page=2"])
    assert second.document == f"{report}#page=2"
    assert second.image.tobytes() == opened[1].image.tobytes()
    [from_url] = open_list([f"{report.as_uri()}#page=2"])
    assert from_url.image.tobytes() == second.image.tobytes()


def test_pdf_pages_are_rendered_at_150_dpi(report):
    widths = [width * 150 / 72 for width in (300, 400, 5000)]
    assert [image.width for image in render_pdf_pages(report)] == pytest.approx(widths, abs=1)


def test_a4_page_at_150_dpi_has_the_tokens_of_the_release(tmp_path):
    """With the published limits of 3,136 and 12,845,056 pixels and tokens of 28 × 28 pixels."""
    [page] = render_pdf_pages(write_pdf(tmp_path / "a4.pdf", [(595, 842)]))
    width, height = page_size(*page.size, PageLimits(28, 3136, 12_845_056))
    assert width * height // 28**2 == 2772


def test_huge_pdf_pages_are_rendered_at_a_lower_resolution(tmp_path):
    """A poster of five metres would have 900 million pixels at 150 dpi."""
    [page] = render_pdf_pages(write_pdf(tmp_path / "poster.pdf", [(14_400, 14_400)]))
    assert page.size == (4096, 4096)
    assert page.width * page.height == MAX_PAGE_PIXELS


def test_a_page_in_several_lists_is_opened_once(red, report):
    first, second = open_pages([[red, report], [report, str(red), red]], LIMITS)
    pdf_pages = [f"{report}#page={i}" for i in (1, 2, 3)]
    assert [page.document for page in first] == [red, *pdf_pages]
    assert [page.document for page in second] == [*pdf_pages, str(red), red]
    images = {id(page.image) for opened in (first, second) for page in opened}
    assert len(images) == 5  # the same path as str and as Path counts as two


def test_several_pdfs_are_opened_in_parallel(report, tmp_path):
    """pdfium itself is not thread-safe."""
    copies = [tmp_path / f"{i}.pdf" for i in range(16)]
    for copy in copies:
        copy.write_bytes(report.read_bytes())
    assert len(open_list(copies)) == 48


def test_an_unusable_pdf_page_does_not_block_other_pdfs(report, tmp_path):
    """An error between two pages of a PDF must release the lock on pdfium."""
    unusable = write_pdf(tmp_path / "long.pdf", [(300, 400), (10_000, 10), (300, 400)])
    copies = [tmp_path / f"{i}.pdf" for i in range(8)]
    for copy in copies:
        copy.write_bytes(unusable.read_bytes())
    with pytest.raises(InputError, match="aspect ratio above 200:1"):
        open_list(copies)
    assert len(open_list([report])) == 3


def test_unreadable_bytes_and_other_types_are_named_by_their_position(red):
    with pytest.raises(InputError, match=r"page 2 \(3 bytes\): not a readable page image"):
        open_list([red, b"abc"])
    with pytest.raises(InputError, match="page 1: expected a path, bytes, an open file or a PIL image, found int"):
        open_list([3])


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "http://localhost/a.png", "file://host/a.png", "s3://b/a"]
)
def test_urls_of_other_machines_are_rejected(url):
    with pytest.raises(InputError, match="only local files are supported"):
        open_list([url])


def test_broken_pdfs_and_wrong_page_numbers_are_named(report, tmp_path):
    with pytest.raises(InputError, match=r"has 3 pages; expected a page number up to 3, found 4"):
        open_list([f"{report}#page=4"])
    with pytest.raises(InputError, match="expected #page=N with N from 1, found #page=0"):
        open_list([f"{report}#page=0"])
    (tmp_path / "broken.pdf").write_bytes(report.read_bytes()[:40])
    with pytest.raises(InputError, match=r"broken\.pdf: not a PDF that can be opened"):
        open_list([tmp_path / "broken.pdf"])
    with pytest.raises(InputError, match=r"nowhere\.pdf: no such PDF"):
        list(render_pdf_pages(tmp_path / "nowhere.pdf"))


def test_too_many_pixels_are_rejected_before_decoding():
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(InputError, match=r"found 12000 × 12000"):
        open_list([bomb.getvalue()])
