"""POST /pages: rendering PDFs, and errors for PDFs that can't be rendered."""

import base64
import io
import json
import os
import sys
import time

import pytest
from PIL import Image
from rerank_server import blank_pdf, run_server

from mmr5_train.common.environment import ALLOWED
from mmr5_train.serving import pdf

REAL_PYTHON = sys.executable


def post(server, data, **headers):
    return server.client.post("/pages", content=data, headers={"Content-Type": "application/pdf", **headers})


def test_rendered_pages_can_be_ranked(server):
    response = post(server, blank_pdf((595, 842), (842, 595), (20_000, 10_000))).json()
    assert response["n_pages"] == 3
    assert [page["number"] for page in response["pages"]] == [1, 2, 3]
    assert [(page["width"], page["height"]) for page in response["pages"]] == [
        (1240, 1755),
        (1755, 1240),
        (5793, 2897),  # the largest page: 16.8 million pixels
    ]
    for page in response["pages"]:
        picture = Image.open(io.BytesIO(base64.b64decode(page["image"].partition(",")[2])))
        assert (picture.format, picture.size) == ("JPEG", (page["width"], page["height"]))
    assert server.rerank("red?", [page["image"] for page in response["pages"]]).status_code == 200


def test_only_the_first_pages_of_a_long_pdf_are_rendered():
    with run_server(limits={"pages": 2, "pdf_mb": 0.01}) as small:
        response = post(small, blank_pdf(*[(595, 842)] * 5)).json()
        assert (response["n_pages"], len(response["pages"])) == (5, 2)
        rejected = post(small, blank_pdf((595, 842)) + b" " * 10_001)
        assert rejected.status_code == 413
        assert "0.01 MB" in rejected.json()["error"]["message"]


def encrypted():
    """A minimal PDF that requires a password. Its encryption key is invalid, so no password opens it."""
    body = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
    locked = b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"00" * 32 + b">/U<" + b"11" * 32 + b">>>"
    trailer = b"trailer<</Size 4/Root 1 0 R/ID[<00><00>]/Encrypt 3 0 R>>\n"
    return body + b"3 0 obj" + locked + b"endobj\n" + trailer + b"%%EOF"


@pytest.mark.parametrize(
    ("data", "code", "message_part"),
    [
        (b"", "pdf_unreadable", "is not a PDF"),
        (b"\x89PNG\r\n", "pdf_unreadable", "is not a PDF"),
        (b"%PDF-1.7 and nothing else", "pdf_unreadable", "can't be opened"),
        (encrypted(), "pdf_encrypted", "password"),
        (blank_pdf(), "pdf_unreadable", "can't be opened"),
        (blank_pdf((10, 5000)), "pdf_unreadable", "page 1 has an unsupported size (10 × 5000 points)"),
    ],
    ids=["empty body", "image", "only header", "encrypted", "no pages", "narrow page"],
)
def test_unreadable_pdf_is_rejected(server, data, code, message_part):
    rejected = post(server, data)
    assert rejected.status_code == 422
    error = rejected.json()["error"]
    assert error["code"] == code
    assert message_part in error["message"]


def test_other_content_types_are_rejected(server):
    for kind in ("text/plain", "multipart/form-data; boundary=x"):
        assert post(server, blank_pdf((9, 9)), **{"Content-Type": kind}).status_code == 415


def test_renderer_gets_no_secret(monkeypatch, tmp_path):
    """A fake renderer process shows its environment."""
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "MMR5_API_KEY", "NEW_PASS")
    fake_renderer = tmp_path / "renderer"
    seen = tmp_path / "environment"
    code = f"import json, os; open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))"
    fake_renderer.write_text(f"#!{REAL_PYTHON}\n{code}")
    fake_renderer.chmod(0o755)
    with run_server() as small:
        for name in secrets:
            monkeypatch.setenv(name, "hf_secret")
        monkeypatch.setattr(pdf.sys, "executable", str(fake_renderer))
        post(small, blank_pdf((100, 100)))
    environment = json.loads(seen.read_text())
    assert "PATH" in environment
    assert "hf_secret" not in environment.values()
    assert environment.keys() <= ALLOWED


def test_renderer_that_crashes_or_hangs_does_not_affect_the_server(monkeypatch, tmp_path):
    """A fake renderer process crashes or hangs, as pdfium may on a malicious PDF."""
    fake_renderer = tmp_path / "renderer"
    monkeypatch.setattr(pdf.sys, "executable", str(fake_renderer))

    def write_renderer(body):
        fake_renderer.write_text(f"#!{REAL_PYTHON}\n{body}")
        fake_renderer.chmod(0o755)

    with run_server(limits={"seconds": 1.5}) as small:
        write_renderer("import ctypes; ctypes.string_at(0)")
        crashed = post(small, blank_pdf((100, 100)))
        assert (crashed.status_code, crashed.json()["error"]["code"]) == (422, "pdf_unreadable")
        pid = tmp_path / "pid"
        write_renderer(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
        start = time.monotonic()
        assert post(small, blank_pdf((100, 100))).status_code == 504
        assert time.monotonic() - start < 10
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
        assert small.client.get("/health").json()["requests"] == 0
