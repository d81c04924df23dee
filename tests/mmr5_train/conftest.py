"""What the two training stages read, made from the shared tasks."""

import pytest

from mmr5_train.ranking.files import write_records
from mmr5_train.ranking.notes import described_note, join_notes
from mmr5_train.ranking.records import Trace


@pytest.fixture
def questions(tasks, page_folder):
    write_records(page_folder / "questions.jsonl", tasks)
    return page_folder / "questions.jsonl"


@pytest.fixture
def traces(tasks, page_folder):
    """traces.jsonl beside the pages, one a task."""
    records = []
    for task in tasks:
        shown = task.prompted("shuffled").shown
        relevant = next(i for i, page in enumerate(shown, 1) if page.id in task.positives)
        notes = [described_note("a page", i == relevant) for i in range(1, 4)]
        answer = [relevant, *(i for i in (1, 2, 3) if i != relevant)]
        records.append(
            Trace(
                query_id=task.query_id,
                query=task.query,
                domain=task.domain,
                shown=shown,
                notes=notes,
                think=join_notes(notes),
                answer=answer,
                positive_ids=[relevant],
            )
        )
    write_records(page_folder / "traces.jsonl", records)
    return page_folder / "traces.jsonl"
