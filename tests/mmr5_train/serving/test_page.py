"""The web page: its content security policy, and ranking pages with it in a browser."""

import re

import pytest
from browser import CHROMIUM, open_browser
from html_reader import Reader
from malformed_requests import encode_image
from rerank_server import blank_pdf, run_server

from mmr5_train.serving.page import shown_name

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
INJECTION = "<img src=x onerror=document.title='hacked'>"


def test_page_loads_no_other_resources(server):
    response = server.client.get("/")
    page = Reader(response.text)
    assert "Which page answers your question?" in page.text
    assert set(page.values("src")) <= {"", None}
    assert [link for link in page.values("href") if not link.startswith(("#", "data:"))] == []
    policy = response.headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "img-src data:", "connect-src 'self'", "frame-ancestors 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", response.text)


def test_model_name_is_escaped():
    with run_server(name="<script>alert(1)</script>") as named:
        assert "<script>alert" not in named.client.get("/").text


def test_folders_above_a_model_are_not_shown():
    assert shown_name("/home/ada/runs/demo/grpo") == "demo/grpo"
    assert shown_name("i2vec/MM-R5") == "i2vec/MM-R5"
    with run_server(name="/home/ada/runs/demo/grpo") as named:
        assert "/home/ada" not in named.client.get("/").text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen")
    contents = {
        "report.pdf": blank_pdf((300, 400), (300, 400)),
        f"{INJECTION}.png": encode_image("PNG", color="red"),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("not a page")
    return [folder / name for name in (*contents, "notes.txt")]


@pytest.fixture
def browser(tmp_path):
    with open_browser(tmp_path) as page:
        yield page


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")


@needs_browser
def test_ranks_a_pdf_and_an_image(browser, files, server):
    browser.open(server.url)
    browser.choose_files("#files", files[:2])
    browser.wait_until("document.querySelectorAll('#pages img').length === 3")
    assert texts(browser, "#count") == ["3 pages"]
    browser.wait_until("document.activeElement.id === 'query'")
    browser.type(f"Which page is red? {INJECTION}")
    browser.press("Enter", 13, "\r")
    browser.wait_until("document.querySelectorAll('#ranked > li').length === 3")
    assert texts(browser, "#ranked h3") == [f"{INJECTION}.png", "report.pdf, page 1", "report.pdf, page 2"]
    assert texts(browser, "#pages .number") == ["page 1", "page 2", f"{INJECTION}.png"]
    assert texts(browser, "#ranked .meter")[0].startswith("score 0.")
    assert texts(browser, "#ranked .rank") == ["1", "2", "3"]
    assert texts(browser, "#ranked .page-reasoning")[0].startswith("<b>page 2</b> is")
    assert texts(browser, "#results-query") == [f"Which page is red? {INJECTION}"]
    assert texts(browser, "#defect-list li") == ["it has no closed reasoning"]
    assert "3 pages in" in texts(browser, "#timing")[0]
    assert texts(browser, "#reasoning")[0].count("<b>page") == 3
    assert browser.run("document.activeElement.id") == "results"
    assert browser.run("document.querySelector('.bar i').getBoundingClientRect().width") > 1
    browser.run("document.querySelector('.result .enlarge').click()")
    assert browser.run("document.getElementById('zoom').open")
    browser.press("Escape", 27)
    browser.wait_until("!document.getElementById('zoom').open")
    assert browser.run("document.title") == "Rank pages · mmr5-train"
    injected = "document.querySelectorAll('#results b, #results img[onerror]').length"
    assert browser.run(injected) == 1  # only the heading of the defects
    assert browser.errors == []


@needs_browser
def test_errors_are_shown(browser, files):
    with run_server(limits={"pages": 2}) as small:
        browser.open(small.url)
        browser.run("document.getElementById('submit').click()")
        assert texts(browser, "#problem") == ["Choose a PDF or images first."]
        browser.choose_files("#files", [files[2]])
        browser.wait_until("document.getElementById('problem').textContent.includes('notes.txt')")
        browser.choose_files("#files", [files[1], files[0]])
        note = "has 2 pages; only the first 1 were"
        browser.wait_until(f"document.getElementById('status').textContent.includes('{note}')")
        browser.type("poison")
        browser.press("Enter", 13, "\r")
        browser.wait_until("document.getElementById('problem').textContent.includes('see the server')")
        browser.run("document.querySelector('.remove').click()")
        assert texts(browser, "#count") == ["1 page"]
        small.ranker.gate.clear()
        browser.run("document.getElementById('submit').click()")
        assert small.ranker.entered.acquire(timeout=10)
        browser.run("document.getElementById('stop').click()")
        browser.wait_until("document.getElementById('problem').textContent === 'Stopped.'")


@needs_browser
def test_a_file_that_cannot_be_added_stops_no_other(browser, files, server, tmp_path):
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7 but nothing else")
    scan = tmp_path / "scan.tif"
    scan.write_bytes(encode_image("TIFF"))
    browser.open(server.url)
    browser.choose_files("#files", [broken, scan, files[2], files[0], files[1]])
    browser.wait_until("document.querySelectorAll('#pages img').length === 3")
    problem = texts(browser, "#problem")[0]
    for name in ("broken.pdf", "scan.tif", "notes.txt"):
        assert f"{name}: " in problem
    assert "browsers can't show TIFF" in problem


@needs_browser
def test_key_can_be_entered_and_is_not_stored(browser, files):
    with run_server(key="sk-right") as locked:
        browser.open(locked.url)
        browser.choose_files("#files", [files[1]])
        browser.wait_until("document.querySelectorAll('#pages img').length === 1")
        browser.type("red?")
        browser.press("Enter", 13, "\r")
        browser.wait_until("document.activeElement.id === 'key'")
        browser.type("sk-right")
        browser.press("Enter", 13, "\r")
        browser.wait_until("document.querySelectorAll('#ranked > li').length === 1")
        assert "sk-right" not in browser.run(
            "document.documentElement.outerHTML + JSON.stringify({...localStorage})"
        )
