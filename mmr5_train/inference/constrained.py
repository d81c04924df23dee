"""Constrained decoding: every completion ends in a permutation of the prompt's pages.

The model's reasoning in the think block is free. After it, only tokens that lead to a complete answer stay
possible (`mmr5_train.ranking.answer_constraints`), and the model chooses among them. When the remaining tokens are
needed for the answer, the think block is closed, so that `max_new_tokens` never cuts an answer off. A completion
that the model would write in this form within the limit does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from mmr5_train.common.files import InputError
from mmr5_train.inference.vocabulary import IntArray, Vocabulary
from mmr5_train.ranking.answer_constraints import CompletionState, Part
from mmr5_train.ranking.prompt import ANSWER_CLOSE, render_completion
from mmr5_train.ranking.records import LocalId


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
        max_new_tokens: int | Sequence[int],
    ) -> None:
        """`page_counts[r]` pages are in row r's prompt. `max_new_tokens` limits each row, or all rows alike.

        Raises `InputError` if a limit is less than an answer may need.
        """
        self.vocabulary, self.prompt_length = vocabulary, prompt_length
        self.limits = [max_new_tokens] * len(page_counts) if isinstance(max_new_tokens, int) else max_new_tokens
        self.states = [CompletionState.start(n, think=think) for n in page_counts]
        self.cut_off = [False] * len(page_counts)
        """For each row, whether the limit closed the think block although another token was more likely."""
        for n, limit in dict(zip(page_counts, self.limits, strict=True)).items():
            needed = vocabulary.fewest_tokens(CompletionState.start(n, think=think))
            if limit < needed:
                raise InputError(f"max_new_tokens: a list of {n} pages takes up to {needed} tokens, found {limit}")
        self._closing_tokens = [
            vocabulary.fewest_tokens(state._replace(part=Part.thinking)) for state in self.states
        ]
        self._answer_bytes = [
            len(render_completion("", [LocalId(i) for i in sorted(state.unused)])) for state in self.states
        ]
        self._textless_ids: Tensor | None = None
        self._finished: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sets the scores of forbidden tokens to −inf: (rows, tokens so far) and (rows, V) → (rows, V)."""
        generated = input_ids.shape[1] - self.prompt_length
        if generated:
            self._append(input_ids[:, -1].tolist())
        if self._textless_ids is None:  # the model may have more rows of logits than the tokenizer has tokens
            ids = [*self.vocabulary.textless_ids, *range(len(self.vocabulary.tokens), scores.shape[1])]
            self._textless_ids = torch.tensor(ids, device=scores.device)
        masked = scores.index_fill(1, self._textless_ids, -torch.inf)
        self._apply_grammar(masked, scores)
        self._apply_limit(masked, [limit - generated - 1 for limit in self.limits])
        return masked

    def _append(self, token_ids: list[int]) -> None:
        for row, token in enumerate(token_ids):
            if row in self._finished:
                continue
            state = self.states[row].advance(self._bytes(token))
            if state is None:
                raise ValueError(f"token {token} was generated, which the constraint does not allow")
            self.states[row] = state

    def _apply_grammar(self, masked: Tensor, scores: Tensor) -> None:
        """Masks the tokens that the grammar does not allow next, whatever the remaining length."""
        kept = {
            row: self.vocabulary.allowed(s) for row, s in enumerate(self.states) if s.part is not Part.thinking
        }
        removed = {row: self.vocabulary.forbidden(s) for row, s in enumerate(self.states) if row not in kept}
        # Few operations on the device for all rows, instead of some for each row.
        if kept:
            index = _index(kept, scores.device)
            masked[torch.tensor(list(kept), device=scores.device)] = -torch.inf
            masked[index] = scores[index]
        if any(len(ids) for ids in removed.values()):
            masked[_index(removed, scores.device)] = -torch.inf

    def complete_lists(self, input_ids: Tensor) -> dict[int, str]:
        """The rows whose list of pages their last token completes → the text that is missing behind it.

        Such rows have finished: what follows in them is padding.
        """
        rows = {}
        tokens: list[int] | None = None
        for row, state in enumerate(self.states):
            if len(state.unused) <= 1 and state.part in (Part.page_id, Part.separator):
                tokens = input_ids[:, -1].tolist() if tokens is None else tokens  # one transfer from the device
                after = state.advance(self._bytes(tokens[row]))
                if after is not None and after.part is Part.answer_close:
                    rows[row] = ANSWER_CLOSE[len(after.typed) :]
                    self.states[row] = CompletionState(Part.ended, frozenset())
                    self._finished.add(row)
        return rows

    def _bytes(self, token: int) -> bytes:
        """The token's text. Special tokens have none: they end or pad a completion."""
        return self.vocabulary.tokens[token] if token < len(self.vocabulary.tokens) else b""

    def _apply_limit(self, masked: Tensor, remaining_tokens: Sequence[int]) -> None:
        """Masks the tokens after which the remaining ones might not suffice to complete the answer."""
        for row, (state, remaining) in enumerate(zip(self.states, remaining_tokens, strict=True)):
            if row in self._finished:
                continue
            is_thinking = state.part is Part.thinking
            # A token has at least one byte. In a think block, no token leads further from the end than its start.
            if remaining >= (self._closing_tokens if is_thinking else self._answer_bytes)[row]:
                continue
            allowed = self.vocabulary.within_limit(state, remaining)
            if not is_thinking and len(allowed) == len(self.vocabulary.allowed(state)):
                continue
            ids = torch.from_numpy(allowed).to(masked.device)
            if state.part <= Part.thinking and int(masked[row].argmax()) not in allowed:
                self.cut_off[row] = True
            kept = masked[row, ids]
            masked[row] = -torch.inf
            masked[row, ids] = kept


def _index(ids_of_rows: Mapping[int, IntArray], device: torch.device) -> tuple[Tensor, Tensor]:
    """The index (rows, token ids) of the elements `ids_of_rows[row]` of each row."""
    rows = np.repeat(list(ids_of_rows), [len(ids) for ids in ids_of_rows.values()])
    ids = np.concatenate(list(ids_of_rows.values()))
    return torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)
