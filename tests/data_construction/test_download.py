"""The download command against a small hub of our own, over HTTP."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from data_construction.download import Download, main
from mmr5_train.config import compose_stage
from mmr5_train.ranking.files import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "MMDocIR/MMDocIR_Evaluation_Dataset"
CONTENT = {"MMDocIR_annotations.jsonl": b'{"doc_name": "a.pdf"}\n', "MMDocIR_pages.parquet": b"PAR1" * 1000}


class Hub(ThreadingHTTPServer):
    """What of the hub's HTTP interface a download uses; `sent` lists the files it gave away."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files = dict(CONTENT) | {"README.md": b"not wanted"}
        self.told: dict[str, str] = {}  # file → SHA-256, where it is not that of the content
        self.sent: list[str] = []


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        if self.path.startswith(f"/api/datasets/{NAME}/revision/"):
            self.send(json.dumps(self.info()).encode(), body, {"Content-Type": "application/json"})
        elif self.path.startswith(f"/api/datasets/{NAME}/tree/{COMMIT}"):
            self.send(json.dumps(self.tree()).encode(), body, {"Content-Type": "application/json"})
        elif name in self.server.files:
            if body:
                self.server.sent.append(name)
            data = self.server.files[name]
            self.send(data, body, {"ETag": f'"{self.sha256(name)}"', "X-Repo-Commit": COMMIT})
        else:
            self.send_error(404)

    def send(self, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def sha256(self, name: str) -> str:
        return self.server.told.get(name) or hashlib.sha256(self.server.files[name]).hexdigest()

    def tree(self) -> list[dict[str, Any]]:
        files = self.server.files.items()
        return [{"type": "file", "oid": "1", "path": name, "size": len(data)} for name, data in files]

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.server.files.items():
            lfs = {"sha256": self.sha256(name), "size": len(data), "pointerSize": 130}
            siblings.append({"rfilename": name, "size": len(data), "blobId": "1", "lfs": lfs})
        return {"_id": "1", "id": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def config(out: Path, *more: str) -> Download:
    return compose_stage(Download, "download", ["dataset=evaluation", f"out={out}", *more])


def test_the_size_comes_first(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path / "new/data"))
    said = capsys.readouterr().out
    assert f"{NAME} at {COMMIT}: 2 files" in said
    assert "to download: 2 files" in said
    assert "add yes=true" in said
    assert not (tmp_path / "new").exists()
    assert not hub.sent


def test_wanted_files_arrive_and_are_not_fetched_twice(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(tmp_path, "yes=true"))
    assert {name: (tmp_path / name).read_bytes() for name in CONTENT} == CONTENT
    assert sorted(hub.sent) == sorted(CONTENT)
    (tmp_path / "MMDocIR_pages.parquet").unlink()
    main(config(tmp_path, "yes=true"))
    assert sorted(hub.sent) == sorted([*CONTENT, "MMDocIR_pages.parquet"])
    assert "to download: 1 files" in capsys.readouterr().out


def test_a_file_that_arrived_broken_is_named(tmp_path: Path, hub: Hub) -> None:
    hub.told["MMDocIR_pages.parquet"] = "0" * 64
    with pytest.raises(InputError, match=r"MMDocIR_pages.parquet differ from the hub's; delete"):
        main(config(tmp_path, "yes=true"))


def test_what_the_hub_lacks_is_named(tmp_path: Path, hub: Hub) -> None:
    del hub.files["MMDocIR_pages.parquet"]
    with pytest.raises(InputError, match=r"at main: has no MMDocIR_pages.parquet"):
        main(config(tmp_path, "yes=true"))
    with pytest.raises(InputError, match=r"MMDocIR/MMDocIR_Train_Dataset: can't be downloaded \(.*404"):
        main(config(tmp_path, "dataset=train", "subsets=[DUDE]"))


def test_without_a_network(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(InputError, match=r"can't be downloaded \(.*run it again"):
        main(config(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"can't be downloaded \(.*offline.*run it again"):
        main(config(tmp_path))
