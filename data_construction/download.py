"""Downloads MMDocIR from the Hugging Face hub, and verifies the files.

    python -m data_construction.download dataset=evaluation out=data/mmdocir              # only shows the size
    python -m data_construction.download dataset=evaluation out=data/mmdocir yes=true
    python -m data_construction.download dataset=train out=data/mmdocir_train 'subsets=[DUDE,SlideVQA]' yes=true

Without `yes=true`, the command shows the size and the free disk space, and downloads nothing.

To resume an interrupted download, run the same command again: it skips complete files and resumes partial ones. At
the end, the size of every file is compared with the hub's, and its SHA-256 if the hub has one. The licences are on
the pages of the datasets on the hub: MMDocIR is for research (CC BY-NC 4.0).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of httpx or requests, depending on the hub library's version
from huggingface_hub.hf_api import RepoSibling
from pydantic import BaseModel, ConfigDict, Field

from data_construction.corpus.training_set import Subset, TrainingSet
from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError, file_hash


class Download(BaseModel):
    """`python -m data_construction.download` (configs/download.yaml)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Literal["evaluation", "train"]
    subsets: tuple[Subset, ...] = Field(min_length=1, description="of the training set")
    out: Path = Field(description="folder")
    revision: str = Field(default="main", description="branch, tag or commit of the dataset")
    yes: bool = Field(default=False, description="download; otherwise only show the size")


def files_to_download(config: Download) -> tuple[str, list[str]]:
    """The name of the dataset on the hub, and the paths of the files that the corpus readers use."""
    if config.dataset == "evaluation":
        return "MMDocIR/MMDocIR_Evaluation_Dataset", ["MMDocIR_annotations.jsonl", "MMDocIR_pages.parquet"]
    layout = TrainingSet(folder=Path(), subsets=config.subsets, page_cache=Path())
    paths = [path(subset) for subset in config.subsets for path in (layout.questions_path, layout.pages_path)]
    return "MMDocIR/MMDocIR_Train_Dataset", [path.as_posix() for path in paths]


def main(config: Download) -> None:
    name, paths = files_to_download(config)
    hub = HfApi()
    try:
        info = hub.dataset_info(name, revision=config.revision, files_metadata=True)
        on_hub = {file.rfilename: file for file in info.siblings or []}
        missing = [path for path in paths if path not in on_hub]
        if missing:
            raise InputError(
                f"{name} at {config.revision}: has no {', '.join(missing)}; the dataset has changed on the hub"
            )
        to_download = [path for path in paths if not _is_complete(config.out / path, on_hub[path], quick=True)]
        size = gigabytes(on_hub[path] for path in to_download)
        free = shutil.disk_usage(_nearest_existing(config.out)).free / 1e9
        print(
            f"{name} at {info.sha}: {len(paths)} files, {gigabytes(on_hub[path] for path in paths):.1f} GB; to "
            f"download: {len(to_download)} files, {size:.1f} GB; free at {config.out}: {free:.1f} GB"
        )
        if not config.yes:
            print("nothing was downloaded; to download, add yes=true")
            return
        if size > free:
            raise InputError(
                f"{config.out}: not enough disk space for {size:.1f} GB; choose another out=…, or fewer subsets"
            )
        hub.snapshot_download(
            name, repo_type="dataset", revision=info.sha, local_dir=config.out, allow_patterns=paths
        )
    except (HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: can't be downloaded ({reason}); run the same command again to continue"
        ) from None
    corrupt = [path for path in paths if not _is_complete(config.out / path, on_hub[path])]
    if corrupt:
        raise InputError(
            f"{config.out}: {', '.join(corrupt)} differ from the hub; delete them and run the command again"
        )
    print(f"download: {len(paths)} files, verified, in {config.out}")


def gigabytes(files: Iterable[RepoSibling]) -> float:
    return sum(file.size or 0 for file in files) / 1e9


def _nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _is_complete(path: Path, file: RepoSibling, quick: bool = False) -> bool:
    """Whether a file has the size, and unless `quick` the SHA-256, of the file on the hub."""
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    return quick or file.lfs is None or file_hash(path) == file.lfs.sha256


if __name__ == "__main__":
    run_stage(main, Download, "download")
