"""A model card beside a trained checkpoint, and the checkpoint on the Hugging Face hub where told to.

    python -m mmr5_train.publish checkpoint=outputs/grpo/model evaluation=outputs/evaluate license=apache-2.0
    python -m mmr5_train.publish … push_to_hub=USER/NAME

Reads what the stages left: how the checkpoint was trained, from which one, on what, and what the evaluation gave
it. Writes README.md into the checkpoint's folder, in the hub's own format (huggingface.co/docs/hub/model-cards).
Nothing leaves the machine without `push_to_hub`; the token is the hub's own (`hf auth login`, or HF_TOKEN).
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
from mmr5_train.models.loading import SETTINGS
from mmr5_train.reporting.page import TEMPLATES

FIGURES = {"recall@1": "Recall@1", "recall@3": "Recall@3", "recall@5": "Recall@5", "mrr": "MRR"}


class PublishStage(BaseModel):
    """`python -m mmr5_train.publish` (configs/publish.yaml)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Path = Field(description="a checkpoint that sft or grpo wrote: its folder model/ or best/")
    evaluation: Path | None = Field(default=None, description="folder of the evaluate stage that ranked with it")
    license: str = Field(description="identifier of the checkpoint's licence; the base model's own binds it")
    data: str = Field(default="", description="what it was trained on, in a sentence")
    push_to_hub: str | None = Field(default=None, description="USER/NAME: upload it there")
    private: bool = True


def main(config: PublishStage) -> None:
    card = model_card(config)
    with atomic_write(config.checkpoint / "README.md", "w") as stream:
        stream.write(str(card))
    print(f"publish: a model card in {config.checkpoint / 'README.md'}")
    if config.push_to_hub:
        print(f"publish: {push(config)}")


def model_card(config: PublishStage) -> ModelCard:
    """The card, metadata included. Raises `InputError` for a folder that is no checkpoint of this project."""
    if not (config.checkpoint / SETTINGS).is_file():
        raise InputError(f"{config.checkpoint} holds no {SETTINGS}; give model/ or best/ of an sft or grpo folder")
    stages = training_stages(config.checkpoint)
    row = evaluated(config.evaluation, config.checkpoint) if config.evaluation else None
    base = stages[-1]["config"]["model"]["path"]
    results = [
        EvalResult(
            task_type="document-retrieval", dataset_type="mmdocir", dataset_name=str(row["data"]),
            metric_type=name, metric_name=heading, metric_value=round(row[name], 4),
        )
        for name, heading in FIGURES.items() if row and row.get(name) is not None
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
    settings = json.loads((config.checkpoint / SETTINGS).read_text(encoding="utf-8"))
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md.j2"),
        name=data.model_name,
        repo=config.push_to_hub or str(config.checkpoint),
        trained_on=config.data,
        think=settings["think"],
        max_pixels=settings["max_pixels"],
        row=row and {heading: row[name] for name, heading in FIGURES.items() if row.get(name) is not None},
        questions=row and row["questions"],
        evaluated_on=row and row["data"],
        base=base,
        stages=[
            {"name": s["stage"], "config": OmegaConf.to_yaml(OmegaConf.create(s["config"])), "counts": s["counts"]}
            for s in reversed(stages)
        ],
    )


def training_stages(model: Path) -> list[dict[str, Any]]:
    """The manifests of the stages that trained a checkpoint, the last one first."""
    stages = [read_manifest(model.parent)]
    while (before := Path(stages[-1]["config"]["model"]["path"]).parent / "manifest.json").is_file():
        stages.append(read_manifest(before.parent))
    return stages


def evaluated(folder: Path, model: Path) -> dict[str, Any]:
    """The results of the system that is this checkpoint, with the data they are from."""
    manifest = read_manifest(folder)
    systems = manifest["config"]["systems"]
    for row in json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]:
        path = systems.get(row["system"])
        if path is not None and Path(path).resolve() == model.resolve():
            return {**row, "data": manifest["config"]["data"]}
    raise InputError(f"evaluation: none of {folder}'s systems is {model} (found: {', '.join(systems.values())})")


def push(config: PublishStage) -> str:
    """Uploads the folder to the hub; the page's address."""
    api, repo = HfApi(), str(config.push_to_hub)
    try:
        api.create_repo(repo, private=config.private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=config.checkpoint)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"push_to_hub: {repo}: {reason}; the card is written, nothing was removed") from None
    return f"https://huggingface.co/{repo}"


if __name__ == "__main__":
    run_stage(main, PublishStage, "publish")
