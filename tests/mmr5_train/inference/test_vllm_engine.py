"""The vLLM backend, with a stub of the engine that reads prompts as vLLM does (`make test-vllm`: the real one)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mmr5_train import Reranker
from mmr5_train.common.config import compose_stage
from mmr5_train.common.files import InputError, read_records
from mmr5_train.evaluate import EvaluateStage, main
from mmr5_train.inference.local import LocalBackend, load_backend
from mmr5_train.inference.stopping import End
from mmr5_train.inference.vllm_engine import VllmBackend, check_prompt
from mmr5_train.models.config import CheckpointOptions, ModelOptions
from mmr5_train.models.inputs import encode, prompt_token_ids
from mmr5_train.models.loading import TINY
from mmr5_train.models.page_features import encode_prompts
from mmr5_train.models.pages import load_page
from mmr5_train.ranking.answer_constraints import gbnf_grammar
from mmr5_train.ranking.prompt import Prompt
from mmr5_train.ranking.records import Ranking

QUERIES = ["Which?", "Which of the pages shows a green table about water?"]
COMPLETION = "<think>Image 1: a table, so it helps.</think><answer>[2, 1]</answer>"


@dataclass
class SamplingParams:
    """The fields of vLLM 0.32's class that the backend uses. Any other field is a TypeError, as there."""

    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    stop_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True
    structured_outputs: Any = None


@dataclass
class StructuredOutputsParams:
    grammar: str


