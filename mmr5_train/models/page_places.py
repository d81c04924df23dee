"""A ranking decoded place by place after one reading of the prompt (`logits_order: place_by_place`).

For each place, one short forward pass gives the probabilities of all pages that remain, as in
`mmr5_train.models.page_scores`, and the most probable one takes the place. A ranking of n pages costs the prompt
and n − 1 short passes. The other order of mode logits, by the probability of the first place, costs the prompt
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmr5_train.models.page_features import EncodedPrompts
from mmr5_train.models.page_scores import id_branches, next_branches, next_token_log_probs


def place_by_place(model: Any, tokenizer: Any, prompt: EncodedPrompts) -> list[int]:
    """The ids of the pages of one prompt, from 1, best first."""
    [n] = prompt.page_counts
    remaining, order = list(range(1, n + 1)), list[int]()
    reader = _Reader(model, prompt) if n > 1 else None
    branches = id_branches(tokenizer, n)
    opening = branches.opening
    while reader is not None and len(remaining) > 1:
        values = reader.log_probs(opening, [branches.tokens[i - 1] for i in remaining])
        chosen = remaining.pop(int(values.argmax()))
        order.append(chosen)
        id_tokens = branches.tokens[chosen - 1][:-1]
        branches = next_branches(tokenizer, n)
        opening = (*id_tokens, *branches.opening)
    return order + remaining


class _Reader:
    """A prompt and the beginning of its answer, in the model's cache."""

    def __init__(self, model: Any, prompt: EncodedPrompts) -> None:
        self.model, self.length = model, len(prompt.ids[0])
        [shared] = prompt.shared(model)
        self.axes, self.next_position = len(shared.positions), shared.next_position
        inputs = prompt.padded(pad_id=0)
        del inputs["attention_mask"]  # all ones: with it, some models give positions to the whole sequence
        self.cache = model.base_model(**inputs, use_cache=True).past_key_values

    def log_probs(self, opening: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        """(rows,) the log-probability of each row after `opening`, which becomes part of the cache."""
        read = list(opening)
        depths, owners = list(range(len(opening))), [-1] * len(opening)  # owner: the row of a token; -1: all rows
        predictors, targets, of_row = list[int](), list[int](), list[int]()
        for number, row in enumerate(rows):
            predictors += [len(opening) - 1, *range(len(read), len(read) + len(row) - 1)]
            targets += row
            of_row += [number] * len(row)
            depths += range(len(opening), len(opening) + len(row) - 1)
            owners += [number] * (len(row) - 1)
            read += row[:-1]
        device = self.model.device
        owner_S, past = torch.tensor(owners, device=device), self.cache.get_seq_length()
        mask_SL = torch.ones(len(read), past + len(read), dtype=torch.bool, device=device)
        mask_SL[:, past:] = ((owner_S == -1) | (owner_S[:, None] == owner_S)).tril()
        positions_S = torch.tensor(depths, device=device) + self.next_position
        outputs = self.model.base_model(
            input_ids=torch.tensor([read], device=device),
            attention_mask=mask_SL[None, None],
            position_ids=positions_S[None] if self.axes == 1 else positions_S.expand(self.axes, 1, -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.crop(len(opening) - len(read))
        self.next_position += len(opening)
        tokens = torch.tensor(targets, device=device)
        values = next_token_log_probs(outputs.last_hidden_state[0, predictors], tokens, self.model)
        return torch.zeros(len(rows), device=values.device).index_add(
            0, torch.tensor(of_row, device=values.device), values
        )
