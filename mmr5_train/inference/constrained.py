"""Constrained decoding: every completion ends in a permutation of the prompt's pages.

The model's reasoning in the think block is free. After it, only tokens that lead to a complete answer stay
possible (`mmr5_train.ranking.answer_constraints`), and the model chooses among them. When the remaining tokens are
needed for the answer, the think block is closed, so that `max_new_tokens` never cuts an answer off.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mmr5_train.common.files import InputError
from mmr5_train.ranking.answer_constraints import CompletionState, Phase, missing_think_close
from mmr5_train.ranking.prompt import THINK_CLOSE, render_completion
from mmr5_train.ranking.records import LocalId


class Vocabulary:
    """The texts of a tokenizer's tokens, and which tokens may continue a completion."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = sorted(tokenizer.all_special_ids)
        self.end_id: int = tokenizer.eos_token_id
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        special = set(self.special_ids)
        self.texts: list[str] = ["" if i in special else text for i, text in enumerate(texts)]
        # Tokens that can complete THINK_CLOSE, and tokens that contain all of it.
        self.closing_ids = [i for i, text in enumerate(self.texts) if ">" in text]
        self.whole_closing_ids = [i for i in self.closing_ids if THINK_CLOSE in self.texts[i]]
        self.answer_tokens = cache(self._answer_tokens)
        self.max_answer_length = cache(self._max_answer_length)

    def allowed(self, state: CompletionState) -> list[int]:
        """The tokens that may come next, for a completion that is not in its think block or must finish."""
        if state.phase is Phase.ended:
            return [self.end_id]
        answer_token_ids, character_ids = self.answer_tokens(state.n)
        allowed = [i for i in answer_token_ids if state.allows(self.texts[i])]
        allowed = allowed or [i for i in character_ids if state.allows(self.texts[i])]
        if not state.must_finish:
            return allowed
        # The model still chooses the pages. Between two page ids, the longest token needs the fewest steps.
        digit_ids = [i for i in allowed if any(c.isdigit() for c in self.texts[i])]
        other_ids = [i for i in allowed if i not in digit_ids]
        return digit_ids + sorted(other_ids, key=lambda i: (len(self.texts[i].strip()), len(self.texts[i])))[-1:]

    def forbidden(self, state: CompletionState) -> list[int]:
        """The tokens that may not come next in a think block: special tokens, and closings with a wrong answer.

        Such a closing is a token that completes THINK_CLOSE and continues with text that can't begin an answer.
        """
        is_partly_closed = missing_think_close(state.text) != THINK_CLOSE
        closing_ids = self.closing_ids if is_partly_closed else self.whole_closing_ids
        return self.special_ids + [i for i in closing_ids if not state.allows(self.texts[i])]

    def _answer_tokens(self, n: int) -> tuple[list[int], list[int]]:
        """The tokens of tokenized answers on `n` pages, and the tokens of their single characters."""
        ids = [LocalId(i) for i in range(1, n + 1)]
        # Rotations of the list: each id occurs after "[" and after ", ".
        answers = [render_completion(None, ids[i:] + ids[:i]) for i in range(n)]
        completion = render_completion("", ids)
        texts = [*answers, completion, f"{THINK_CLOSE}{answers[0]}", f"{THINK_CLOSE}\n{answers[0]}"]
        answer_token_ids, character_ids = (
            sorted({i for ids in self.tokenizer(pieces, add_special_tokens=False)["input_ids"] for i in ids})
            for pieces in (texts, sorted(set(completion)))
        )
        return answer_token_ids, character_ids

    def _max_answer_length(self, n: int) -> int:
        """The largest number of tokens that a completion needs from its think block to its end, if it must finish.

        The end token is included.
        """
        state, count = CompletionState(n, Phase.thinking, must_finish=True), 1
        while state.phase is not Phase.ended:
            # Spelling page ids digit by digit takes the most tokens.
            choices = sorted(self.allowed(state), key=lambda i: (not self.texts[i].isdigit(), len(self.texts[i])))
            state.append(self.texts[choices[0]])
            count += 1
        return count + len(THINK_CLOSE)  # the think block may break off inside a partial THINK_CLOSE


class PermutationLogitsProcessor(LogitsProcessor):
    """Constrains each row of a batch to the grammar of `answer_constraints`.

    It holds the state of each row, so use an instance for one call of `generate` only.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        page_counts: Sequence[int],
        *,
        think: bool,
        prompt_length: int,
        max_new_tokens: int,
    ) -> None:
        """`page_counts[r]` is the number of pages in row r's prompt.

        Raises `InputError` if `max_new_tokens` is less than an answer may need.
        """
        needed = vocabulary.max_answer_length(max(page_counts))
        if max_new_tokens < needed:
            raise InputError(
                f"max_new_tokens: a list of {max(page_counts)} pages takes up to {needed} tokens, "
                f"found {max_new_tokens}"
            )
        self.vocabulary, self.prompt_length, self.max_new_tokens = vocabulary, prompt_length, max_new_tokens
        first_phase = Phase.opening if think else Phase.answering
        self.states = [CompletionState(n, first_phase, must_finish=not think) for n in page_counts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sets the scores of forbidden tokens to −inf: (rows, tokens so far) and (rows, V) → (rows, V)."""
        generated = input_ids.shape[1] - self.prompt_length
        last_tokens = input_ids[:, -1].tolist() if generated else []
        masked = scores.clone()
        for i, state in enumerate(self.states):
            if last_tokens:
                state.append(self.vocabulary.texts[last_tokens[i]])
            if self.max_new_tokens - generated <= self.vocabulary.max_answer_length(state.n):
                state.force_finish()
            if state.phase is Phase.thinking and not state.must_finish:
                masked[i, self.vocabulary.forbidden(state)] = -torch.inf
            else:
                allowed = self.vocabulary.allowed(state)
                masked[i] = -torch.inf
                masked[i, allowed] = scores[i, allowed]
        return masked
