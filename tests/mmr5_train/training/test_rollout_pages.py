"""GRPO opens each page file once per rollout batch, in threads, one batch ahead."""

import pickle
import threading
from collections import Counter

import pytest
from PIL import Image
from trl.trainer import grpo_trainer

from mmr5_train import grpo
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, write_records
from mmr5_train.models import pages
from mmr5_train.models.pages import PageLimits
from mmr5_train.ranking.records import Candidate, PageId, RankingTask
from mmr5_train.training.dataset import PageFile
from mmr5_train.training.rollout_pages import RolloutPages, wait_for_pages

LIMITS = PageLimits(28, 784, 100_000)  # larger than pages that are cached for the whole run


@pytest.fixture
def questions(tmp_path):
    """Two questions with two pages each, all different."""
    tasks = []
    for q in range(2):
        candidates = tuple(
            Candidate(doc_name="d", page=2 * q + i, image=f"{2 * q + i}.png", score=-i) for i in range(2)
        )
        for page in candidates:
            Image.new("RGB", (300, 400), (90 * page.page, 0, 0)).save(tmp_path / page.image)
        positives = (PageId(doc_name="d", page=2 * q),)
        tasks.append(
            RankingTask(
                query_id=f"d/{q}", query="Which page?", domain="x", candidates=candidates, positives=positives
            )
        )
    write_records(tmp_path / "questions.jsonl", tasks)
    return tmp_path / "questions.jsonl"


@pytest.fixture
def opened(monkeypatch):
    """Counts how often each page file is opened, and by which thread."""
    counts, open_image = Counter(), pages.open_image

    def counting(path, *rest):
        counts[path.name, threading.current_thread() is threading.main_thread()] += 1
        return open_image(path, *rest)

    monkeypatch.setattr(pages, "open_image", counting)
    return counts


@pytest.fixture
def sent(monkeypatch):
    """The sizes of the objects that TRL sends to all ranks, in bytes."""
    sizes, gather_object = [], grpo_trainer.gather_object

    def measuring(value):
        sizes.append(len(pickle.dumps(value)))
        return gather_object(value)

    monkeypatch.setattr(grpo_trainer, "gather_object", measuring)
    return sizes


@pytest.mark.parametrize("shared_prefix", ["always", "never"])
def test_each_page_is_opened_once_in_a_rollout_cycle(shared_prefix, questions, opened, sent, tmp_path):
    """Group of 4, two steps per generation, two iterations: 16 readings of the row of a question."""
    settings = (
        "{per_device_train_batch_size:2,gradient_accumulation_steps:2,num_generations:4,num_iterations:2,"
        "max_completion_length:4,log_completions:false}"
    )
    overrides = [f"data={questions}", f"out={tmp_path}/out", f"trainer={settings}", "model.max_pixels=100000"]
    overrides += ["override_checkpoint=true"]
    grpo.main(
        compose_stage(grpo.GrpoStage, "grpo", [*overrides, f"shared_prefix={shared_prefix}", "alarms='off'"])
    )
    assert opened == {(f"{i}.png", False): 1 for i in range(4)}
    assert 0 < max(sent) < 20_000  # the images of a prompt are ten times larger


def test_pages_are_opened_when_a_batch_is_read_and_kept_while_they_are_read_again(questions, opened):
    first, second = ([{"images": [PageFile(questions.parent / f"{i}.png", LIMITS)]}] for i in (0, 1))
    reader = RolloutPages()
    rows = reader.start([*first, *first])
    again = reader.start(first)
    following = reader.start(second)  # as the loader does during the last step on the first batch
    images = wait_for_pages([*rows, *again])
    assert len({id(row["images"][0]) for row in images}) == 1
    wait_for_pages(following)
    assert opened == {("0.png", False): 1, ("1.png", False): 1}
    wait_for_pages(reader.start(first))  # memory holds only the batch that was read last
    assert opened["0.png", False] == 2


def test_an_unreadable_page_is_named_when_the_batch_is_used(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = RolloutPages().start([{"images": [PageFile(tmp_path / "broken.png", LIMITS)]}])
    with pytest.raises(InputError, match=r"broken\.png: not a readable page image"):
        wait_for_pages(rows)


def test_worker_processes_are_refused(questions, tmp_path):
    overrides = [f"data={questions}", f"out={tmp_path}/out", "+trainer.dataloader_num_workers=2"]
    with pytest.raises(InputError, match=r"trainer.dataloader_num_workers: expected 0, found 2"):
        grpo.main(compose_stage(grpo.GrpoStage, "grpo", overrides))
