"""Stage 5, the tables: what was measured, in the frame of MM-R5's published tables.

    python -m mmr5_train.tables 'evaluations={ColQwen: outputs/colqwen/evaluation, DSE: outputs/dse/evaluation}' \\
        'rows={sft: SFT only, grpo: MM-R5}' out=outputs/tables

Reads the results.json of some evaluate folders, each under the name of its first stage. A first stage stands
against the published one of the same name; `rows` says what the other systems stand against. Rows without a
counterpart stand alone. Writes tables.md and tables.html: every published row, and below it what was measured,
with the difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from mmr5_train.common.config import StageConfig, run_stage
from mmr5_train.common.files import atomic_write, open_output, write_manifest
from mmr5_train.evaluation.paper_table import markdown, measured_rows, paper_table
from mmr5_train.reporting.paper import tables_page
from mmr5_train.reporting.views import read_results


class TablesStage(StageConfig):
    """`python -m mmr5_train.tables` (configs/tables.yaml)."""

    evaluations: dict[str, Path] = Field(description="first stage → folder of the evaluate stage")
    rows: dict[str, str] = Field(description="system → the published row it stands against, e.g. sft: SFT only")

    @field_validator("evaluations", "rows", mode="before")
    @classmethod
    def _none_given(cls, named: Any) -> Any:
        return {} if named is None else named  # Hydra adds names to a null, not to an empty dict

    @field_validator("evaluations")
    @classmethod
    def _at_least_one(cls, evaluations: dict[str, Path]) -> dict[str, Path]:
        if not evaluations:
            raise ValueError("give at least one, such as 'evaluations={ColQwen: outputs/evaluate}'")
        return evaluations


def main(config: TablesStage) -> None:
    results = {first_stage: read_results(folder) for first_stage, folder in config.evaluations.items()}
    measured = measured_rows(results, config.rows)
    blocks = paper_table(measured)
    out = open_output(config.out, config.overwrite, inputs=config.evaluations.values())
    with atomic_write(out / "tables.md") as stream:
        stream.write(markdown(blocks))
    with atomic_write(out / "tables.html") as stream:
        stream.write(tables_page(blocks))
    beside = sum(row.published is not None for row in measured)
    write_manifest(
        out,
        stage="tables",
        config=config.model_dump(mode="json"),
        inputs=[folder / "results.json" for folder in config.evaluations.values()],
        counts={"measured": len(measured), "beside_published": beside},
    )
    print(markdown(blocks))
    print(f"tables: {len(measured)} measured rows, {beside} beside a published one, in {out / 'tables.html'}")


if __name__ == "__main__":
    run_stage(main, TablesStage, "tables")
