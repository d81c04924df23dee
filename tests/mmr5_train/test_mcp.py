"""The MCP server with the official SDK's client: in process, and as an assistant starts it."""

import asyncio
import json
import sys

import pypdfium2
import pytest
from mcp import Client, StdioServerParameters
from PIL import Image

from mmr5_train.common.config import validate
from mmr5_train.common.files import InputError
from mmr5_train.mcp import McpConfig, allowed_pages, make_server
from mmr5_train.models.pages import PageLimits, open_pages
from mmr5_train.ranking.results import Document, build_results


class Reddest:
    """Ranks pages by how red they are."""

    def rank(self, query, pages, top_k=None):
        [opened] = open_pages([pages], PageLimits(28, 784, 9_500))
        redness = [page.image.getpixel((5, 5))[0] - page.image.getpixel((5, 5))[1] for page in opened]
        order = sorted(range(len(opened)), key=lambda i: -redness[i])
        return build_results(
            query, [Document(page.document) for page in opened], order, notes={order[0]: "red"}, top_k=top_k
        )


@pytest.fixture
def folder(tmp_path):
    """A folder with two images, a PDF of three pages, and files that must not be read."""
    folder = tmp_path / "documents"
    (folder / "sub").mkdir(parents=True)
    for name, color in (("a.png", "green"), ("sub/b.png", "red")):
        Image.new("RGB", (60, 80), color).save(folder / name)
    document = pypdfium2.PdfDocument.new()
    for _ in range(3):
        document.new_page(60, 80)
    document.save(folder / "report.pdf")
    (folder / "notes.txt").write_text("text")
    Image.new("RGB", (60, 80), "red").save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "broken.pdf").write_text("no PDF")
    return folder


def config(folder, **fields):
    return validate(McpConfig, {"checkpoint": "tiny", "folder": folder, **fields})


def call(server, tool, **arguments):
    async def run():
        async with Client(server) as client:
            return await client.call_tool(tool, arguments)

    return asyncio.run(run())


def content_of(result):
    assert not result.is_error, result.content
    value = result.structured_content
    return value.get("result", value)


def test_pages_are_ranked(folder):
    server = make_server(config(folder), Reddest)
    result = content_of(
        call(server, "rank_pages", query="red?", files=["a.png", "sub/b.png", "report.pdf#page=2"])
    )
    assert [entry["file"] for entry in result][:1] == ["sub/b.png"]
    assert result[0] == {"rank": 1, "file": "sub/b.png", "score": 1.0, "note": "red"}
    assert {"page": 2, "file": "report.pdf"}.items() <= result[1].items() or {"page": 2}.items() <= result[
        2
    ].items()
    assert len(content_of(call(server, "rank_pages", query="red?", files=["report.pdf"], top_k=2))) == 2
    found = content_of(call(server, "find_page", query="red?", pdf="report.pdf"))
    assert (found["file"], found["page"], found["rank"]) == ("report.pdf", 1, 1)


def test_the_tools_describe_themselves(folder):
    async def run():
        async with Client(make_server(config(folder), Reddest)) as client:
            return (await client.list_tools()).tools

    tools = {tool.name: tool for tool in asyncio.run(run())}
    assert set(tools) == {"rank_pages", "find_page"}
    assert set(tools["rank_pages"].input_schema["properties"]) == {"query", "files", "top_k"}
    assert "best first" in tools["rank_pages"].description


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "files: expected at least one file"),
        (["../secret.png"], "../secret.png: no such file in the folder"),
        (["link.png"], "link.png: no such file in the folder"),
        (["/etc/passwd"], "/etc/passwd: no such file in the folder"),
        (["absent.pdf"], "absent.pdf: no such file in the folder"),
        (["sub"], "sub: no such file in the folder"),
        (["notes.txt"], "notes.txt: expected a PDF or an image"),
        (["a.png", "report.pdf"], "report.pdf: with it there are 4 pages or more; expected at most 3"),
        (["broken.pdf"], "broken.pdf: not a PDF that can be opened"),
        (["report.pdf#page=9"], "report.pdf: has 3 pages; expected a page number up to 3, found 9"),
    ],
)
def test_what_may_not_be_read_is_refused(folder, files, message):
    result = call(make_server(config(folder, pages=3), Reddest), "rank_pages", query="red?", files=files)
    assert result.is_error
    text = result.content[0].text
    assert message in text
    assert str(folder.parent) not in text


def test_locations_are_absolute_and_keep_their_page(folder):
    assert allowed_pages(folder, ["sub/../a.png", "report.pdf#page=2"], 5) == [
        f"{folder}/a.png",
        f"{folder}/report.pdf#page=2",
    ]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"folder: .* is not a folder"):
        make_server(config(tmp_path / "absent"), Reddest)


def test_an_assistant_starts_the_server_and_finds_a_page(folder):
    """The complete command over stdio, with the tiny model."""
    command = ["-m", "mmr5_train.mcp", "checkpoint=tiny", "mode=logits", f"folder={folder}"]
    server = StdioServerParameters(command=sys.executable, args=command)

    async def run():
        async with Client(server) as client:
            return await client.call_tool(
                "rank_pages", {"query": "Which is red?", "files": ["a.png", "report.pdf"]}
            )

    result = asyncio.run(run())
    assert not result.is_error, result.content
    entries = json.loads(result.content[0].text) if result.structured_content is None else content_of(result)
    assert sorted((entry["file"], entry.get("page")) for entry in entries) == [
        ("a.png", None), ("report.pdf", 1), ("report.pdf", 2), ("report.pdf", 3),
    ]  # fmt: skip