@dataclass
class Engine:
    """`vllm.LLM`, as far as the backend uses it. It answers every prompt with `COMPLETION`."""

    arguments: dict[str, Any]
    processor: Any = None
    finish: str = "stop"
    asked: list[tuple[list[Any], list[SamplingParams]]] = field(default_factory=list)

    @property
    def llm_engine(self) -> Any:
        return SimpleNamespace(model_config=SimpleNamespace(max_model_len=self.arguments["max_model_len"]))

    def generate(self, prompts: list[Any], settings: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.asked.append((prompts, settings))
        return [self._answer(*row) for row in zip(prompts, settings, strict=True)]

    def _answer(self, prompt: dict[str, Any], settings: SamplingParams) -> Any:
        image_processor, placeholder = self.processor.image_processor, self.processor.image_token_id
        grids = image_processor(images=prompt["multi_modal_data"]["image"])["image_grid_thw"].tolist()
        sizes = iter([t * h * w // image_processor.merge_size**2 for t, h, w in grids])
        ids = [i for i in prompt["prompt_token_ids"] for i in [i] * (next(sizes) if i == placeholder else 1)]
        tokenizer = self.processor.tokenizer
        token_ids = [*tokenizer(COMPLETION)["input_ids"], tokenizer.eos_token_id]
        completion = SimpleNamespace(token_ids=token_ids, finish_reason=self.finish)
        return SimpleNamespace(prompt_token_ids=ids, outputs=[completion] * settings.n)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, processor: Any) -> list[Engine]:
    """Replaces vLLM by the stub. Returns the engines that were started."""
    started: list[Engine] = []

    def start(**arguments: Any) -> Engine:
        if "unknown" in arguments:
            raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'unknown'")
        started.append(Engine(arguments, processor))
        return started[-1]

    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.LLM, vllm.SamplingParams = start, SamplingParams  # type: ignore[attr-defined]
    params.StructuredOutputsParams = StructuredOutputsParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return started


def make_reranker(**options: Any) -> Reranker:
    return Reranker(TINY, backend="vllm", max_new_tokens=64, **options)


@pytest.fixture(scope="module", params=["tiny", "standin"])
def local(request: pytest.FixtureRequest, prompt: Prompt) -> LocalBackend:
    if request.param == "tiny":
        return load_backend(TINY, max_new_tokens=64)
    options = CheckpointOptions(model=ModelOptions(max_pixels=9500), prompt=prompt)
    return load_backend(request.getfixturevalue("standin"), options, max_new_tokens=64)


def pages(backend: Any, page_folder: Path, counts: tuple[int, ...] = (2, 5)) -> list[Any]:
    return [[load_page(page_folder / f"page-{i}.png", backend.limits) for i in range(n)] for n in counts]


def test_prompts_have_one_placeholder_per_page_and_otherwise_the_ids_of_the_processor(
    local: LocalBackend, page_folder: Path
) -> None:
    images = pages(local, page_folder)
    inputs = encode(local.processor, local.prompt, QUERIES, images)
    expected = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    given = prompt_token_ids(local.processor, local.prompt, QUERIES, [2, 5])
    placeholder = local.processor.image_token_id
    assert [ids.count(placeholder) for ids in given] == [2, 5]
    backend = VllmBackend(None, local.processor, local.prompt, max_new_tokens=64)
    assert [backend._expand(*row) for row in zip(given, images, strict=True)] == expected


def test_answers_are_read_as_in_process(engines: list[Engine], page_folder: Path) -> None:
    backend = make_reranker().backend
    images = pages(backend, page_folder)
    answers = backend.generate(QUERIES, images)
    [[(prompts, settings)]] = [engine.asked for engine in engines]
    assert [len(prompt["multi_modal_data"]["image"]) for prompt in prompts] == [2, 5]
    assert [answer.order for [answer] in answers] == [(2, 1), (2, 1, 3, 4, 5)]
    tokenizer = backend.processor.tokenizer  # type: ignore[union-attr]
    ids = [*tokenizer(COMPLETION)["input_ids"], tokenizer.eos_token_id]
    local = load_backend(TINY, max_new_tokens=64)
    prompts = encode_prompts(local.model, local.processor, local.prompt, QUERIES, images)
    end = End(len(ids) - 1, len(ids), "", False)
    for [answer], counts in zip(answers, local._prompt_token_counts(prompts), strict=True):
        assert answer == local._read(ids, len(answer.order), end, True, False, counts)
    for params in settings:
        assert (params.temperature, params.n, params.seed) == (0.0, 1, None)
        assert set(params.stop_token_ids or ()) == set(local.tokens["eos_token_id"])
        assert params.logit_bias == dict.fromkeys(local.tokens["suppress_tokens"], -100.0)


def test_samples_have_the_seed_of_their_query(engines: list[Engine], page_folder: Path) -> None:
    backend = make_reranker().backend
    answers = backend.generate(QUERIES, pages(backend, page_folder), samples=3, temperature=0.7, seed=5)
    assert [len(samples) for samples in answers] == [3, 3]
    [(_, settings)] = engines[0].asked
    assert [(params.n, params.temperature, params.seed) for params in settings] == [(3, 0.7, 5), (3, 0.7, 6)]


def test_an_answer_at_the_token_limit_is_cut_off(engines: list[Engine], page_folder: Path) -> None:
    backend = make_reranker().backend
    engines[0].finish = "length"
    [[answer]] = backend.generate(QUERIES[:1], pages(backend, page_folder)[:1])
    assert answer.defects == ("cut_off",)


@pytest.mark.parametrize(("mode", "think"), [("reason", True), ("direct", False)])
def test_constrained_answers_have_the_grammar_of_their_pages(
    engines: list[Engine], page_folder: Path, mode: str, think: bool
) -> None:
    reranker = make_reranker(mode=mode)
    reranker.rank_many(QUERIES, [[page_folder / f"page-{i}.png" for i in range(n)] for n in (2, 5)])
    [(_, settings)] = engines[0].asked
    grammars = [params.structured_outputs.grammar for params in settings]
    assert grammars == [gbnf_grammar(2, think=think), gbnf_grammar(5, think=think)]


def test_the_context_is_that_of_the_largest_window(engines: list[Engine]) -> None:
    make_reranker(window=2, vllm={"tensor_parallel_size": 4})
    make_reranker(window=None)
    arguments = engines[0].arguments
    assert arguments["max_model_len"] < engines[1].arguments["max_model_len"]
    assert arguments["limit_mm_per_prompt"] == {"image": 2, "video": 0}
    assert (arguments["tensor_parallel_size"], arguments["generation_config"]) == (4, "vllm")


def test_a_prompt_that_does_not_fit_the_context_is_an_error(engines: list[Engine], page_folder: Path) -> None:
    reranker = make_reranker(vllm={"max_model_len": 100})
    with pytest.raises(InputError, match=r"exceed the engine's context of 100; raise vllm.max_model_len"):
        reranker.rank("Which?", [page_folder / "page-0.png"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "logits"}, "mode logits needs backend: transformers"),
        ({"base": "other"}, "needs a merged checkpoint"),
        ({"vllm": {"unknown": 1}}, "does not start.*unexpected keyword argument 'unknown'"),
    ],
)
def test_what_can_not_work_is_an_error(engines: list[Engine], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_reranker(**options)


def test_several_processes_are_an_error(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without accelerate"):
        make_reranker()


def test_arguments_without_the_backend_are_an_error() -> None:
    with pytest.raises(InputError, match="vllm is read with backend: vllm only"):
        Reranker(TINY, vllm={"tensor_parallel_size": 2})


def test_a_missing_vllm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"vLLM is not installed in this environment; .*docs/training.md"):
        make_reranker()


def test_another_prompt_is_an_error() -> None:
    check_prompt([1, 2, 3], (1, 2, 3))
    with pytest.raises(InputError, match="4 tokens instead of 3, different from token 2 on"):
        check_prompt([1, 2, 3], [1, 2, 2, 3])
    with pytest.raises(InputError, match="2 tokens instead of 3, different from token 2 on"):
        check_prompt([1, 2, 3], [1, 2])


def test_evaluate_ranks_with_the_engine(engines: list[Engine], questions: Path, tmp_path: Path) -> None:
    (questions.parent / "pages.jsonl").write_text(
        "".join(
            f'{{"doc_name": "doc", "page": {i}, "domain": "x", "image": "page-{i}.png", "width": 600, '
            '"height": 800}\n'
            for i in range(6)
        )
    )
    overrides = [
        f"data={questions}",
        f"systems={{engine:{TINY},local:{{checkpoint:{TINY},backend:transformers}}}}",
    ]
    overrides += [
        "backend=vllm",
        "vllm={tensor_parallel_size:1}",
        "max_new_tokens=64",
        "samples=2",
        f"out={tmp_path / 'out'}",
    ]
    main(compose_stage(EvaluateStage, "evaluate", overrides))
    assert len(engines) == 1
    rankings = read_records(tmp_path / "out/rankings/engine.jsonl", Ranking)
    assert [ranking.greedy.order for ranking in rankings] == [(2, 1, 3)] * len(rankings)
    assert [len(ranking.samples) for ranking in rankings] == [2] * len(rankings)
