"""The targets of the comparison with vLLM. The comparison itself needs a vLLM: `make test-vllm`."""

from typing import Any

import pytest
from bench_engines import targets, vllm_python


def offline(**fields: Any) -> dict[str, Any]:
    rates = {"process_questions_per_s": 2.0, "vllm_questions_per_s": 4.0}
    return {"part": "offline", "model": "tiny", "constrained": False, "equal": 1.0, **rates, **fields}


def rollouts(**losses: list[float]) -> dict[str, Any]:
    names = ("vllm", "vllm_uncorrected", "replay_trl", "replay_shared", "own")
    return {
        "part": "rollouts",
        "importance_ratio": [0.99, 1.0, 1.01],
        "reward": {name: [0.5, 0.6, 0.7] for name in names},
        "loss": {name: losses.get(name, [0.1, 0.2, 0.3]) for name in names},
    }


def unmet(*rows: dict[str, Any]) -> list[str]:
    return [target["name"] for target in targets(rows) if not target["met"]]


def test_equal_engines_meet_the_targets() -> None:
    server = {"part": "servers", "reasoning_parser": "", "equal": 1.0}
    assert unmet(offline(), server, rollouts()) == []


def test_differences_do_not_meet_them() -> None:
    assert unmet(offline(equal=0.98)) == ["offline, tiny: equal answers"]
    assert unmet(offline(vllm_questions_per_s=1.9)) == [
        "offline, tiny: questions per second, relative to in process"
    ]
    assert unmet({"part": "servers", "reasoning_parser": "qwen3", "equal": 0.9}) == [
        "server, reasoning parser qwen3: equal answers"
    ]
    [name] = unmet(rollouts(replay_trl=[0.1, 0.2, 0.301]))
    assert name == "rollouts: difference in loss, the same completions, replay_trl"


def test_a_missing_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENV", raising=False)
    with pytest.raises(SystemExit, match="set VLLM_ENV to a virtual environment with vLLM"):
        vllm_python()
