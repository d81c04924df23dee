"""The page `tables.html` of mmr5_train.tables: measured rows in the published tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmr5_train.common.files import code_version
from mmr5_train.evaluation.paper_table import NOTE, Row
from mmr5_train.evaluation.published import FIGURES, OTHER_TABLES, SOURCE
from mmr5_train.reporting.page import render_page


def paper_view(blocks: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """The arguments of the template macro `paper_table`."""
    return {"blocks": blocks, "figures": FIGURES, "source": SOURCE, "note": NOTE}


def tables_page(blocks: Sequence[Sequence[Row]]) -> str:
    measured = [row for block in blocks for table_row in block for row in table_row.measured]
    stages = dict.fromkeys(row.first_stage for row in measured)
    return render_page(
        "tables.html.j2",
        title="Measured and published results",
        first_stages=list(stages),
        table=paper_view(blocks),
        other_tables=OTHER_TABLES,
        code=code_version(),
        pictures={},
    )
