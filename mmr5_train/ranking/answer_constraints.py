"""Which text may follow a partial completion, so that it ends in a permutation of the page ids.

    reason:  "<think>" any text "</think>" "<answer>" "[" permutation of 1..n "]" "</answer>"
    direct:  "<answer>" "[" permutation of 1..n "]" "</answer>"

White space may precede each tag, bracket, comma and page id, and may end the completion. The parser in `answer`
reads every such text as a complete permutation of valid structure.

`CompletionState` follows one completion byte by byte, because a token may end within a tag, a number or a
character. `mmr5_train.inference.constrained` uses it to mask tokens. `gbnf_grammar` gives inference servers the
same grammar.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from mmr5_train.ranking.prompt import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

LIST_OPEN = f"{ANSWER_OPEN}["
MAX_EXACT_PAGES = 8
"""The largest number of pages for which `gbnf_grammar` accepts exactly the permutations."""
MAX_BLANKS = 4
"""The largest number of white space characters in one place, so that white space can't fill a completion."""
WHITE_SPACE = b" \n\r\t"


class Part(IntEnum):
    """The part of a completion that comes next."""

    think_open = 0
    thinking = 1
    """The reasoning and the closing tag of the think block."""
    answer_open = 2
    list_open = 3
    page_id = 4
    separator = 5
    """A comma or the closing bracket of the list."""
    answer_close = 6
    ended = 7
    """The answer block is complete."""


_LITERALS = {
    Part.think_open: THINK_OPEN.encode(),
    Part.answer_open: ANSWER_OPEN.encode(),
    Part.list_open: b"[",
    Part.answer_close: ANSWER_CLOSE.encode(),
}
_CLOSE = THINK_CLOSE.encode()


class CompletionState(NamedTuple):
    """The state of a completion during constrained decoding. It is immutable and hashable."""

    part: Part
    unused: frozenset[int]
    """The page ids that the list does not contain yet."""
    typed: bytes = b""
    """The generated beginning of the tag or page id. In `thinking`, of the closing tag."""
    blanks: int = 0
    """The number of white space characters just before the next part."""

    @staticmethod
    def start(n: int, *, think: bool) -> CompletionState:
        """The state of an empty completion for `n` pages."""
        return CompletionState(Part.think_open if think else Part.answer_open, frozenset(range(1, n + 1)))

    def advance(self, data: bytes) -> CompletionState | None:
        """The state after `data`, or None if `data` may not come next."""
        state: CompletionState | None = self
        for index, byte in enumerate(data):
            if state is None:
                return None
            if state.part is Part.thinking:
                return state._think(data[index:])
            state = state._step(byte)
        return state

    def _think(self, data: bytes) -> CompletionState | None:
        """The state after `data`, which begins in the think block."""
        text = self.typed + data
        _, close, after = text.partition(_CLOSE)
        if close:
            return CompletionState(Part.answer_open, self.unused).advance(after)
        tail = text[max(text.rfind(b"<"), 0) :]
        return self._replace(typed=tail if _CLOSE.startswith(tail) else b"")

    def _step(self, byte: int) -> CompletionState | None:
        """The state after one byte that is not in the think block."""
        if byte in WHITE_SPACE and not self.typed:
            return self._replace(blanks=self.blanks + 1) if self.blanks < MAX_BLANKS else None
        if self.part is Part.page_id:
            return self._step_page_id(byte)
        if self.part is Part.separator:
            if byte == ord(",") and self.unused:
                return CompletionState(Part.page_id, self.unused)
            return (
                CompletionState(Part.answer_close, self.unused) if byte == ord("]") and not self.unused else None
            )
        literal, typed = _LITERALS.get(self.part, b""), self.typed + bytes([byte])
        if typed == literal:
            return CompletionState(Part(self.part + 1), self.unused)
        return self._replace(typed=typed, blanks=0) if literal.startswith(typed) else None

    def _step_page_id(self, byte: int) -> CompletionState | None:
        if byte in b"0123456789":
            typed = self.typed + bytes([byte])
            return self._replace(typed=typed, blanks=0) if typed in _id_prefixes(self.unused) else None
        if not self.typed or int(self.typed) not in self.unused:
            return None
        return CompletionState(Part.separator, self.unused - {int(self.typed)})._step(byte)


@lru_cache(maxsize=1024)
def _id_prefixes(ids: frozenset[int]) -> frozenset[bytes]:
    """All beginnings of the ids in decimal notation, complete ids included."""
    return frozenset(str(i)[:length].encode() for i in ids for length in range(1, len(str(i)) + 1))


def gbnf_grammar(n: int, *, think: bool = False) -> str:
    """The completions for `n` pages as a grammar in GBNF, the notation of xgrammar and llama.cpp.

    Up to `MAX_EXACT_PAGES` pages the grammar accepts exactly the permutations: it has one rule for each set of ids
    that are still unused, so its size doubles with each page. For more pages it accepts any list of n ids in 1..n,
    which may repeat an id.

    With `think`, a think block may come first. It is optional, because a server with a reasoning parser applies
    the grammar only to the text after the think block. Such a parser needs `<think>` and `</think>` as single
    tokens, which Qwen2.5's tokenizer does not have.
    """
    rules = _think_rules() if think else ["root ::= answer"]
    blanks = "".join({" ": " ", "\n": "\\n", "\r": "\\r", "\t": "\\t"}[chr(c)] for c in WHITE_SPACE)
    rules += [
        f'answer ::= ws "{ANSWER_OPEN}" ws "[" ws list ws "]" ws "{ANSWER_CLOSE}" ws',
        f"ws ::= [{blanks}]{{0,{MAX_BLANKS}}}",
    ]
    all_ids = frozenset(range(1, n + 1))
    if n > MAX_EXACT_PAGES:
        rules.append("list ::= id" + ' ws "," ws id' * (n - 1))
        rules.append("id ::= " + " | ".join(f'"{i}"' for i in sorted(all_ids)))
        return "\n".join(rules) + "\n"
    rules.append(f"list ::= {_rule_name(all_ids)}")
    for size in range(n, 0, -1):
        for unused in map(frozenset, combinations(range(1, n + 1), size)):
            options = (
                f'"{i}"' + (f' ws "," ws {_rule_name(unused - {i})}' if size > 1 else "") for i in sorted(unused)
            )
            rules.append(f"{_rule_name(unused)} ::= {' | '.join(options)}")
    return "\n".join(rules) + "\n"


def _think_rules() -> list[str]:
    """The rules of an optional think block. Rule think-k comes after k characters of the closing tag."""
    rules = [f'root ::= answer | ws "{THINK_OPEN}" think-0', 'think-0 ::= [^<]* "<" think-1']
    for k in range(1, len(THINK_CLOSE)):
        following = "answer" if k == len(THINK_CLOSE) - 1 else f"think-{k + 1}"
        character = THINK_CLOSE[k]
        rules.append(f'think-{k} ::= "{character}" {following} | "<" think-1 | [^<{character}] think-0')
    return rules


def _rule_name(unused: frozenset[int]) -> str:
    return "left-" + "-".join(map(str, sorted(unused)))
