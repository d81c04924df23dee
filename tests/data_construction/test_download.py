"""The download command against a small local hub server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, Hub

from data_construction.download import Download, main
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError

NAME = "MMDocIR/MMDocIR_Evaluation_Dataset"
CONTENT = {"MMDocIR_annotations.jsonl": b'{"doc_name": "a.pdf"}\n', "MMDocIR_pages.parquet": b"PAR1" * 1000}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub({NAME: CONTENT | {"README.md": b"not needed"}})
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


def test_shows_only_the_size_without_yes(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path / "new/data"))
    output = capsys.readouterr().out
    assert f"{NAME} at {COMMIT}: 2 files" in output
    assert "to download: 2 files" in output
    assert "add yes=true" in output
    assert not (tmp_path / "new").exists()
    assert not hub.sent


def test_downloads_only_missing_files(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path, "yes=true"))
    assert {name: (tmp_path / name).read_bytes() for name in CONTENT} == CONTENT
    assert sorted(hub.sent) == sorted(CONTENT)
    (tmp_path / "MMDocIR_pages.parquet").unlink()
    main(config(tmp_path, "yes=true"))
    assert sorted(hub.sent) == sorted([*CONTENT, "MMDocIR_pages.parquet"])
    assert "to download: 1 files" in capsys.readouterr().out


def test_corrupt_download_raises(tmp_path: Path, hub: Hub) -> None:
    hub.false_hashes["MMDocIR_pages.parquet"] = "0" * 64
    with pytest.raises(InputError, match=r"MMDocIR_pages.parquet differ from the hub; delete"):
        main(config(tmp_path, "yes=true"))


def test_file_missing_on_the_hub_raises(tmp_path: Path, hub: Hub) -> None:
    del hub.datasets[NAME]["MMDocIR_pages.parquet"]
    with pytest.raises(InputError, match=r"at main: has no MMDocIR_pages.parquet"):
        main(config(tmp_path, "yes=true"))
    with pytest.raises(InputError, match=r"MMDocIR/MMDocIR_Train_Dataset: can't be downloaded \(.*404"):
        main(config(tmp_path, "dataset=train", "subsets=[DUDE]"))


def test_no_network_raises(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(InputError, match=r"can't be downloaded \(.*run the same command again"):
        main(config(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"can't be downloaded \(.*offline.*run the same command again"):
        main(config(tmp_path))
