"""Reading and writing files: atomic writes, records with errors that name the line, output folders, manifests."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

MANIFEST = "manifest.json"
RECIPE = "recipe.json"  # written by a recipe: the output folder and duration of each stage
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bm25s", "pypdfium2", "pillow")

RecordT = TypeVar("RecordT", bound=BaseModel)


class InputError(Exception):
    """An error in the user's input. The message names the file, line or field, the problem, and what to do."""


def validation_message(error: ValidationError) -> str:
    """All problems of a pydantic error on one line, each with its field."""
    problems = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "record"
        problems.append(f"field {field}: {problem['msg']}")
    return "; ".join(problems)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each line of a JSON Lines file. Blank lines are skipped.

    Raises:
        InputError: for a missing or unreadable file, and for a line that is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
                    raise InputError(
                        f"{path}, line {number}: not valid JSON ({problem}); "
                        "the file may be cut off: write it again or remove the line"
                    ) from None
                except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
                    raise InputError(f"{path}, line {number}: not readable as JSON ({error})") from None
                if not isinstance(value, dict):
                    raise InputError(
                        f"{path}, line {number}: expected a JSON object, found {type(value).__name__}"
                    )
                yield number, value
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the stage that writes it first") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None


def read_records(path: Path, kind: type[RecordT], unique: str | None = "query_id") -> list[RecordT]:
    """All records of a JSON Lines file.

    Args:
        path: the file.
        kind: the class of the records.
        unique: a field whose values must be distinct, or None.

    Raises:
        InputError: for an invalid record (with its line and field), for a repeated value of `unique`, and for a
            file without records.
    """
    records: list[RecordT] = []
    seen: dict[Any, int] = {}
    for number, value in read_json_lines(path):
        try:
            record = kind.model_validate(value)
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {validation_message(error)}") from None
        if unique is not None:
            key = getattr(record, unique)
            if key in seen:
                raise InputError(f"{path}, line {number}: {unique} {key!r} is already in line {seen[key]}")
            seen[key] = number
        records.append(record)
    if not records:
        raise InputError(f"{path}: contains no {kind.__name__} record; run the stage that writes it again")
    return records


@contextmanager
def atomic_write(path: Path, mode: str = "w", sync: bool = True) -> Iterator[IO[Any]]:
    """Opens a file for writing that gets its name only when the block ends without an error.

    Args:
        path: the file to write.
        mode: "w" for UTF-8 text, "wb" for bytes.
        sync: whether to wait until the data is on disk. Without it, the file can be lost or cut off if the machine
            stops within seconds. Caches of many small files do not wait, because that would take most of the time.

    Raises:
        InputError: if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: the disk is full; free some space or write to another disk") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill. It gets the name `path` only when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_records(path: Path, records: Iterable[BaseModel]) -> int:
    """Writes one record per line, atomically. Returns the number of records."""
    count = 0
    with atomic_write(path) as stream:
        for record in records:
            stream.write(record.model_dump_json() + "\n")
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically. Keys keep their order."""
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, sort_keys=False)
        stream.write("\n")


def file_hash(path: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_output(
    path: Path, overwrite: bool = False, inputs: Iterable[Path] = (), stage: str | None = None
) -> Path:
    """Creates the output folder of a stage, or empties it, and writes an unfinished manifest to it.

    A folder that is not empty is emptied only if `overwrite` is set, the folder has a manifest of this project,
    and none of `inputs` is inside it.

    Args:
        path: the output folder.
        overwrite: whether a folder that is not empty may be emptied.
        inputs: files that the stage reads.
        stage: name of a stage that resumes interrupted runs. Its unfinished folder is emptied without `overwrite`.

    Raises:
        InputError: if the folder can't be created, written or emptied, or may not be emptied.
    """
    unfinished = {"finished": False} if stage is None else {"finished": False, "stage": stage}
    try:
        if path.exists() and any(not _is_partial_manifest(child) for child in path.iterdir()):
            if not overwrite and (stage is None or not is_unfinished(path, stage)):
                raise InputError(f"{path}: is not empty; choose another folder with out=…, or set overwrite=true")
            if not _has_project_manifest(path):
                raise InputError(
                    f"{path}: contains files but no {MANIFEST} of this project, so no stage wrote it and it is "
                    "not emptied; choose another folder with out=…"
                )
            for source in inputs:
                if source.resolve().is_relative_to(path.resolve()):
                    raise InputError(f"{path}: contains {source}, which this stage reads; choose another out=…")
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
        # The manifest comes first: if the run stops while it empties the folder, the next run can overwrite it.
        write_json(path / MANIFEST, unfinished)
        for child in path.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name != MANIFEST:
                child.unlink()
    except OSError as error:
        raise InputError(f"{path}: can't be used as an output folder ({error.strerror})") from None
    return path


def is_unfinished(folder: Path, stage: str) -> bool:
    """Whether `open_output` created the folder for this stage, and the stage has not finished."""
    return _manifest(folder) == {"finished": False, "stage": stage}


def _is_partial_manifest(child: Path) -> bool:
    """Whether a file is the temporary manifest of a run that was killed while it wrote the manifest."""
    return child.name.startswith(f".{MANIFEST}.") and child.suffix == ".tmp"


def _has_project_manifest(folder: Path) -> bool:
    """Whether a stage wrote the folder. The content decides, because web projects also have a manifest.json."""
    manifest = _manifest(folder)
    return isinstance(manifest, dict) and isinstance(manifest.get("finished"), bool)


def _manifest(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_manifest(
    folder: Path,
    *,
    stage: str,
    config: dict[str, Any],
    inputs: Iterable[Path] = (),
    counts: dict[str, Any] | None = None,
    resolved: dict[str, Any] | None = None,
) -> None:
    """Writes the finished manifest of an output folder: config, code and package versions, input hashes, counts.

    `resolved` are the settings that the config leaves to a checkpoint.
    It contains no times or durations, so two identical runs write the same manifest.
    """
    write_json(
        folder / MANIFEST,
        {
            "finished": True,
            "stage": stage,
            "config": config,
            **({"resolved": resolved} if resolved else {}),
            "code": code_version(),
            "python": platform.python_version(),
            "packages": package_versions(),
            "inputs": {str(path): file_hash(path) for path in inputs},
            "counts": counts or {},
        },
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage. Raises `InputError` if it is missing, unreadable or unfinished."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the stage that writes {folder} first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(manifest).__name__}")
    if not manifest.get("finished"):
        raise InputError(f"{folder}: the stage that writes it did not finish; run it again")
    return manifest


def package_versions() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> str:
    """The commit of the checkout, plus "+changes" if files differ. For an installed package, its version."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: git would describe a repository around the environment
        return importlib.metadata.version("mmr5-train")
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return importlib.metadata.version("mmr5-train")


def run_settings(config: Any) -> dict[str, Any]:
    """The settings that must be equal to resume a run: the stage's config and the hash of its data file."""
    settings = config.model_dump(mode="json", exclude={"out", "overwrite"})
    return settings | {"data": f"{config.data}, sha256 {file_hash(config.data)}"}


def check_settings(out: Path, stopped: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises `InputError` for the first setting in which the stopped run differs from the current one."""
    for name in sorted(stopped.keys() | current.keys()):
        if stopped.get(name) != current.get(name):
            raise InputError(
                f"{out}: contains a stopped run with {name} {stopped.get(name)}, but this run has "
                f"{current.get(name)}; use the same settings to resume it, or overwrite=true to start over"
            )
