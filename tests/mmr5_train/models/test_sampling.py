"""Answers are sampled from the model's own distribution: the checkpoint's generation_config has no influence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mmr5_train import Reranker
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, write_records
from mmr5_train.grpo import GrpoStage, grpo_arguments
from mmr5_train.grpo import main as run_grpo
from mmr5_train.inference.local import LocalBackend, load_backend
from mmr5_train.models.config import SETTINGS, CheckpointOptions, RerankerSettings
from mmr5_train.models.loading import TINY
from mmr5_train.models.pages import load_page
from mmr5_train.models.sampling import end_token_ids, generation_config, token_settings, without_own_settings
from mmr5_train.models.settings import resolve_settings
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Page, RankingTask
from mmr5_train.select import SelectStage
from mmr5_train.select import main as run_select

QUERIES = ["Which?", "Which of the pages shows a green table about the use of water in each month of the year?"]

# An unusual value of each field of GenerationConfig. Fields that only other libraries or modes read are included.
ODD: dict[str, Any] = {
    "max_length": 3, "max_new_tokens": 1, "min_length": 900, "min_new_tokens": 900, "early_stopping": True,
    "max_time": 0.001, "stop_strings": ["a", "e"], "do_sample": True, "num_beams": 3, "use_mtp": True,
    "use_cache": False, "cache_implementation": "static", "cache_config": {"max_cache_len": 7}, "max_cache_len": 7,
    "temperature": 1e-6, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1,
    "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "repetition_penalty": 1.9, "encoder_repetition_penalty": 1.9,
    "length_penalty": 3.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[i] for i in range(100, 400)],
    "renormalize_logits": True, "forced_bos_token_id": 40, "forced_eos_token_id": 41,
    "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 2.0],
    "suppress_tokens": list(range(100, 400)), "begin_suppress_tokens": list(range(8, 900)),
    "sequence_bias": [[[300], 50.0]], "token_healing": True, "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0, "greenlist_ratio": 0.2}, "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "pad_token_id": 31, "bos_token_id": 32, "eos_token_id": [33, 34],
    "encoder_no_repeat_ngram_size": 1, "decoder_start_token_id": 35, "is_assistant": True,
    "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 2, "assistant_early_exit": 1,
    "assistant_lookbehind": 1, "target_lookbehind": 1, "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash", "compile_config": None, "disable_compile": False,
    "continuous_batching_config": None, "low_memory": True, "penalty_alpha": 0.5, "dola_layers": "high",
    "diversity_penalty": 2.0, "num_beam_groups": 3, "constraints": None, "force_words_ids": None,
    "prefill_chunk_size": 3, "custom_entry": 5,
}  # fmt: skip


def test_every_field_of_a_generation_config_has_an_odd_value() -> None:
    internal = {"transformers_version"}
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - internal <= ODD.keys()


def variant(source: Path, folder: Path, prompt: Prompt, generation: dict[str, Any] | None) -> Path:
    """A checkpoint with the weights of `source`, a reranker.json, and this generation_config.json, or none."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in ("generation_config.json", SETTINGS):
            (folder / path.name).symlink_to(path)
    settings = RerankerSettings(min_pixels=784, max_pixels=9500, dtype="float32", think=True, prompt=prompt)
    (folder / SETTINGS).write_text(settings.model_dump_json())
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def answers(backend: LocalBackend, page_folder: Path) -> list[Any]:
    """Greedy and sampled answers to two prompts of unequal length, with and without a shared prefill."""
    images = [[load_page(page_folder / f"page-{i}.png", backend.limits) for i in range(n)] for n in (1, 3)]
    return [backend.generate(QUERIES, images, samples=samples, seed=1) for samples in (0, 1, 3)]


