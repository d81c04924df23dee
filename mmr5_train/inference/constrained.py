"""Constrained decoding: whatever a model would write, its completion ends in a permutation of the pages.

Inside the think block the model is free. Behind it only tokens stay possible that lead to a whole answer
(`ranking.answer_constraints`), and the model chooses among them. A thought that leaves no more room than the
answer needs is closed there, so `max_new_tokens` never cuts an answer off.
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
    """The texts of a tokenizer's tokens, and which of them may stand in an answer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = sorted(tokenizer.all_special_ids)
        self.end: int = tokenizer.eos_token_id
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        hidden = set(self.special)
        self.texts: list[str] = ["" if i in hidden else text for i, text in enumerate(texts)]
        self.closing = [i for i, text in enumerate(self.texts) if ">" in text]
        self.closing_alone = [i for i in self.closing if THINK_CLOSE in self.texts[i]]
        self.usual, self.needed = cache(self._usual), cache(self._needed)

    def allowed(self, row: CompletionState) -> list[int]:
        """The tokens that may come next, where those are few: anywhere but in a thought that has time."""
        if row.phase is Phase.ended:
            return [self.end]
        usual, characters = self.usual(row.n)
        fitting = [i for i in usual if row.allows(self.texts[i])]
        fitting = fitting or [i for i in characters if row.allows(self.texts[i])]
        if not row.must_finish:
            return fitting
        # A page is the model's choice; between two pages, the longest token is the shortest way.
        chosen = [i for i in fitting if any(c.isdigit() for c in self.texts[i])]
        between = [i for i in fitting if i not in chosen]
        return chosen + sorted(between, key=lambda i: (len(self.texts[i].strip()), len(self.texts[i])))[-1:]

    def banned(self, row: CompletionState) -> list[int]:
        """The tokens that may not come next in a thought: ends, and what would close it with a wrong beginning."""
        begun = missing_think_close(row.text) != THINK_CLOSE
        closing = self.closing if begun else self.closing_alone
        return self.special + [i for i in closing if not row.allows(self.texts[i])]

    def _usual(self, n: int) -> tuple[list[int], list[int]]:
        """The tokens that answers on n pages are made of as the model learned them; those of single characters."""
        pages = [LocalId(i) for i in range(1, n + 1)]
        answers = [render_completion(None, pages[i:] + pages[:i]) for i in range(n)]  # each page first, and later
        whole = render_completion("", pages)
        texts = [*answers, whole, f"{THINK_CLOSE}{answers[0]}", f"{THINK_CLOSE}\n{answers[0]}"]
        usual, characters = (
            sorted({i for ids in self.tokenizer(pieces, add_special_tokens=False)["input_ids"] for i in ids})
            for pieces in (texts, sorted(set(whole)))
        )
        return usual, characters

    def _needed(self, n: int) -> int:
        """Tokens that a row that must finish takes at most from a thought to its end, the end token included."""
        row, count = CompletionState(n, Phase.thinking, must_finish=True), 1
        while row.phase is not Phase.ended:
            # Page by page, digit by digit: no choice of pages takes more tokens.
            choices = sorted(self.allowed(row), key=lambda i: (not self.texts[i].isdigit(), len(self.texts[i])))
            row.append(self.texts[choices[0]])
            count += 1
        return count + len(THINK_CLOSE)  # a thought may end in the middle of its own closing


class ListOfAllPages(LogitsProcessor):
    """Holds one batch of completions to the grammar above. For one call of `generate`."""

    def __init__(
        self, vocabulary: Vocabulary, pages: Sequence[int], *, think: bool, prompt_length: int, max_new_tokens: int
    ) -> None:
        """`pages[r]` is how many pages row r's prompt holds.

        Raises `InputError` where `max_new_tokens` does not suffice for the answer alone.
        """
        needed = vocabulary.needed(max(pages))
        if max_new_tokens < needed:
            raise InputError(
                f"max_new_tokens: a list of {max(pages)} pages takes up to {needed} tokens, found {max_new_tokens}"
            )
        self.vocabulary, self.prompt_length, self.max_new_tokens = vocabulary, prompt_length, max_new_tokens
        begin = Phase.opening if think else Phase.answering
        self.rows = [CompletionState(n, begin, must_finish=not think) for n in pages]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, tokens so far) ids and (rows, V) scores → (rows, V) scores, −inf where a token may not come."""
        generated = input_ids.shape[1] - self.prompt_length
        last = input_ids[:, -1].tolist() if generated else []
        texts, out = self.vocabulary.texts, scores.clone()
        for i, row in enumerate(self.rows):
            if last:
                row.append(texts[last[i]])
            if self.max_new_tokens - generated <= self.vocabulary.needed(row.n):
                row.force_finish()
            if row.phase is Phase.thinking and not row.must_finish:
                out[i, self.vocabulary.banned(row)] = -torch.inf
            else:
                allowed = self.vocabulary.allowed(row)
                out[i] = -torch.inf
                out[i, allowed] = scores[i, allowed]
        return out
