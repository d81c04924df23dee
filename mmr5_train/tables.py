"""Puts measured figures into MM-R5's published tables.

    python -m mmr5_train.tables 'evaluations={ColQwen: outputs/colqwen/evaluation, DSE: outputs/dse/evaluation}' \\
        'rows={sft: SFT only, grpo: MM-R5}' out=outputs/tables

Reads results.json from evaluate folders. `evaluations` maps the name of a first stage to its folder; the first
stage is compared with the published one of the same name. `rows` maps each other system to the published row that
it is compared with. The remaining systems are listed without a comparison. Writes tables.md and tables.html: every
published row, followed by the measured rows and their differences from it; then the tables of other papers, whose
first stages differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import atomic_write, open_output, write_manifest
from mmr5_train.evaluation.paper_table import markdown, measured_rows, other_tables_markdown, paper_table
from mmr5_train.reporting.paper import tables_page
from mmr5_train.reporting.views import read_results


class TablesStage(StageConfig):
    """Config of `python -m mmr5_train.tables` (configs/tables.yaml)."""

    evaluations: dict[str, Path] = Field(description="first stage → folder of the evaluate stage")
    rows: dict[str, str] = Field(description="system → the published row it is compared with, e.g. sft: SFT only")

    @field_validator("evaluations", "rows", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        # The default in the config is null, because Hydra can't add new keys to an empty dict.
        return {} if value is None else value

    @field_validator("evaluations")
    @classmethod
    def _is_not_empty(cls, evaluations: dict[str, Path]) -> dict[str, Path]:
        if not evaluations:
            raise ValueError("give at least one, such as 'evaluations={ColQwen: outputs/evaluate}'")
        return evaluations


def main(config: TablesStage) -> None:
    results = {first_stage: read_results(folder) for first_stage, folder in config.evaluations.items()}
    measured = measured_rows(results, config.rows)
    blocks = paper_table(measured)
    out = open_output(config.out, config.overwrite, inputs=config.evaluations.values())
    text = f"{markdown(blocks)}\n{other_tables_markdown()}"
    with atomic_write(out / "tables.md") as stream:
        stream.write(text)
    with atomic_write(out / "tables.html") as stream:
        stream.write(tables_page(blocks))
    compared = sum(row.published is not None for row in measured)
    write_manifest(
        out,
        stage="tables",
        config=config.model_dump(mode="json"),
        inputs=[folder / "results.json" for folder in config.evaluations.values()],
        counts={"measured": len(measured), "beside_published": compared},
    )
    print(text)
    counts = f"{len(measured)} measured rows, {compared} with a published counterpart"
    print(f"tables: {counts}, in {out / 'tables.html'}")


if __name__ == "__main__":
    run_stage(main, TablesStage, "tables")
