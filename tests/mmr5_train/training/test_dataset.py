"""The data set of the trainers, in data-loading processes."""

from __future__ import annotations

import os

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mmr5_train.models.loading import load_processor
from mmr5_train.ranking.prompt import read_prompt
from mmr5_train.ranking.records import Candidate
from mmr5_train.training.dataset import prompt_dataset


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_that_open_pages_have_no_secrets(tiny, tmp_path, monkeypatch, workers):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Image.new("RGB", (600, 800)).save(tmp_path / "0.png")
    page = Candidate(doc_name="d", page=0, image="0.png", score=0)
    rows = prompt_dataset([{}], ["Q?"], [[page]], tmp_path, read_prompt("default"), load_processor(tiny))
    keys = list(DataLoader(rows, collate_fn=lambda _: os.environ.get("OPENAI_API_KEY"), num_workers=workers))
    assert keys == [None if workers else "secret"]
    assert os.environ["OPENAI_API_KEY"] == "secret"
