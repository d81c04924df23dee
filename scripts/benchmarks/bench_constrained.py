"""Measures constrained decoding with the tokenizer of Qwen2.5, next to xgrammar.

    python scripts/benchmarks/bench_constrained.py      # make bench-constrained

Writes outputs/bench/constrained.json: the seconds that the vocabulary and a grammar take once, and the
milliseconds that a decoding step takes for a batch, in the think block and in the list. The scores are random.
This project's step copies the scores and masks them; xgrammar's fills the bit mask of each row, without applying
it. Its grammar of permutations has a rule for each set of remaining pages, so it has at most eight pages here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import xgrammar
from bench_common import OUTPUT, argument_parser, at_most, machine, print_targets, write_results
from standin import tokenizer_folder
from transformers import AutoTokenizer

from mmr5_train.inference.constrained import PermutationLogitsProcessor
from mmr5_train.inference.vocabulary import Vocabulary
from mmr5_train.ranking.answer_constraints import MAX_EXACT_PAGES, CompletionState, Part, gbnf_grammar

LOGITS = 152_064  # of the 7B model
LIMIT = 2_048  # new tokens
THOUGHT = "<think>Image 1: a table of"
LIST = "<think></think><answer>[1, "


def seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return median(times)


def step_ms(vocabulary: Vocabulary, pages: int, batch: int, text: str, steps: int) -> float:
    """The median milliseconds of a decoding step after `text`: random scores, the best token is chosen."""
    processor = PermutationLogitsProcessor(
        vocabulary, [pages] * batch, think=True, prompt_length=1, max_new_tokens=LIMIT
    )
    state: CompletionState | None = CompletionState.start(pages, think=True)
    for byte in text.encode():
        assert state is not None
        state = state.advance(bytes([byte]))
    assert state is not None
    processor.states = [state] * batch
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, LOGITS, generator=generator)
    ids = torch.zeros(batch, 1, dtype=torch.long)  # prompt_length 1: nothing is generated yet
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        masked = processor(ids, scores)
        times.append(time.perf_counter() - started)
        ids = torch.cat([ids, masked.argmax(1, keepdim=True)], dim=1)
        scores = scores.roll(1, dims=1)  # other scores, without the time to draw them
        if processor.states[0].part is Part.ended:
            break
    return 1e3 * median(times)


def xgrammar_figures(tokenizer: Any, pages: int, batch: int) -> dict[str, float]:
    """Seconds to compile the grammar of `pages`, and milliseconds to fill the masks of a batch in the list."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=LOGITS)
    grammar = xgrammar.Grammar.from_ebnf(gbnf_grammar(pages, think=True))
    compile_s = seconds(
        lambda: xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False).compile_grammar(grammar)
    )
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar)
    matchers = [xgrammar.GrammarMatcher(compiled) for _ in range(batch)]
    for matcher in matchers:
        if not matcher.accept_string(LIST):
            raise SystemExit(f"xgrammar does not accept {LIST!r}")
    mask = xgrammar.allocate_token_bitmask(batch, LOGITS)

    def fill() -> None:
        for row, matcher in enumerate(matchers):
            matcher.fill_next_token_bitmask(mask, row)

    return {"compile_s": round(compile_s, 3), "masks_ms": round(1e3 * seconds(fill, 20), 3)}


def measure(batch: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    vocabulary = Vocabulary(tokenizer)
    copied = torch.randn(batch, LOGITS)
    return {
        "batch": batch,
        "vocabulary_s": round(seconds(lambda: Vocabulary(tokenizer), 3), 3),
        "copy_of_scores_ms": round(1e3 * seconds(copied.clone, 20), 2),
        "think_step_ms": round(step_ms(vocabulary, 20, batch, THOUGHT, 30), 2),
        "list_step_ms": round(step_ms(vocabulary, 20, batch, LIST, 60), 2),
        "list_step_8_pages_ms": round(step_ms(vocabulary, MAX_EXACT_PAGES, batch, LIST, 60), 2),
        "xgrammar_8_pages": xgrammar_figures(tokenizer, MAX_EXACT_PAGES, batch),
    }


def main() -> None:
    parser: argparse.ArgumentParser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=64, help="rows that are decoded together")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"machine": machine(args.threads)} | measure(args.batch)
    targets = [at_most("seconds to read the vocabulary", results["vocabulary_s"], 3.0)]
    write_results(OUTPUT / "constrained.json", results, targets)
    for key, value in results.items():
        print(f"{key}: {value}")
    print_targets(targets)


if __name__ == "__main__":
    main()
