"""The web page: what it may load, and a browser that ranks pages with it."""

import re

import bench_serve
import pytest
from browser import CHROMIUM, browsing
from html_reader import Reader
from rerank_server import made_pdf, serving

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
NASTY = "<img src=x onerror=document.title='hacked'>"


def test_the_page_loads_nothing_but_itself(served):
    response = served.client.get("/")
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


def test_a_model_name_is_text():
    with serving(name="<script>alert(1)</script>") as named:
        assert "<script>alert" not in named.client.get("/").text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen")
    made = {
        "report.pdf": made_pdf((300, 400), (300, 400)),
        f"{NASTY}.png": bench_serve.encoded("PNG", color="red"),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("no page")
    return [folder / name for name in (*made, "notes.txt")]


@pytest.fixture
def browser(tmp_path):
    with browsing(tmp_path) as made:
        yield made


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)")


@needs_browser
def test_a_reader_ranks_a_pdf_and_a_picture(browser, files, served):
    browser.open(served.url)
    browser.choose_files("#files", files[:2])
    browser.until("document.querySelectorAll('#pages img').length === 3")
    assert texts(browser, "#count") == ["3 pages"]
    browser.until("document.activeElement.id === 'query'")
    browser.type(f"Which page is red? {NASTY}")
    browser.press("Enter", 13, "\r")
    browser.until("document.querySelectorAll('#ranked > li').length === 3")
    assert texts(browser, "#ranked h3") == [f"{NASTY}.png", "report.pdf, page 1", "report.pdf, page 2"]
    assert texts(browser, "#pages .number") == ["page 1", "page 2", f"{NASTY}.png"]
    assert texts(browser, "#ranked .meter")[0].startswith("score 0.")
    assert texts(browser, "#ranked .rank") == ["1", "2", "3"]
    assert texts(browser, "#ranked .says")[0].startswith("<b>page 2</b> is")
    assert texts(browser, "#asked") == [f"Which page is red? {NASTY}"]
    assert texts(browser, "#defects li") == ["no think"]
    assert "3 pages in" in texts(browser, "#timing")[0]
    assert texts(browser, "#reasoning")[0].count("<b>page") == 3
    assert browser.run("document.activeElement.id") == "results"
    assert browser.run("document.querySelector('.bar i').getBoundingClientRect().width") > 1
    browser.run("document.querySelector('.look').click()")
    assert browser.run("document.getElementById('zoom').open")
    browser.press("Escape", 27)
    browser.until("!document.getElementById('zoom').open")
    assert browser.run("document.title") == "Rank pages · mmr5-train"
    assert browser.run("document.querySelectorAll('#results b, #results img[onerror]').length") == 1  # "had flaws"
    assert browser.complaints == []


@needs_browser
def test_what_goes_wrong_is_said_on_the_page(browser, files):
    with serving(limits={"pages": 2}) as small:
        browser.open(small.url)
        browser.run("document.getElementById('go').click()")
        assert texts(browser, "#problem") == ["Choose a PDF or pictures first."]
        browser.choose_files("#files", [files[2]])
        browser.until("document.getElementById('problem').textContent.includes('notes.txt')")
        browser.choose_files("#files", [files[1], files[0]])
        browser.until("document.getElementById('status').textContent.includes('has 2 pages; the first 1 were')")
        browser.type("poison")
        browser.press("Enter", 13, "\r")
        browser.until("document.getElementById('problem').textContent.includes('its log says why')")
        browser.run("document.querySelector('.away').click()")
        assert texts(browser, "#count") == ["1 page"]
        small.ranker.gate.clear()
        browser.run("document.getElementById('go').click()")
        assert small.ranker.entered.acquire(timeout=10)
        browser.run("document.getElementById('stop').click()")
        browser.until("document.getElementById('problem').textContent === 'Stopped.'")


@needs_browser
def test_a_key_can_be_given_on_the_page(browser, files):
    with serving(key="sk-right") as locked:
        browser.open(locked.url)
        browser.choose_files("#files", [files[1]])
        browser.until("document.querySelectorAll('#pages img').length === 1")
        browser.type("red?")
        browser.press("Enter", 13, "\r")
        browser.until("document.activeElement.id === 'key'")
        browser.type("sk-right")
        browser.press("Enter", 13, "\r")
        browser.until("document.querySelectorAll('#ranked > li').length === 1")
        assert "sk-right" not in browser.run(
            "document.documentElement.outerHTML + JSON.stringify({...localStorage})"
        )
