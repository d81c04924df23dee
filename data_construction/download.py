"""Downloads MMDocIR from the Hugging Face hub: tells the size first, resumes, and checks what arrived.

    python -m data_construction.download dataset=evaluation out=data/mmdocir              # how large is it?
    python -m data_construction.download dataset=evaluation out=data/mmdocir yes=true
    python -m data_construction.download dataset=train out=data/mmdocir_train 'subsets=[DUDE,SlideVQA]' yes=true

Run it again after an interruption: finished files are kept, and files are continued where they ended. Every file
is then checked against the hub's size and, as far as the hub has one, its SHA-256. Licences are those of the
datasets' pages on the hub: MMDocIR is for research (CC BY-NC 4.0).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of the HTTP library that this version of the hub's uses
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
    yes: bool = Field(default=False, description="download; otherwise only the size is shown")


def wanted_files(config: Download) -> tuple[str, list[str]]:
    """The dataset's name on the hub, and the paths of its files that the readers need."""
    if config.dataset == "evaluation":
        return "MMDocIR/MMDocIR_Evaluation_Dataset", ["MMDocIR_annotations.jsonl", "MMDocIR_pages.parquet"]
    layout = TrainingSet(folder=Path(), subsets=config.subsets, page_cache=Path())
    paths = [path(subset) for subset in config.subsets for path in (layout.questions_path, layout.pages_path)]
    return "MMDocIR/MMDocIR_Train_Dataset", [path.as_posix() for path in paths]


def main(config: Download) -> None:
    name, paths = wanted_files(config)
    hub = HfApi()
    try:
        info = hub.dataset_info(name, revision=config.revision, files_metadata=True)
        there = {file.rfilename: file for file in info.siblings or []}
        missing = [path for path in paths if path not in there]
        if missing:
            raise InputError(
                f"{name} at {config.revision}: has no {', '.join(missing)}; it has changed on the hub"
            )
        lacking = [path for path in paths if not _is_whole(config.out / path, there[path], quick=True)]
        size = gigabytes(there[path] for path in lacking)
        free = shutil.disk_usage(_existing(config.out)).free / 1e9
        print(
            f"{name} at {info.sha}: {len(paths)} files, {gigabytes(there[path] for path in paths):.1f} GB; to "
            f"download: {len(lacking)} files, {size:.1f} GB; free at {config.out}: {free:.1f} GB"
        )
        if not config.yes:
            print("nothing is downloaded yet: add yes=true")
            return
        if size > free:
            raise InputError(
                f"{config.out}: {size:.1f} GB don't fit there; choose another out=…, or fewer subsets"
            )
        hub.snapshot_download(
            name, repo_type="dataset", revision=info.sha, local_dir=config.out, allow_patterns=paths
        )
    except (HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: can't be downloaded ({reason}); what has arrived is kept: run it again to continue"
        ) from None
    broken = [path for path in paths if not _is_whole(config.out / path, there[path])]
    if broken:
        raise InputError(f"{config.out}: {', '.join(broken)} differ from the hub's; delete them and run it again")
    print(f"download: {len(paths)} files, checked, in {config.out}")


def gigabytes(files: Iterable[RepoSibling]) -> float:
    return sum(file.size or 0 for file in files) / 1e9


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _is_whole(path: Path, file: RepoSibling, quick: bool = False) -> bool:
    """Whether a file has the size, and unless `quick` the SHA-256, that the hub tells."""
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    return quick or file.lfs is None or file_hash(path) == file.lfs.sha256


if __name__ == "__main__":
    run_stage(main, Download, "download")
