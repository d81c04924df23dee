"""Writes a checkpoint's model card, and can upload both to the Hugging Face hub.

    python -m mmr5_train.publish checkpoint=outputs/grpo/model evaluation=outputs/evaluate license=apache-2.0
    python -m mmr5_train.publish … push_to_hub=USER/NAME

Reads the manifests of the stages that trained the checkpoint, and the checkpoint's results in an evaluation.
Writes README.md into the checkpoint's folder, in the hub's format (huggingface.co/docs/hub/model-cards). Uploads
only with `push_to_hub`, with the token of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field

from mmr5_train.common.config import run_stage
from mmr5_train.common.files import InputError, atomic_write, read_manifest
from mmr5_train.models.config import SETTINGS
from mmr5_train.ranking.records import Mode
from mmr5_train.reporting.page import TEMPLATES

FIGURES = {"recall@1": "Recall@1", "recall@3": "Recall@3", "recall@5": "Recall@5", "mrr": "MRR"}


class PublishStage(BaseModel):
    """Config of `python -m mmr5_train.publish` (configs/publish.yaml)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Path = Field(description="checkpoint folder model/ of sft, grpo or distill")
    evaluation: Path | None = Field(default=None, description="evaluate folder that ranked with it")
    license: str = Field(description="license identifier; must be compatible with the base model's")
    data: str = Field(default="", description="the training data in a sentence")
    push_to_hub: str | None = Field(default=None, description="repository to upload to, as USER/NAME")
    private: bool = True


def main(config: PublishStage) -> None:
    card = model_card(config)
    with atomic_write(config.checkpoint / "README.md", "w") as stream:
        stream.write(str(card))
    print(f"publish: model card in {config.checkpoint / 'README.md'}")
    if config.push_to_hub:
        print(f"publish: {push(config)}")


def model_card(config: PublishStage) -> ModelCard:
    """The card with its metadata. Raises `InputError` if the folder is not a checkpoint of this project."""
    if not (config.checkpoint / SETTINGS).is_file():
        raise InputError(
            f"checkpoint: {config.checkpoint} has no {SETTINGS}; give model/ of an sft, grpo or distill folder"
        )
    settings = json.loads((config.checkpoint / SETTINGS).read_text(encoding="utf-8"))
    stages = training_stages(config.checkpoint)
    mode: Mode = "reason" if settings["think"] else "direct"
    rows = evaluation_rows(config.evaluation, config.checkpoint, mode) if config.evaluation else []
    figures = {
        name: heading for name, heading in FIGURES.items() if any(row.get(name) is not None for row in rows)
    }
    base = stages[-1]["config"]["model"]["path"]
    results = [
        EvalResult(
            task_type="document-retrieval", dataset_type="mmdocir", dataset_name=str(row["data"]),
            metric_type=name, metric_name=heading, metric_value=round(row[name], 4),
        )
        for row in rows[:1] for name, heading in figures.items() if row.get(name) is not None
    ]  # fmt: skip
    data = ModelCardData(
        license=config.license,
        base_model=base,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["reranking", "document-retrieval", "reasoning", *(stage["stage"] for stage in stages)],
        eval_results=results or None,
        model_name=config.push_to_hub.rpartition("/")[2] if config.push_to_hub else config.checkpoint.parent.name,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md.j2"),
        name=data.model_name,
        repo=config.push_to_hub or str(config.checkpoint),
        trained_on=config.data,
        think=settings["think"],
        max_pixels=settings["max_pixels"],
        headings=list(figures.values()),
        results=[(row["system"], row["mode"], [row.get(name) for name in figures]) for row in rows],
        questions=rows and rows[0]["questions"],
        evaluated_on=rows and rows[0]["data"],
        base=base,
        stages=[
            {"name": s["stage"], "config": OmegaConf.to_yaml(OmegaConf.create(s["config"])), "counts": s["counts"]}
            for s in reversed(stages)
        ],
    )


def training_stages(model: Path) -> list[dict[str, Any]]:
    """The manifests of the stages that trained a checkpoint, the latest first."""
    stages = [read_manifest(model.parent)]
    while (manifest := Path(stages[-1]["config"]["model"]["path"]).parent / "manifest.json").is_file():
        stages.append(read_manifest(manifest.parent))
    return stages


def evaluation_rows(folder: Path, model: Path, default_mode: Mode) -> list[dict[str, Any]]:
    """The rows of results.json of this checkpoint, in its default mode first.

    An evaluation may rank with one checkpoint in several modes. Each row also has `mode`, and `data`, the file of
    the evaluated questions. Raises `InputError` if the checkpoint is not one of the evaluation's systems.
    """
    manifest = read_manifest(folder)
    systems: dict[str, dict[str, Any]] = {
        name: {"checkpoint": system} if isinstance(system, str) else system
        for name, system in manifest["config"]["systems"].items()
    }
    rows = []
    for row in json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]:
        system = systems.get(row["system"], {})  # the first stage is not among them
        checkpoint = system.get("checkpoint")
        if checkpoint is not None and Path(checkpoint).resolve() == model.resolve():
            rows.append({**row, "mode": system.get("mode") or default_mode, "data": manifest["config"]["data"]})
    if not rows:
        checkpoints = dict.fromkeys(str(s["checkpoint"]) for s in systems.values() if s.get("checkpoint"))
        raise InputError(f"evaluation: no system of {folder} is {model} (found: {', '.join(checkpoints)})")
    return sorted(rows, key=lambda row: row["mode"] != default_mode)


def push(config: PublishStage) -> str:
    """Uploads the checkpoint folder to the hub. Returns the address of the model page."""
    api, repo = HfApi(), str(config.push_to_hub)
    try:
        api.create_repo(repo, private=config.private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=config.checkpoint)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"push_to_hub: {repo}: {reason}; the model card was written, and the same command tries again"
        ) from None
    return f"https://huggingface.co/{repo}"


if __name__ == "__main__":
    run_stage(main, PublishStage, "publish")
