"""POST /pages: a PDF's pages as pictures, and the PDFs that can't be shown."""

import base64
import io
import os
import sys
import time

import pytest
from PIL import Image
from rerank_server import made_pdf, serving

from mmr5_train.serving import pdf

REAL_PYTHON = sys.executable


def post(served, data, **headers):
    return served.client.post("/pages", content=data, headers={"Content-Type": "application/pdf", **headers})


def test_pages_come_as_pictures_that_can_be_ranked(served):
    answered = post(served, made_pdf((595, 842), (842, 595), (20_000, 10_000))).json()
    assert answered["n_pages"] == 3
    assert [page["number"] for page in answered["pages"]] == [1, 2, 3]
    assert [(page["width"], page["height"]) for page in answered["pages"]] == [
        (724, 1024),
        (1024, 724),
        (1024, 512),
    ]
    for page in answered["pages"]:
        picture = Image.open(io.BytesIO(base64.b64decode(page["image"].partition(",")[2])))
        assert (picture.format, picture.size) == ("JPEG", (page["width"], page["height"]))
    assert served.ask("red?", [page["image"] for page in answered["pages"]]).status_code == 200


def test_of_a_long_pdf_the_first_pages_are_taken():
    with serving(limits={"pages": 2, "pdf_mb": 0.01}) as small:
        answered = post(small, made_pdf(*[(595, 842)] * 5)).json()
        assert (answered["n_pages"], len(answered["pages"])) == (5, 2)
        refused = post(small, made_pdf((595, 842)) + b" " * 10_001)
        assert refused.status_code == 413
        assert "0.01 MB" in refused.json()["error"]["message"]


def encrypted():
    """The smallest PDF that asks for a password: its key can't be right."""
    body = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
    locked = b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"00" * 32 + b">/U<" + b"11" * 32 + b">>>"
    trailer = b"trailer<</Size 4/Root 1 0 R/ID[<00><00>]/Encrypt 3 0 R>>\n"
    return body + b"3 0 obj" + locked + b"endobj\n" + trailer + b"%%EOF"


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", "pdf_unreadable", "no PDF"),
        (b"\x89PNG\r\n", "pdf_unreadable", "no PDF"),
        (b"%PDF-1.7 and nothing else", "pdf_unreadable", "can be opened"),
        (encrypted(), "pdf_encrypted", "password"),
        (made_pdf(), "pdf_unreadable", "can be opened"),
        (made_pdf((10, 5000)), "pdf_unreadable", "page 1 is 10 × 5000 points"),
    ],
    ids=["nothing", "picture", "head", "locked", "empty", "thread"],
)
def test_a_pdf_that_cannot_be_shown(served, data, code, says):
    refused = post(served, data)
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["code"] == code
    assert says in error["message"]


def test_only_a_pdf_is_taken(served):
    for kind in ("text/plain", "multipart/form-data; boundary=x"):
        assert post(served, made_pdf((9, 9)), **{"Content-Type": kind}).status_code == 415


def test_a_renderer_that_crashes_or_never_ends_harms_nobody(monkeypatch, tmp_path):
    """pdfium stood in for by a process that does as a bad PDF may make it do."""
    stand_in = tmp_path / "renderer"
    monkeypatch.setattr(pdf.sys, "executable", str(stand_in))

    def renderer(body):
        stand_in.write_text(f"#!{REAL_PYTHON}\n{body}")
        stand_in.chmod(0o755)

    with serving(limits={"seconds": 1.5}) as small:
        renderer("import ctypes; ctypes.string_at(0)")
        crashed = post(small, made_pdf((100, 100)))
        assert (crashed.status_code, crashed.json()["error"]["code"]) == (422, "pdf_unreadable")
        pid = tmp_path / "pid"
        renderer(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
        start = time.monotonic()
        assert post(small, made_pdf((100, 100))).status_code == 504
        assert time.monotonic() - start < 10
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
        assert small.client.get("/health").json()["requests"] == 0
