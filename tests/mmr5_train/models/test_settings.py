"""Which settings run a checkpoint: its own, in every stage, unless they are overridden."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmr5_train import Reranker, distill, evaluate, grpo, select, sft
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_manifest, read_records, write_records
from mmr5_train.models.config import MAX_NEW_TOKENS, SETTINGS, CheckpointOptions, ModelOptions
from mmr5_train.models.loading import TINY, read_settings
from mmr5_train.models.settings import complete_model, resolve_settings
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Page, Ranking
from mmr5_train.serve import load_reranker
from mmr5_train.serving.settings import ServeConfig


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A checkpoint that another project wrote: it has no reranker.json."""
    return Path(shutil.copytree(TINY, tmp_path / "foreign", ignore=shutil.ignore_patterns(SETTINGS)))


@pytest.fixture
def no_think(tmp_path: Path) -> Path:
    """A checkpoint that was trained without think blocks."""
    folder = Path(shutil.copytree(TINY, tmp_path / "no_think"))
    settings = read_settings("tiny")
    assert settings is not None
    (folder / SETTINGS).write_text(settings.model_copy(update={"think": False}).model_dump_json())
    return folder


@pytest.fixture
def pages(page_folder: Path) -> Path:
    """pages.jsonl in the page folder."""
    records = [
        Page(doc_name="doc", page=i, domain="d", image=f"page-{i}.png", width=600, height=800) for i in range(6)
    ]
    write_records(page_folder / "pages.jsonl", records)
    return page_folder / "pages.jsonl"


def model(**fields: Any) -> CheckpointOptions:
    return CheckpointOptions(model=ModelOptions(**fields))


def test_without_settings_a_checkpoint_has_its_own() -> None:
    own = resolve_settings("tiny", CheckpointOptions())
    assert own.to_record() == read_settings("tiny")
    assert (own.model.path, own.model.attention, own.model.lora) == ("tiny", "auto", None)


def test_settings_that_agree_with_the_checkpoint_are_accepted(prompt: Prompt) -> None:
    model = ModelOptions(min_pixels=784, max_pixels=9500, dtype="float32", attention="eager")
    renamed = prompt.model_copy(update={"name": "my copy"})
    settings = resolve_settings("tiny", CheckpointOptions(model=model, prompt=renamed, think=True))
    own, record = read_settings("tiny"), settings.to_record()
    assert own is not None
    assert record.model_dump(exclude={"prompt"}) == own.model_dump(exclude={"prompt"})
    assert settings.model.attention == "eager"


def contradicting(prompt: Prompt) -> list[tuple[CheckpointOptions, str]]:
    return [
        (model(min_pixels=1000), r"model.min_pixels: found 1000, but tiny was trained with 784 \(reranker.json\)"),
        (model(max_pixels=12_845_056), "model.max_pixels: found 12845056, but tiny was trained with 9500"),
        (model(dtype="bfloat16"), "model.dtype: found bfloat16, but tiny was trained with float32"),
        (CheckpointOptions(think=False), "think: found false, but tiny was trained with true"),
        (
            CheckpointOptions(prompt=prompt.model_copy(update={"name": "mine", "system": "Rank."})),
            r"prompt: found mine \(system: 'Rank.'\), but tiny was trained with default \(system: 'You rank",
        ),
        (
            CheckpointOptions(prompt=prompt.model_copy(update={"images_first": True})),
            r"prompt: found default \(images_first: True\), but tiny was trained with default \(",
        ),
    ]


def test_a_contradiction_names_the_field_and_both_values_and_can_be_forced(prompt: Prompt) -> None:
    for options, message in contradicting(prompt):
        with pytest.raises(InputError, match=message + r".*; omit the setting, or set override_checkpoint=true"):
            resolve_settings("tiny", options)
        forced = resolve_settings("tiny", options.model_copy(update={"override_checkpoint": True}))
        assert forced.to_record() != read_settings("tiny")


def test_limits_that_exclude_each_other_are_an_error() -> None:
    options = model(min_pixels=10_000).model_copy(update={"override_checkpoint": True})
    with pytest.raises(InputError, match=r"min_pixels must be at most max_pixels \(9500\); tiny has the other"):
        resolve_settings("tiny", options)


def test_a_foreign_checkpoint_has_its_own_page_sizes_and_needs_a_prompt(foreign: Path, prompt: Prompt) -> None:
    with pytest.raises(InputError, match=r'foreign: has no reranker.json, so the prompt .* give prompt="default"'):
        resolve_settings(foreign, CheckpointOptions())
    settings = resolve_settings(foreign, CheckpointOptions(prompt=prompt))
    assert (settings.model.min_pixels, settings.model.max_pixels, settings.model.dtype) == (784, 9500, "float32")
    assert settings.think
    smaller = resolve_settings(foreign, CheckpointOptions(model=ModelOptions(max_pixels=5000), prompt=prompt))
    assert (smaller.model.min_pixels, smaller.model.max_pixels) == (784, 5000)


def test_the_config_of_a_base_model_is_complete_without_reading_it() -> None:
    options = ModelOptions(path="no/where", min_pixels=3136, max_pixels=12_845_056, dtype="bfloat16")
    assert complete_model(options).model_dump() == options.model_dump()


