"""Published results: MM-R5's tables 1 and 2 (arXiv 2506.12364v2), and those of other rerankers.

MMDocIR page retrieval has 1,658 questions. Macro is the mean over domains, micro the mean over questions. In
MM-R5's tables the candidates come from the first stage in each row's name. The tables of other papers are kept
apart, because their first stages, candidates or questions differ.
"""

from __future__ import annotations

from typing import NamedTuple

FIGURES = (
    "macro recall@1",
    "macro recall@3",
    "macro recall@5",
    "micro recall@1",
    "micro recall@3",
    "micro recall@5",
)

QUESTIONS = 1658

SOURCE = (
    "Published: MM-R5 (arXiv 2506.12364v2) on the 1,658 questions of MMDocIR, with candidates from the named "
    "first stage. They are comparable only with figures measured on the same questions and candidates."
)

_TABLE = {
    "CLIP": (0.3334, 0.5428, 0.6452, 0.3227, 0.5337, 0.6350),
    "CLIP + MM-R5": (0.5942, 0.6749, 0.7173, 0.5803, 0.6598, 0.7018),
    "E5-V": (0.4201, 0.6470, 0.7389, 0.4249, 0.6578, 0.7519),
    "E5-V + MM-R5": (0.6236, 0.7508, 0.7966, 0.6321, 0.7516, 0.8009),
    "DSE": (0.5109, 0.7194, 0.7925, 0.5023, 0.7234, 0.7971),
    "DSE + MM-R5": (0.6487, 0.7777, 0.8213, 0.6429, 0.7817, 0.8254),
    "GME": (0.5400, 0.7603, 0.8308, 0.5421, 0.7603, 0.8377),
    "GME + MM-R5": (0.6612, 0.8095, 0.8578, 0.6551, 0.8037, 0.8566),
    "ColQwen": (0.6481, 0.8331, 0.8766, 0.6354, 0.8213, 0.8667),
    "ColQwen + RagVL": (0.3814, 0.6462, 0.7667, 0.3411, 0.6206, 0.7497),
    "ColQwen + Qwen2.5-VL-7B": (0.6230, 0.8243, 0.8675, 0.6012, 0.8069, 0.8555),
    "ColQwen + Qwen2.5-VL-7B, CoT": (0.6479, 0.8179, 0.8670, 0.6336, 0.8103, 0.8604),
    "ColQwen + Qwen2.5-VL-32B": (0.6422, 0.8161, 0.8669, 0.6309, 0.8118, 0.8636),
    "ColQwen + Qwen2.5-VL-32B, CoT": (0.6768, 0.8500, 0.8842, 0.6609, 0.8448, 0.8800),
    "ColQwen + Gemma3-12B": (0.4743, 0.6675, 0.7278, 0.4456, 0.6353, 0.7025),
    "ColQwen + Gemma3-12B, CoT": (0.5403, 0.7729, 0.8292, 0.5166, 0.7536, 0.8153),
    "ColQwen + SFT only": (0.6673, 0.8475, 0.8828, 0.6498, 0.8366, 0.8746),
    "ColQwen + RL only": (0.6586, 0.8370, 0.8827, 0.6454, 0.8309, 0.8744),
    "ColQwen + MM-R5": (0.6951, 0.8520, 0.8842, 0.6759, 0.8401, 0.8755),
}
PUBLISHED: dict[str, dict[str, float]] = {
    name: dict(zip(FIGURES, values, strict=True)) for name, values in _TABLE.items()
}

RECIPES = {"sft_only": "ColQwen + SFT only", "rl_only": "ColQwen + RL only", "mm_r5": "ColQwen + MM-R5"}
"""Recipe of this project → the published row it reproduces."""


class OtherTable(NamedTuple):
    """Published figures that can't be compared with MM-R5's tables."""

    title: str
    source: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]


OTHER_TABLES = (
    OtherTable(
        "ZipRerank on MMDocIR, 20 candidates of ColQwen",
        "Published: ZipRerank (arXiv 2605.11864), seconds on one GPU. Its first stage ColQwen has a macro "
        "recall@1 of 0.604, MM-R5's 0.648: the first stages differ, so rows of the two papers must not be mixed.",
        ("macro recall@1", "macro recall@3", "seconds per question"),
        {
            "ColQwen": (0.604, 0.790, None),
            "ColQwen + Qwen3-VL-8B": (0.298, 0.739, 2.47),
            "ColQwen + LamRA, list-wise": (0.654, 0.820, 0.55),
            "ColQwen + MM-R5": (0.685, 0.830, 3.74),
            "ColQwen + ZipRerank": (0.661, 0.849, 0.36),
            "ColQwen + GPT-5-mini": (0.709, 0.886, 24.7),
        },
    ),
    OtherTable(
        "DocReranker on MMDocIR, 5 candidates of ColQwen2",
        "Published: DocReranker, a reproduction of MM-R5's recipe with another teacher, 7,200 SFT examples and "
        "768 GRPO questions, at 512 visual tokens per page, on all 1,658 questions.",
        ("macro recall@1",),
        {"base model": (0.6109,), "SFT": (0.6389,), "SFT + GRPO": (0.6572,)},
    ),
    OtherTable(
        "Pointwise rerankers on ViDoRe V3 and JinaVDR",
        "Published by the models' authors (arXiv 2601.04720 and the model cards); nDCG × 100 with each author's "
        "own first stage. `python -m mmr5_train.mteb` measures any reranker on ViDoRe V3 with fixed candidates.",
        ("ViDoRe V3", "JinaVDR"),
        {
            "Qwen3-VL-Reranker-2B": (60.8, 80.9),
            "Qwen3-VL-Reranker-8B": (66.7, 83.6),
            "jina-reranker-m0": (57.8, 82.2),
        },
    ),
)
