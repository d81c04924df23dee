"""What a completion may still become, so that it ends in a list of its pages with each of them once.

    reason:  "<think>" anything "</think>" [white space] "<answer>[" permutation of 1..n "]</answer>"
    direct:  "<answer>[" permutation of 1..n "]</answer>"

Constrained decoding (`mmr5_train.inference.constrained`) asks here what may follow. What comes out is what
`render_completion` writes, so the answer grammar reads it as a complete permutation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import combinations

from mmr5_train.ranking.prompt import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

LIST_OPEN = f"{ANSWER_OPEN}["
EXACT = 8
"""Pages up to which a grammar for servers holds exactly the permutations."""
_GAP = 2  # characters of white space between the think block and the answer, at most


def is_beginning(text: str, n: int) -> bool:
    """Whether `text` begins an answer block with a permutation of 1..n, or is a whole one."""
    if len(text) < len(LIST_OPEN) or not text.startswith(LIST_OPEN):
        return LIST_OPEN.startswith(text)
    listed, bracket, after = text[len(LIST_OPEN) :].partition("]")
    *ended, last = listed.split(",")
    if bracket:
        ended.append(last)
    left = {str(i) for i in range(1, n + 1)}
    for place, entry in enumerate(ended):
        number = _number(entry, place)
        if number not in left:
            return False
        left.remove(number)
    if bracket:
        return not left and ANSWER_CLOSE.startswith(after)
    if last == "":  # before an entry
        return bool(left)
    number = _number(last, len(ended))
    return number is not None and any(i.startswith(number) for i in left)


def _number(entry: str, place: int) -> str | None:
    """The digits of an entry; a single space stands before all but the first."""
    if place == 0:
        return entry
    return entry[1:] if entry.startswith(" ") else None


class Phase(Enum):
    opening = 0
    thinking = 1
    answering = 2
    ended = 3


@dataclass
class Progress:
    """Where one completion stands. `text` is what its phase has brought; of a thought, its last characters."""

    n: int
    phase: Phase
    text: str = ""
    hurried: bool = False
    """Whether the tokens left just suffice: the thought is closed, and no way round is taken."""
    cut_off: bool = False
    """Whether it was closed before its time."""

    def hurry(self) -> None:
        """Says that the tokens left just suffice."""
        if not self.hurried:
            self.hurried, self.cut_off = True, self.phase in (Phase.opening, Phase.thinking)

    def add(self, piece: str) -> None:
        """Goes on by the text of a token that was taken."""
        self.text += piece
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

    def takes(self, piece: str) -> bool:
        """Whether a token with this text may come next."""
        text = self.text + piece
        if self.phase is Phase.opening:
            return THINK_OPEN.startswith(text) or text.startswith(THINK_OPEN)
        if self.phase is Phase.thinking:
            _, close, after = text.partition(THINK_CLOSE)
            if close:
                return self._begins(after)
            return not self.hurried or rest_of_close(self.text).startswith(piece)
        return self.phase is Phase.answering and self._begins(text)

    def _begins(self, text: str) -> bool:
        answer = text.lstrip(" \n")
        return len(text) - len(answer) <= _GAP and is_beginning(answer, self.n)


def rest_of_close(text: str) -> str:
    """What is missing of `THINK_CLOSE` behind a text that may end in its beginning."""
    for length in range(min(len(THINK_CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(THINK_CLOSE[:length]):
            return THINK_CLOSE[length:]
    return THINK_CLOSE


def as_grammar(n: int) -> str:
    """The answer block as a context-free grammar in GBNF, the notation that servers share (xgrammar, llama.cpp).

    Up to `EXACT` pages exactly the permutations, by a rule for each set of pages that are left; their number
    doubles with each page, so that more pages get a list of n ids, in which one may stand twice.
    """
    if n > EXACT:
        ids = " | ".join(f'"{i}"' for i in range(1, n + 1))
        more = ' ", " id' * (n - 1)
        return f'root ::= "{LIST_OPEN}" id{more} "]{ANSWER_CLOSE}"\nid ::= {ids}\n'
    everything = frozenset(range(1, n + 1))
    rules = [f'root ::= "{LIST_OPEN}" {_rule(everything)} "]{ANSWER_CLOSE}"']
    for length in range(n, 0, -1):
        for left in map(frozenset, combinations(range(1, n + 1), length)):
            ways = (f'"{i}"' + (f' ", " {_rule(left - {i})}' if length > 1 else "") for i in sorted(left))
            rules.append(f"{_rule(left)} ::= {' | '.join(ways)}")
    return "\n".join(rules) + "\n"


def _rule(left: frozenset[int]) -> str:
    return "left-" + "-".join(map(str, sorted(left)))
