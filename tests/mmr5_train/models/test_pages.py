import io

import pypdfium2
import pytest
from PIL import Image

from mmr5_train.common.files import InputError
from mmr5_train.models.pages import MAX_SIDE, open_pages, render_pdf


def opened_as_they_are(given):
    [row] = open_pages([given], lambda picture: picture)
    return row


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
    opened = opened_as_they_are(given)
    assert [name for name, _ in opened] == given
    assert {picture.convert("RGB").tobytes() for _, picture in opened} == {Image.open(red).tobytes()}


def test_a_pdf_stands_for_its_pages(report):
    opened = opened_as_they_are([report])
    assert [name for name, _ in opened] == [f"{report}#page={i}" for i in (1, 2, 3)]
    widths = [round(300 * 150 / 72), round(400 * 150 / 72), MAX_SIDE]
    assert [picture.width for _, picture in opened] == pytest.approx(widths, abs=1)
    [(name, second)] = opened_as_they_are([f"{report}#page=2"])
    assert name == f"{report}#page=2"
    assert second.size == opened[1][1].size
    [(_, by_url)] = opened_as_they_are([f"{report.as_uri()}#page=2"])
    assert by_url.size == second.size


def test_what_stands_in_several_rows_is_opened_once_and_only_what_was_prepared_is_kept(red, report):
    prepared = []

    def smaller(picture):
        prepared.append(picture)
        return picture.resize((6, 8))

    first, second = open_pages([[red, report], [report, str(red), red]], smaller)
    assert len(prepared) == 5  # the same file under a name of another type is another
    assert [name for name, _ in first] == [red, *(f"{report}#page={i}" for i in (1, 2, 3))]
    assert [name for name, _ in second] == [*(f"{report}#page={i}" for i in (1, 2, 3)), str(red), red]
    assert {picture.size for row in (first, second) for _, picture in row} == {(6, 8)}


def test_many_pdfs_at_once(report, tmp_path):
    """pdfium works in one thread at a time."""
    copies = [tmp_path / f"{i}.pdf" for i in range(16)]
    for copy in copies:
        copy.write_bytes(report.read_bytes())
    [row] = open_pages([copies], lambda picture: picture)
    assert len(row) == 48


def test_a_page_that_can_t_be_prepared_holds_up_no_other_pdf(report, tmp_path):
    copies = [tmp_path / f"{i}.pdf" for i in range(8)]
    for copy in copies:
        copy.write_bytes(report.read_bytes())

    def refuse(picture):
        raise InputError("too long")

    with pytest.raises(InputError, match="too long"):
        open_pages([copies], refuse)
    [row] = open_pages([copies], lambda picture: picture)
    assert len(row) == 24


def test_bytes_of_anything_else_are_named_by_their_place(red):
    with pytest.raises(InputError, match=r"page 2 of those given \(3 bytes\): not a readable page image"):
        opened_as_they_are([red, b"abc"])
    with pytest.raises(
        InputError, match="page 1 of those given: expected a path, bytes or a PIL image, found int"
    ):
        opened_as_they_are([3])


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "http://localhost/a.png", "file://host/a.png", "s3://b/a"]
)
def test_nothing_is_fetched(url):
    with pytest.raises(InputError, match="only files of this machine"):
        opened_as_they_are([url])


def test_broken_pdfs_and_pages_that_are_not_there(report, tmp_path):
    with pytest.raises(InputError, match=r"has 3 pages, page 4 was asked for"):
        opened_as_they_are([f"{report}#page=4"])
    with pytest.raises(InputError, match="expected #page=N with N from 1, found #page=0"):
        opened_as_they_are([f"{report}#page=0"])
    (tmp_path / "broken.pdf").write_bytes(report.read_bytes()[:40])
    with pytest.raises(InputError, match=r"broken\.pdf: not a PDF that can be opened"):
        opened_as_they_are([tmp_path / "broken.pdf"])
    with pytest.raises(InputError, match=r"nowhere\.pdf: no such PDF"):
        list(render_pdf(tmp_path / "nowhere.pdf"))


def test_a_picture_that_claims_too_much_is_refused_before_it_is_decoded(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(InputError, match=r"claims 12000 × 12000 pixels"):
        opened_as_they_are([bomb.getvalue()])
