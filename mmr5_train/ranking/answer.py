"""The one answer grammar: what a completion says, what is wrong with it, and the full order made of it.

    completion = ["<think>" reasoning "</think>"] "<answer>" "[" id {"," id} "]" "</answer>"

Rewards, evaluation, trace verification and inference all read completions here, so they can't disagree.
Everything is found by plain string search and one anchored pattern an entry: no eval, and linear time
whatever the text holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mmr5_train.ranking.prompt import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from mmr5_train.ranking.records import LocalId, ModelAnswer

MAX_ENTRIES = 10_000
"""A longer list is not read: no prompt holds as many pages, and it would be long work for nothing."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>")

# 18 digits fit 64 bits. Longer numbers are no page ids, and Python itself refuses to read very long ones.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class Defect(StrEnum):
    """What can be wrong with a completion, in the order defects are reported."""

    no_think = "no_think"
    """No closed think block, where one is expected."""
    no_answer = "no_answer"
    """No closed answer block outside the reasoning."""
    not_a_list = "not_a_list"
    """The answer block holds no bracketed list of at most `MAX_ENTRIES` entries."""
    not_integers = "not_integers"
    """An entry of the list is not an integer."""
    empty = "empty"
    """The list has no entries (`missing_ids` is then not reported besides)."""
    duplicates = "duplicates"
    out_of_range = "out_of_range"
    missing_ids = "missing_ids"
    cut_off = "cut_off"
    """Generation ended at the length limit, as the caller says."""


ORDER_PRESERVING_DEFECTS = frozenset({Defect.no_think, Defect.cut_off})
"""Defects that leave the order whole: an answer with no other is a complete permutation of 1..n."""


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A completion for `n` pages, as read.

    `ids` are the integers as written, in range or not, empty where there is no list of integers.
    `structure_valid` is the reference's structure validity (MM-R5, section 3.3): the whole text is the
    think block, then the answer block with a bracketed list of integers; white space and end tokens around
    and between are no fault. Where no think block is expected, the whole text is the answer block.
    """

    n: int
    think: str | None
    ids: tuple[int, ...]
    defects: tuple[Defect, ...]
    structure_valid: bool

    @property
    def is_complete_permutation(self) -> bool:
        """Each of 1..n exactly once. Says nothing about the text around the list."""
        return ORDER_PRESERVING_DEFECTS.issuperset(self.defects)


def parse_answer(
    text: str, n: int, *, reasoning: str | None = None, cut_off: bool = False, expect_think: bool = True
) -> ParsedAnswer:
    """Reads a completion.

    An answer block inside reasoning (a think block, closed or not) is a draft and never counts. Of several
    outside it the last closed one counts: a model that goes on after an answer does so to correct it. Such
    a text is not valid in structure, so the correction still costs.

    Args:
        text: the completion, or what is left of it where a server returned the think block apart.
        n: how many pages the prompt held.
        reasoning: that think block (`reasoning_content`); None or "" where there was none.
        cut_off: whether generation ended at the length limit.
        expect_think: False for a model that answers without a think block.
    """
    if n < 1:
        raise ValueError(f"an answer ranks at least one page, got n = {n}")
    outside, blocks, unclosed = _split_reasoning(text)
    think = reasoning or (blocks[0] if blocks else None)
    found = next((block for part in reversed(outside) if (block := _last_answer(part)) is not None), None)
    ids, defects = ((), [Defect.no_answer]) if found is None else _read_list(found)
    is_list = not defects
    if is_list:
        defects = _order_defects(ids, n)
    if think is None and expect_think:
        defects.insert(0, Defect.no_think)
    if cut_off:
        defects.append(Defect.cut_off)

    if reasoning or not expect_think:
        around, thoughts_fit = outside, not blocks and bool(reasoning) == expect_think
    else:
        around, thoughts_fit = outside[1:], len(blocks) == 1 and not outside[0].strip()
    alone = len(around) == 1 and _without_end_tokens(around[0]) == f"{ANSWER_OPEN}{found}{ANSWER_CLOSE}"
    return ParsedAnswer(n, think, ids, tuple(defects), is_list and thoughts_fit and not unclosed and alone)


def complete_order(ids: Iterable[int], n: int) -> tuple[LocalId, ...]:
    """A full order of 1..n from any ids.

    The rule: the first occurrence of each id in 1..n, in the order given; then the ids that are missing,
    ascending, which is their order in the prompt. From no ids it makes the order of the prompt.
    """
    order = dict.fromkeys(i for i in ids if 1 <= i <= n)
    order.update(dict.fromkeys(range(1, n + 1)))
    return tuple(LocalId(i) for i in order)


def to_model_answer(
    text: str,
    n: int,
    *,
    reasoning: str | None = None,
    cut_off: bool = False,
    expect_think: bool = True,
    counts: Mapping[str, int] | None = None,
) -> ModelAnswer:
    """A completion as the record that evaluation keeps: arguments as for `parse_answer`, `counts` its tokens.

    Reasoning that was returned apart is put back in front, so the record always holds the whole completion.
    """
    answer = parse_answer(text, n, reasoning=reasoning, cut_off=cut_off, expect_think=expect_think)
    return ModelAnswer(
        completion=f"{THINK_OPEN}{reasoning}{THINK_CLOSE}{text}" if reasoning else text,
        order=complete_order(answer.ids, n),
        defects=tuple(defect.value for defect in answer.defects),
        **(counts or {}),
    )


def _split_reasoning(text: str) -> tuple[list[str], list[str], bool]:
    """The parts outside think blocks, the think blocks, and whether one was left open (its text is dropped)."""
    outside: list[str] = []
    blocks: list[str] = []
    at = 0
    while (start := text.find(THINK_OPEN, at)) >= 0:
        outside.append(text[at:start])
        end = text.find(THINK_CLOSE, start)
        if end < 0:
            return outside, blocks, True
        blocks.append(text[start + len(THINK_OPEN) : end])
        at = end + len(THINK_CLOSE)
    outside.append(text[at:])
    return outside, blocks, False


def _last_answer(text: str) -> str | None:
    """The content of the last closed answer block."""
    start = text.rfind(ANSWER_OPEN, 0, max(text.rfind(ANSWER_CLOSE), 0))
    if start < 0:
        return None
    start += len(ANSWER_OPEN)
    return text[start : text.find(ANSWER_CLOSE, start)]


def _read_list(content: str) -> tuple[tuple[int, ...], list[Defect]]:
    content = content.strip()
    inner = content[1:-1]
    if len(content) < 2 or content[0] != "[" or content[-1] != "]" or inner.count(",") >= MAX_ENTRIES:
        return (), [Defect.not_a_list]
    if not inner.strip():
        return (), []
    entries = [entry.strip() for entry in inner.split(",")]
    if not all(_INTEGER.fullmatch(entry) for entry in entries):
        return (), [Defect.not_integers]
    return tuple(int(entry) for entry in entries), []


def _order_defects(ids: tuple[int, ...], n: int) -> list[Defect]:
    if not ids:
        return [Defect.empty]
    distinct = set(ids)
    in_range = {i for i in distinct if 1 <= i <= n}
    flags = {
        Defect.duplicates: len(distinct) < len(ids),
        Defect.out_of_range: len(in_range) < len(distinct),
        Defect.missing_ids: len(in_range) < n,
    }
    return [defect for defect, present in flags.items() if present]


def _without_end_tokens(text: str) -> str:
    """The text without surrounding white space and without the end and padding tokens behind it."""
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        token = next((token for token in END_TOKENS if text.endswith(token, 0, end)), None)
        if token is None:
            return text[:end].lstrip()
        end -= len(token)
