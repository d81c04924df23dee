"""Which text may follow a partial completion, so that it ends in a permutation of the page ids.

    reason:  "<think>" any text "</think>" [white space] "<answer>[" permutation of 1..n "]</answer>"
    direct:  "<answer>[" permutation of 1..n "]</answer>"

`CompletionState` follows one completion through these phases; `mmr5_train.inference.constrained` uses it to mask
tokens. `gbnf_grammar` gives inference servers the same answer block as a grammar. The text has the form that
`render_completion` writes, so the parser in `answer` always reads a complete permutation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import combinations

from mmr5_train.ranking.prompt import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

LIST_OPEN = f"{ANSWER_OPEN}["
MAX_EXACT_PAGES = 8
"""The largest number of pages for which `gbnf_grammar` accepts exactly the permutations."""
_MAX_GAP = 2  # white space characters allowed between the think block and the answer block


def is_answer_prefix(text: str, n: int) -> bool:
    """Whether `text` is a prefix of an answer block with a permutation of 1..n, or a complete block."""
    if len(text) < len(LIST_OPEN) or not text.startswith(LIST_OPEN):
        return LIST_OPEN.startswith(text)
    entries_text, bracket, after = text[len(LIST_OPEN) :].partition("]")
    *complete_entries, last = entries_text.split(",")
    if bracket:
        complete_entries.append(last)
    unused_ids = {str(i) for i in range(1, n + 1)}
    for index, entry in enumerate(complete_entries):
        number = _number(entry, index)
        if number not in unused_ids:
            return False
        unused_ids.remove(number)
    if bracket:
        return not unused_ids and ANSWER_CLOSE.startswith(after)
    if last == "":  # the text ends just before an entry
        return bool(unused_ids)
    number = _number(last, len(complete_entries))
    return number is not None and any(i.startswith(number) for i in unused_ids)


def _number(entry: str, index: int) -> str | None:
    """The number in a list entry, or None for wrong spacing: every entry but the first starts with one space."""
    if index == 0:
        return entry
    return entry[1:] if entry.startswith(" ") else None


class Phase(Enum):
    """The part of a completion that is being generated."""

    opening = 0
    """The opening tag of the think block."""
    thinking = 1
    """The reasoning, up to the closing tag of the think block."""
    answering = 2
    """The answer block."""
    ended = 3
    """The answer block is complete; only the end token may follow."""


@dataclass
class CompletionState:
    """The state of one completion for `n` pages during constrained decoding."""

    n: int
    phase: Phase
    text: str = ""
    """The text generated in the current phase. In `thinking`, only its last characters."""
    must_finish: bool = False
    """Whether the remaining tokens are needed for the answer: the think block must close now."""
    cut_off: bool = False
    """Whether `force_finish` closed the think block before the model did."""

    def force_finish(self) -> None:
        """Requires the completion to finish with as few tokens as possible."""
        if not self.must_finish:
            self.must_finish, self.cut_off = True, self.phase in (Phase.opening, Phase.thinking)

    def append(self, token_text: str) -> None:
        """Updates the state with the text of the token that was generated."""
        self.text += token_text
        if self.phase is Phase.opening and len(self.text) >= len(THINK_OPEN):
            self.phase, self.text = Phase.thinking, self.text[len(THINK_OPEN) :]
        if self.phase is Phase.thinking:
            before, close, after = self.text.partition(THINK_CLOSE)
            if close:
                self.phase, self.text = Phase.answering, after
            else:
                self.text = before[-len(THINK_CLOSE) :]
        if self.phase is Phase.answering and self.text.endswith(ANSWER_CLOSE):
            self.phase = Phase.ended

    def allows(self, token_text: str) -> bool:
        """Whether a token with this text may come next."""
        text = self.text + token_text
        if self.phase is Phase.opening:
            return THINK_OPEN.startswith(text) or text.startswith(THINK_OPEN)
        if self.phase is Phase.thinking:
            _, close, after = text.partition(THINK_CLOSE)
            if close:
                return self._may_answer(after)
            return not self.must_finish or missing_think_close(self.text).startswith(token_text)
        return self.phase is Phase.answering and self._may_answer(text)

    def _may_answer(self, text: str) -> bool:
        """Whether `text`, which follows the think block, is a prefix of an answer after a short gap."""
        answer = text.lstrip(" \n")
        return len(text) - len(answer) <= _MAX_GAP and is_answer_prefix(answer, self.n)


def missing_think_close(text: str) -> str:
    """The part of `THINK_CLOSE` that must still follow `text`. If `text` ends in a prefix of it: the rest."""
    for length in range(min(len(THINK_CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(THINK_CLOSE[:length]):
            return THINK_CLOSE[length:]
    return THINK_CLOSE


def gbnf_grammar(n: int) -> str:
    """The answer block for `n` pages as a grammar in GBNF, the notation of xgrammar and llama.cpp.

    Up to `MAX_EXACT_PAGES` pages the grammar accepts exactly the permutations: it has one rule for each set of ids
    that are still unused, so its size doubles with each page. For more pages it accepts any list of n ids in 1..n,
    which may repeat an id.
    """
    if n > MAX_EXACT_PAGES:
        ids = " | ".join(f'"{i}"' for i in range(1, n + 1))
        other_entries = ' ", " id' * (n - 1)
        return f'root ::= "{LIST_OPEN}" id{other_entries} "]{ANSWER_CLOSE}"\nid ::= {ids}\n'
    all_ids = frozenset(range(1, n + 1))
    rules = [f'root ::= "{LIST_OPEN}" {_rule_name(all_ids)} "]{ANSWER_CLOSE}"']
    for size in range(n, 0, -1):
        for unused in map(frozenset, combinations(range(1, n + 1), size)):
            options = (
                f'"{i}"' + (f' ", " {_rule_name(unused - {i})}' if size > 1 else "") for i in sorted(unused)
            )
            rules.append(f"{_rule_name(unused)} ::= {' | '.join(options)}")
    return "\n".join(rules) + "\n"


def _rule_name(unused: frozenset[int]) -> str:
    return "left-" + "-".join(map(str, sorted(unused)))