@pytest.mark.parametrize("name", ["tiny", "standin"])
def test_the_generation_config_of_a_checkpoint_has_no_influence(
    name: str, page_folder: Path, prompt: Prompt, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = TINY if name == "tiny" else request.getfixturevalue("standin")
    plain = load_backend(variant(source, tmp_path / "plain", prompt, None), max_new_tokens=12)
    expected = answers(plain, page_folder)
    odd = load_backend(variant(source, tmp_path / "odd", prompt, ODD), max_new_tokens=12)
    assert answers(odd, page_folder) == expected
    plain.model.generation_config = own = GenerationConfig(**ODD)  # a model that was not loaded by `load_model`
    assert answers(plain, page_folder) == expected
    assert plain.model.generation_config is own


def test_both_end_tokens_of_qwen_end_an_answer(qwen_tokenizer: Any) -> None:
    ids = qwen_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_token_ids(qwen_tokenizer) == ids


def test_samples_follow_the_temperature_scaled_distribution(
    standin: Path, page_folder: Path, prompt: Prompt
) -> None:
    """1,000 first tokens of a published checkpoint, whose top tokens are as frequent as the model says."""
    backend = load_backend(standin, CheckpointOptions(prompt=prompt), max_new_tokens=1)
    from mmr5_train.models.inputs import encode

    image = load_page(page_folder / "page-0.png", backend.limits).resize((56, 56))
    inputs = encode(backend.processor, prompt, QUERIES[:1], [[image]])
    head = backend.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[:5] += 3 * head.weight[:5].sign()  # so that few tokens have most of the probability
        logits = backend.model(**inputs, logits_to_keep=1).logits[0, -1].float() / 2.0
    logits[backend.tokens["suppress_tokens"]] = -torch.inf
    probabilities = logits.softmax(-1)
    config = generation_config(backend.tokens, 2.0, 1)
    config.num_return_sequences = 1000
    with without_own_settings(backend.model), torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = backend.model.generate(**inputs, generation_config=config)[:, -1]
    for token in probabilities.topk(3).indices.tolist():
        expected = probabilities[token].item()
        assert abs((tokens == token).float().mean().item() - expected) < 4 * (expected / 1000) ** 0.5


def test_questions_of_unequal_length_are_sampled_from_a_published_checkpoint(
    standin: Path, tasks: list[RankingTask], page_folder: Path, prompt: Prompt, tmp_path: Path
) -> None:
    """With a repetition penalty, transformers rejects such a batch. The published checkpoints have one."""
    published = json.loads((standin / "generation_config.json").read_text())
    assert published["repetition_penalty"] == 1.05
    checkpoint = variant(standin, tmp_path / "published", prompt, published)
    unequal = [task.model_copy(update={"query": task.query * (i + 1)}) for i, task in enumerate(tasks)]
    write_records(page_folder / "unequal.jsonl", unequal)
    pages = [
        Page(doc_name="doc", page=i, domain="d", image=f"page-{i}.png", width=600, height=800) for i in range(6)
    ]
    write_records(page_folder / "pages.jsonl", pages)
    difficulty = f"difficulty={{checkpoint:{checkpoint},samples:2,batch_size:8,max_new_tokens:6}}"
    overrides = [f"questions={page_folder}/unequal.jsonl", f"out={tmp_path}/select", difficulty, "reward=mm_r5"]
    with pytest.raises(InputError, match="all answers earn the same"):  # a random model, after the sampling
        run_select(compose_stage(SelectStage, "select", overrides))
    sampled = "".join(path.read_text() for path in (tmp_path / "select").rglob("*.jsonl"))
    assert sampled.count('"samples"') == len(unequal)

    results = Reranker(checkpoint, samples=3, constrain=False, max_new_tokens=12).rank_many(
        QUERIES, [[page_folder / f"page-{i}.png" for i in range(n)] for n in (1, 3)]
    )
    assert [sorted(ranked.order) for ranked in results] == [[0], [0, 1, 2]]


@pytest.mark.parametrize("shared_prefix", ["never", "always"])
def test_rollouts_of_grpo_do_not_depend_on_the_generation_config(
    shared_prefix: str, questions: Path, prompt: Prompt, tmp_path: Path
) -> None:
    logs = []
    for name, generation in (("plain", None), ("odd", ODD)):
        checkpoint, out = variant(TINY, tmp_path / name, prompt, generation), tmp_path / f"{name}-out"
        overrides = [
            f"data={questions}",
            f"out={out}",
            f"model.path={checkpoint}",
            f"shared_prefix={shared_prefix}",
        ]
        overrides += ["trainer.per_device_train_batch_size=4", "trainer.num_generations=4", "trainer.max_steps=2"]
        run_grpo(compose_stage(GrpoStage, "grpo", [*overrides, "trainer.max_completion_length=12"]))
        logs.append(json.loads((out / "log_history.json").read_text()))
    timing = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    plain, odd = ([{k: v for k, v in row.items() if k not in timing} for row in log] for log in logs)
    assert odd == plain
    saved = json.loads((tmp_path / "odd-out/model/generation_config.json").read_text())
    assert not (ODD.keys() - {"eos_token_id", "pad_token_id", "bos_token_id"}) & {k for k, v in saved.items() if v}


def test_vllm_gets_its_own_fields(tmp_path: Path, questions: Path, processor: Any) -> None:
    overrides = [f"data={questions}", f"out={tmp_path}", "+trainer.use_vllm=true", "+trainer.vllm_mode=server"]
    config = compose_stage(GrpoStage, "grpo", overrides)
    arguments = grpo_arguments(config, resolve_settings("tiny", config), processor)
    suppressed = token_settings(processor)["suppress_tokens"]
    assert arguments.generation_kwargs == {"logit_bias": dict.fromkeys(suppressed, -100.0)}
    assert (arguments.top_k, arguments.top_p, arguments.min_p, arguments.repetition_penalty) == (0, 1.0, None, 1.0)


def test_the_rollouts_of_grpo_and_the_samples_of_inference_have_equal_settings(
    tmp_path: Path, questions: Path, processor: Any
) -> None:
    config = compose_stage(GrpoStage, "grpo", [f"data={questions}", f"out={tmp_path}"])
    arguments = grpo_arguments(config, resolve_settings("tiny", config), processor)
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    rollouts = {**arguments.generation_kwargs, **{name: getattr(arguments, name) for name in fields}}
    inference = generation_config(token_settings(processor), 1.0, arguments.max_completion_length).to_dict()
    assert {name: inference[name] for name in rollouts} == rollouts
