"""A local replacement for the Hugging Face hub, for tests and machines without a network.

    python scripts/hub_server.py 18080      # then set HF_ENDPOINT=http://127.0.0.1:18080

It implements only the parts of the hub's HTTP API that a download uses. Its files have the names of MMDocIR's
files, but contain only a few bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves datasets: name → file → content. `sent` lists the files that were downloaded."""

    def __init__(self, datasets: Mapping[str, Mapping[str, bytes]], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Request)
        self.datasets = {name: dict(files) for name, files in datasets.items()}
        self.false_hashes: dict[str, str] = {}  # file → a SHA-256 to report instead of the correct one
        self.sent: list[str] = []

    def sha256(self, dataset: str, file: str) -> str:
        return self.false_hashes.get(file) or hashlib.sha256(self.datasets[dataset][file]).hexdigest()


class _Request(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, body: bool) -> None:
        json_type = {"Content-Type": "application/json"}
        for dataset, files in self.server.datasets.items():
            file = self.path.partition(f"/datasets/{dataset}/resolve/{COMMIT}/")[2]
            if self.path.startswith(f"/api/datasets/{dataset}/revision/"):
                return self.send(json.dumps(self.info(dataset)).encode(), body, json_type)
            if self.path.startswith(f"/api/datasets/{dataset}/tree/{COMMIT}"):
                return self.send(json.dumps(self.tree(dataset)).encode(), body, json_type)
            if file in files:
                if body:
                    self.server.sent.append(file)
                tag = f'"{self.server.sha256(dataset, file)}"'
                return self.send(files[file], body, {"ETag": tag, "X-Repo-Commit": COMMIT})
        return self.send_error(404)

    def send(self, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def tree(self, dataset: str) -> list[dict[str, Any]]:
        files = self.server.datasets[dataset].items()
        return [{"type": "file", "oid": "1", "path": name, "size": len(data)} for name, data in files]

    def info(self, dataset: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.server.datasets[dataset].items():
            lfs = {"sha256": self.server.sha256(dataset, name), "size": len(data), "pointerSize": 130}
            siblings.append({"rfilename": name, "size": len(data), "blobId": "1", "lfs": lfs})
        return {"_id": "1", "id": dataset, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}


def main() -> None:
    from data_construction.download import Download, files_to_download
    from mmr5_train.common.config import compose_stage

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    datasets = [
        files_to_download(compose_stage(Download, "download", [f"dataset={dataset}", "out=."]))
        for dataset in ("evaluation", "train")
    ]
    server = Hub({name: {path: Path(path).name.encode() for path in paths} for name, paths in datasets}, args.port)
    print(f"hub server at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
