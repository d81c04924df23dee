"""The answer parser: reads a completion, lists its defects, and makes a complete order from it.

    completion = ["<think>" reasoning "</think>"] "<answer>" "[" id {"," id} "]" "</answer>"

Rewards, evaluation, trace verification and inference all read completions here, so they always agree. The parser
uses plain string search and one anchored pattern per list entry: it never evaluates the text, and it takes linear
time on any input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mmr5_train.ranking.prompt import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from mmr5_train.ranking.records import LocalId, ModelAnswer

MAX_ENTRIES = 10_000
"""The parser does not read longer lists: no prompt holds that many pages, and reading them would waste time."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>")

# 18 digits fit in 64 bits. Longer numbers can't be page ids, and Python refuses to parse very long ones.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class Defect(StrEnum):
    """The defects that a completion can have, in the order in which they are reported."""

    no_think = "no_think"
    """A think block is expected, but there is no closed one."""
    no_answer = "no_answer"
    """There is no closed answer block outside the reasoning."""
    not_a_list = "not_a_list"
    """The answer block does not contain a bracketed list of at most `MAX_ENTRIES` entries."""
    not_integers = "not_integers"
    """An entry of the list is not an integer."""
    empty = "empty"
    """The list has no entries. `missing_ids` is not reported in addition."""
    duplicates = "duplicates"
    """An id occurs more than once."""
    out_of_range = "out_of_range"
    """An id is not in 1..n."""
    missing_ids = "missing_ids"
    """An id in 1..n does not occur."""
    cut_off = "cut_off"
    """Generation stopped at the length limit, or constrained decoding closed the think block to stay within it."""


ORDER_PRESERVING_DEFECTS = frozenset({Defect.no_think, Defect.cut_off})
"""Defects that do not affect the order: a completion without any other defect lists a permutation of 1..n."""


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """The content of one completion."""

    think: str | None
    """Content of the first think block, or None if there is no closed one."""
    ids: tuple[int, ...]
    """The integers of the list as generated, including ids out of 1..n; empty if there is no list of integers."""
    defects: tuple[Defect, ...]
    structure_valid: bool
    """Structure validity as in MM-R5 (section 3.3): the text consists of the think block and the answer block,
    which holds a bracketed list of integers. White space and end tokens around and between the blocks are
    allowed. If no think block is expected, the text consists of the answer block only."""

    @property
    def is_complete_permutation(self) -> bool:
        """Whether the list holds each of 1..n exactly once. The text around the list does not matter."""
        return ORDER_PRESERVING_DEFECTS.issuperset(self.defects)


def parse_answer(text: str, n: int, *, cut_off: bool = False, expect_think: bool = True) -> ParsedAnswer:
    """Parses a completion.

    An answer block inside the reasoning (a think block, closed or not) is a draft and never counts. If there are
    several answer blocks outside it, the last closed one counts, because a model that continues after an answer
    corrects it. The structure of such a text is not valid, so a reward for structure still penalizes it.

    Args:
        text: the completion, with its think block.
        n: number of pages in the prompt.
        cut_off: whether generation stopped at the length limit.
        expect_think: False for a model that answers without a think block.

    Raises:
        ValueError: if `n` is less than 1.
    """
    if n < 1:
        raise ValueError(f"an answer ranks at least one page, got n = {n}")
    outside, think_blocks, unclosed = _split_reasoning(text)
    think = think_blocks[0] if think_blocks else None
    answer_content = next((block for part in reversed(outside) if (block := _last_answer(part)) is not None), None)
    ids, defects = ((), [Defect.no_answer]) if answer_content is None else _read_list(answer_content)
    is_list = not defects
    if is_list:
        defects = _order_defects(ids, n)
    if think is None and expect_think:
        defects.insert(0, Defect.no_think)
    if cut_off:
        defects.append(Defect.cut_off)

    if not expect_think:
        answer_parts, thinks_as_expected = outside, not think_blocks
    else:
        answer_parts, thinks_as_expected = outside[1:], len(think_blocks) == 1 and not outside[0].strip()
    only_answer = (
        len(answer_parts) == 1
        and _without_end_tokens(answer_parts[0]) == f"{ANSWER_OPEN}{answer_content}{ANSWER_CLOSE}"
    )
    structure_valid = is_list and thinks_as_expected and not unclosed and only_answer
    return ParsedAnswer(think, ids, tuple(defects), structure_valid)


def complete_order(ids: Iterable[int], n: int) -> tuple[LocalId, ...]:
    """A complete order of 1..n, made from any ids.

    It consists of the first occurrence of each id in 1..n, in the given order, and then of the missing ids in
    ascending order, which is the prompt order. Without any ids it is the prompt order.
    """
    order = dict.fromkeys(i for i in ids if 1 <= i <= n)
    order.update(dict.fromkeys(range(1, n + 1)))
    return tuple(LocalId(i) for i in order)


def to_model_answer(
    text: str,
    n: int,
    *,
    cut_off: bool = False,
    expect_think: bool = True,
    counts: Mapping[str, int | None] | None = None,
) -> ModelAnswer:
    """Parses a completion into the record that evaluation stores.

    Takes the arguments of `parse_answer`. `counts` holds the token counts of `ModelAnswer` by field name.
    """
    answer = parse_answer(text, n, cut_off=cut_off, expect_think=expect_think)
    return ModelAnswer(
        completion=text,
        order=complete_order(answer.ids, n),
        defects=tuple(defect.value for defect in answer.defects),
        **(counts or {}),
    )


def _split_reasoning(text: str) -> tuple[list[str], list[str], bool]:
    """The text parts outside think blocks, the think blocks, and whether the last one is not closed.

    The content of a think block that is not closed is dropped.
    """
    outside: list[str] = []
    blocks: list[str] = []
    position = 0
    while (start := text.find(THINK_OPEN, position)) >= 0:
        outside.append(text[position:start])
        end = text.find(THINK_CLOSE, start)
        if end < 0:
            return outside, blocks, True
        blocks.append(text[start + len(THINK_OPEN) : end])
        position = end + len(THINK_CLOSE)
    outside.append(text[position:])
    return outside, blocks, False


def _last_answer(text: str) -> str | None:
    """The content of the last closed answer block, or None."""
    start = text.rfind(ANSWER_OPEN, 0, max(text.rfind(ANSWER_CLOSE), 0))
    if start < 0:
        return None
    start += len(ANSWER_OPEN)
    return text[start : text.find(ANSWER_CLOSE, start)]


def _read_list(content: str) -> tuple[tuple[int, ...], list[Defect]]:
    """The ids of a bracketed list, or no ids and the defect that makes the list unreadable."""
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
    """The text without surrounding white space and without the end and padding tokens at its end."""
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        token = next((token for token in END_TOKENS if text.endswith(token, 0, end)), None)
        if token is None:
            return text[:end].lstrip()
        end -= len(token)