def test_a_published_checkpoint_has_its_own_page_sizes_and_dtype(standin: Path, prompt: Prompt) -> None:
    settings = resolve_settings(standin, CheckpointOptions(prompt=prompt))
    assert (settings.model.min_pixels, settings.model.max_pixels) == (3_136, 12_845_056)
    config = standin / "config.json"
    assert f'"dtype": "{settings.model.dtype}"' in config.read_text()


@pytest.mark.parametrize("stage", ["sft", "grpo", "distill", "evaluate", "select"])
def test_every_stage_refuses_a_contradiction_before_it_writes(
    stage: str, questions: Path, traces: Path, pages: Path, tmp_path: Path
) -> None:
    write_rankings(traces.parent / "rankings.jsonl")
    modules: dict[str, Any] = {
        "sft": sft,
        "grpo": grpo,
        "distill": distill,
        "evaluate": evaluate,
        "select": select,
    }
    data = {"sft": traces, "grpo": questions, "distill": traces.parent / "rankings.jsonl", "evaluate": questions}
    own = {
        "evaluate": [f"data={questions}", "systems={x:tiny}"],
        "select": [f"questions={questions}", "difficulty={checkpoint:tiny}"],
    }
    overrides = own.get(stage) or [f"data={data[stage]}", "model.path=tiny"]
    main, config_class = modules[stage].main, getattr(modules[stage], f"{stage.capitalize()}Stage")
    for setting, message in (
        ("model.max_pixels=4000", "model.max_pixels: found 4000, but tiny was trained with 9500"),
        ("think=false", "think: found false, but tiny was trained with true"),
    ):
        config = compose_stage(config_class, stage, [f"out={tmp_path / 'out'}", *overrides, setting])
        with pytest.raises(InputError, match=message):
            main(config)
    assert not (tmp_path / "out").exists()


def write_rankings(path: Path) -> None:
    from mmr5_train.ranking.answer import to_model_answer
    from mmr5_train.ranking.records import Candidate

    shown = [Candidate(doc_name="doc", page=i, image=f"page-{i}.png", score=0) for i in range(2)]
    answer = to_model_answer("<think>Image 1: a page.</think><answer>[1, 2]</answer>", 2)
    ranking = Ranking(system="x", query_id="q", query="?", domain="d", shown=shown, positives=(), greedy=answer)
    write_records(path, [ranking])


def test_reranker_and_serve_follow_the_same_rule(no_think: Path, prompt: Prompt) -> None:
    with pytest.raises(InputError, match=r"model.max_pixels: found 4000, but tiny was trained with 9500"):
        Reranker("tiny", model=ModelOptions(max_pixels=4000))
    forced = Reranker("tiny", model=ModelOptions(max_pixels=4000), override_checkpoint=True)
    assert forced.backend.limits.max_pixels == 4000
    with pytest.raises(InputError, match=r"mode: reason expects a think block, but .* trained with think=false"):
        Reranker(no_think, mode="reason")
    assert Reranker(no_think, mode="logits").mode == "logits"
    other = prompt.model_copy(update={"system": "Rank."})
    server = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    for options in ({"server": server}, {}):
        with pytest.raises(InputError, match="prompt: found default"):
            Reranker("tiny", prompt=other, **options)
    with pytest.raises(InputError, match="prompt: found default"):
        load_reranker(ServeConfig(checkpoint="tiny", prompt=other))
    assert load_reranker(ServeConfig(checkpoint="tiny", prompt=other, override_checkpoint=True))


def test_evaluate_ranks_each_system_with_its_own_settings(
    standin: Path, no_think: Path, questions: Path, pages: Path, tmp_path: Path
) -> None:
    systems = f"systems={{tiny:tiny,short:{no_think},foreign:{{checkpoint:{standin},prompt:default}}}}"
    overrides = [f"data={questions}", f"out={tmp_path / 'out'}", systems, "limit=1"]
    config = compose_stage(evaluate.EvaluateStage, "evaluate", overrides)
    assert config.max_new_tokens == MAX_NEW_TOKENS
    evaluate.main(config.model_copy(update={"max_new_tokens": 4}))
    visual_tokens = {
        name: read_records(tmp_path / f"out/rankings/{name}.jsonl", Ranking)[0].greedy.visual_tokens
        for name in ("tiny", "short", "foreign")
    }
    # A page of 600 × 800 pixels has 84 × 112 pixels for the tiny model, 588 × 812 for the foreign one.
    assert visual_tokens == {"tiny": 3 * 3 * 4, "short": 3 * 3 * 4, "foreign": 3 * 21 * 29}
    resolved = read_manifest(tmp_path / "out")["resolved"]
    assert {name: (values["think"], values["max_pixels"]) for name, values in resolved.items()} == {
        "tiny": (True, 9500),
        "short": (False, 9500),
        "foreign": (True, 12_845_056),
    }


def test_training_continues_with_the_settings_of_its_checkpoint(
    no_think: Path, traces: Path, tmp_path: Path
) -> None:
    overrides = [f"data={traces}", f"out={tmp_path / 'out'}", f"model.path={no_think}", "trainer.max_steps=1"]
    config = compose_stage(sft.SftStage, "sft", [*overrides, "trainer.per_device_train_batch_size=2"])
    sft.main(config)
    own, trained = read_settings(no_think), read_settings(tmp_path / "out/model")
    assert own is not None
    own = own.model_copy(update={"verdicts": False})
    assert trained == own.model_copy(update={"step": 1, "steps": 1})
    assert read_manifest(tmp_path / "out")["resolved"] == own.model_dump(mode="json")
