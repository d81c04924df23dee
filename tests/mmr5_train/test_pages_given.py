import io

import pypdfium2
import pytest
from PIL import Image

from mmr5_train.pages import MAX_SIDE, open_pages, render_pdf
from mmr5_train.ranking.files import InputError


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "a page.png"
    Image.new("RGB", (60, 80), "red").save(path)
    return path


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.pdf"
    pdf = pypdfium2.PdfDocument.new()
    for width in (300, 400, 5000):
        pdf.new_page(width, 400)
    pdf.save(path)
    return path


def test_the_same_page_in_every_form(red):
    given = [red, str(red), red.as_uri(), red.read_bytes(), Image.open(red)]
    opened = open_pages(given)
    assert [name for name, _ in opened] == given
    assert {picture.convert("RGB").tobytes() for _, picture in opened} == {Image.open(red).tobytes()}


def test_a_pdf_stands_for_its_pages(report):
    opened = open_pages([report])
    assert [name for name, _ in opened] == [f"{report}#page={i}" for i in (1, 2, 3)]
    widths = [round(300 * 150 / 72), round(400 * 150 / 72), MAX_SIDE]
    assert [picture.width for _, picture in opened] == pytest.approx(widths, abs=1)
    [(name, second)] = open_pages([f"{report}#page=2"])
    assert name == f"{report}#page=2"
    assert second.size == opened[1][1].size
    [(_, by_url)] = open_pages([f"{report.as_uri()}#page=2"])
    assert by_url.size == second.size


def test_bytes_of_anything_else_are_named_by_their_place(red):
    with pytest.raises(InputError, match=r"page 2 of those given \(3 bytes\): not a readable page image"):
        open_pages([red, b"abc"])
    with pytest.raises(
        InputError, match="page 1 of those given: expected a path, bytes or a PIL image, found int"
    ):
        open_pages([3])


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "http://localhost/a.png", "file://host/a.png", "s3://b/a"]
)
def test_nothing_is_fetched(url):
    with pytest.raises(InputError, match="only files of this machine"):
        open_pages([url])


def test_broken_pdfs_and_pages_that_are_not_there(report, tmp_path):
    with pytest.raises(InputError, match=r"has 3 pages, page 4 was asked for"):
        open_pages([f"{report}#page=4"])
    with pytest.raises(InputError, match="expected #page=N with N from 1, found #page=0"):
        open_pages([f"{report}#page=0"])
    (tmp_path / "broken.pdf").write_bytes(report.read_bytes()[:40])
    with pytest.raises(InputError, match=r"broken\.pdf: not a PDF that can be opened"):
        open_pages([tmp_path / "broken.pdf"])
    with pytest.raises(InputError, match=r"nowhere\.pdf: no such PDF"):
        list(render_pdf(tmp_path / "nowhere.pdf"))


def test_a_picture_that_claims_too_much_is_refused_before_it_is_decoded(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(InputError, match=r"claims 12000 × 12000 pixels"):
        open_pages([bomb.getvalue()])
