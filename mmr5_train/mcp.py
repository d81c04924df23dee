"""Lets assistants find pages in a person's PDFs: a Model Context Protocol server.

    python -m mmr5_train.mcp checkpoint=outputs/grpo/model folder=Documents
    python -m mmr5_train.mcp checkpoint=outputs/grpo/model folder=Documents transport=http port=8765

With transport=stdio, the assistant starts this command and talks to it over stdin and stdout; with http, the
server is at http://127.0.0.1:8765/mcp. The tools are `rank_pages` and `find_page`. They read files in `folder`:
PDFs and images. Nothing is written or fetched. docs/serving.md has the configuration of an assistant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pypdfium2
from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.results import RankedResults, Result

ENDINGS = (".pdf", ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
INSTRUCTIONS = (
    "Finds the pages of PDFs and scans that answer a question, by looking at the page images. Paths are relative "
    "to the server's folder. 'report.pdf' stands for all of its pages, 'report.pdf#page=3' for its third page."
)


class McpConfig(BaseModel):
    """Settings of `python -m mmr5_train.mcp` (configs/mcp.yaml)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(description="a model folder written by sft or grpo, or a Hugging Face hub id")
    folder: Path = Field(description="the only folder whose files the tools read")
    prompt: Prompt | None = Field(default=None, description="for a checkpoint that does not store its own prompt")
    override_checkpoint: bool = Field(default=False, description="use this prompt and mode in any case")
    mode: Literal["reason", "direct", "logits", "adaptive"] | None = Field(
        default=None, description="null: the mode the checkpoint was trained for"
    )
    pages: int = Field(default=50, ge=1, description="largest number of pages in one call")
    transport: Literal["stdio", "http"] = "stdio"
    host: str = "127.0.0.1"
    port: int = Field(default=8765, ge=0, le=65535)


class Ranker(Protocol):
    """What the tools need of a `Reranker`."""

    def rank(self, query: str, pages: Sequence[str], top_k: int | None = None) -> RankedResults: ...


def main(config: McpConfig) -> None:
    server = make_server(config, lambda: load_reranker(config))
    if config.transport == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host=config.host, port=config.port)


def load_reranker(config: McpConfig) -> Ranker:
    from mmr5_train.inference.reranker import Reranker  # a slow import; the assistant sees the tools before

    mode: dict[str, Any] = {"mode": config.mode} if config.mode else {}
    return Reranker(
        config.checkpoint,
        prompt=config.prompt,
        override_checkpoint=config.override_checkpoint,
        **mode,
    )


def make_server(config: McpConfig, load: Callable[[], Ranker]) -> Any:
    """The server with its two tools. `load` is called at the first use of a tool."""
    try:
        from mcp.server.mcpserver import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
    except ImportError:
        raise InputError("mcp needs the MCP SDK: in the checkout, pip install '.[mcp]'") from None
    folder = config.folder.resolve()
    if not folder.is_dir():
        raise InputError(f"folder: {config.folder} is not a folder; create it, or give another one")
    server = MCPServer("mmr5", instructions=INSTRUCTIONS)
    model = SharedRanker(load)

    def rank(query: str, files: Sequence[str], top_k: int) -> list[dict[str, Any]]:
        try:
            paths = allowed_pages(folder, files, config.pages)
            ranked = model.rank(query, paths, top_k)
        except InputError as error:
            raise ToolError(str(error).replace(f"{folder}/", "")) from None
        return [shown(result, folder) for result in ranked]

    @server.tool()
    def rank_pages(query: str, files: list[str], top_k: int = 5) -> list[dict[str, Any]]:
        """Ranks the pages of PDFs and page images by how well they answer the question, best first.

        files: paths in the server's folder, such as "report.pdf", "report.pdf#page=3" or "scan.png".
        """
        return rank(query, files, top_k)

    @server.tool()
    def find_page(query: str, pdf: str) -> dict[str, Any]:
        """The page of a PDF that best answers the question, with its number, counted from 1."""
        return rank(query, [pdf], 1)[0]

    return server


class SharedRanker:
    """One model for all calls, which use it one after another."""

    def __init__(self, load: Callable[[], Ranker]) -> None:
        self._load, self._lock = load, threading.Lock()
        self._ranker: Ranker | None = None

    def rank(self, query: str, pages: Sequence[str], top_k: int) -> RankedResults:
        with self._lock:
            if self._ranker is None:
                self._ranker = self._load()
            return self._ranker.rank(query, pages, top_k)


def allowed_pages(folder: Path, files: Sequence[str], limit: int) -> list[str]:
    """The absolute locations of the files, with their "#page=". Links and ".." are resolved first.

    Raises `InputError` for a file that is not in `folder`, or no PDF or image, and for more than `limit` pages.
    """
    if not files:
        raise InputError("files: expected at least one file, found none")
    locations, pages = [], 0
    for name in files:
        path_name, mark, fragment = name.partition("#")
        path = (folder / path_name).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise InputError(f"{name[:200]}: no such file in the folder")
        if path.suffix.lower() not in ENDINGS:
            raise InputError(f"{name[:200]}: expected a PDF or an image ({', '.join(ENDINGS)})")
        pages += 1 if mark else page_count(path)
        if pages > limit:
            raise InputError(
                f"{name[:200]}: with it there are {pages} pages or more; expected at most {limit}: name single "
                "pages, such as report.pdf#page=3"
            )
        locations.append(f"{path}#{fragment}" if mark else str(path))
    return locations


def page_count(path: Path) -> int:
    """Pages of a PDF from its page tree; 1 for another file, and for a PDF that ranking refuses with a reason."""
    if path.suffix.lower() != ".pdf":
        return 1
    try:
        pdf = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError:
        return 1
    try:
        return len(pdf)
    finally:
        pdf.close()


def shown(result: Result, folder: Path) -> dict[str, Any]:
    """A result as the tools return it, with a path relative to the folder."""
    path, _, fragment = str(result.page).partition("#page=")
    entry = {"rank": result.rank, "file": str(Path(path).relative_to(folder)), "score": round(result.score, 4)}
    return {**entry, **({"page": int(fragment)} if fragment else {}), "note": result.note}


if __name__ == "__main__":
    run_stage(main, McpConfig, "mcp")
