"""The tokens of a tokenizer as bytes, and which of them may follow a partial completion.

They are bytes and not text, because a token of a byte-level tokenizer may hold a part of a character. A tag may
consist of several tokens, and the last one may continue with other text: `<th`, `ink`, `>The`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mmr5_train.common.files import InputError
from mmr5_train.ranking.answer_constraints import LIST_OPEN, CompletionState, Part
from mmr5_train.ranking.prompt import ANSWER_CLOSE, THINK_CLOSE, THINK_OPEN

IntArray = npt.NDArray[np.int64]
_TEXT_BEFORE_LIST = {
    Part.think_open: f"{THINK_OPEN}{THINK_CLOSE}{LIST_OPEN}",
    Part.thinking: f"{THINK_CLOSE}{LIST_OPEN}",
    Part.answer_open: LIST_OPEN,
    Part.list_open: "[",
    Part.page_id: "",
}
_CHARACTERS = {*_TEXT_BEFORE_LIST[Part.think_open], *"0123456789, ]", *ANSWER_CLOSE}
_STRUCTURE = re.compile(f"[{re.escape(''.join(sorted(_CHARACTERS)))}\n\r\t]+".encode())
_TOKENS = -1  # the key of the ids of a node's tokens in a trie; the other keys are bytes
_CACHED_STATES = 16_384


class Vocabulary:
    """The tokens of a tokenizer. To read the 150,000 tokens of Qwen2.5 takes a part of a second."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises `InputError` if the tokens' bytes are unknown, or a character of the answer has no token."""
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id
        self.tokens = token_bytes(tokenizer)
        """The bytes of each token; empty for special tokens and for ids without a token."""
        self.textless_ids = [i for i, token in enumerate(self.tokens) if not token]
        self._spelled = set(self.tokens)
        missing = sorted(character for character in _CHARACTERS if character.encode() not in self._spelled)
        if missing:
            raise InputError(f"constrain: the tokenizer has no token for {missing}; set constrain=false")
        structural_ids = [i for i, token in enumerate(self.tokens) if _STRUCTURE.fullmatch(token)]
        self._tag_ids = [i for i, token in enumerate(self.tokens) if b"<" in token or b">" in token]
        # Only these tokens can lead from the think block to the answer.
        self._closing_ids = sorted({*structural_ids, *self._tag_ids})
        has_digit = re.compile(rb"[0-9]").search
        self._digit_trie = _trie((self.tokens[i], i) for i in structural_ids if has_digit(self.tokens[i]))
        self._trie = _trie((self.tokens[i], i) for i in structural_ids if not has_digit(self.tokens[i]))
        self.allowed = lru_cache(_CACHED_STATES)(self._allowed)
        self._allowed_without_digits = lru_cache(_CACHED_STATES)(self._walk_without_digits)
        self.forbidden = lru_cache(_CACHED_STATES)(self._forbidden)
        self.within_limit = lru_cache(_CACHED_STATES)(self._within_limit)
        self.fewest_tokens = lru_cache(_CACHED_STATES)(self._fewest_tokens)
        self._list_tokens = lru_cache(_CACHED_STATES)(self._count_list_tokens)
        self._token_count = lru_cache(_CACHED_STATES)(self._count_tokens)

    def _allowed(self, state: CompletionState) -> IntArray:
        """The tokens that may come next, in a state other than `thinking`."""
        # Which ids are unused matters only to tokens with digits, of which a tokenizer has few. So the states of
        # all rows share most of the work, although there are 2^n sets of unused ids.
        is_id = state.part is Part.page_id and state.typed
        own = state.unused & {int(state.typed)} if is_id else frozenset()
        others = {0} if len(state.unused) > len(own) else frozenset()
        without_digits = self._allowed_without_digits(state._replace(unused=own | others))
        with_digits = _walk(self._digit_trie, state)
        return np.concatenate([without_digits, np.array(with_digits, np.int64)])

    def _walk_without_digits(self, state: CompletionState) -> IntArray:
        allowed = [self.end_id] if state.part is Part.ended else []
        allowed += _walk(self._trie, state)
        if state.part is Part.think_open:  # a token may complete the tag and begin the reasoning with any text
            reached = set(allowed)
            allowed += [i for i in self._tag_ids if i not in reached and state.advance(self.tokens[i])]
        return np.array(allowed, np.int64)

    def _forbidden(self, state: CompletionState) -> IntArray:
        """The tokens that close the think block and continue with text that can't begin an answer."""
        return np.array([i for i in self._tag_ids if state.advance(self.tokens[i]) is None], np.int64)

    def _within_limit(self, state: CompletionState, remaining: int) -> IntArray:
        """The tokens that may come next if `remaining` tokens after them must suffice to complete the answer.

        Some token always may if `fewest_tokens` of the state is at most `remaining` + 1. In state `thinking`, call
        it only if the state after any other token would need more than `remaining` tokens.
        """
        candidates = self._closing_ids if state.part is Part.thinking else self.allowed(state).tolist()
        kept = [i for i in candidates if i == self.end_id or self._suffices(state, i, remaining)]
        return np.array(kept, np.int64)

    def _suffices(self, state: CompletionState, token: int, remaining: int) -> bool:
        following = state.advance(self.tokens[token])
        return following is not None and self.fewest_tokens(following) <= remaining

    def _fewest_tokens(self, state: CompletionState) -> int:
        """A number of tokens, the end token included, that suffices to complete the answer in any state.

        It allows for a list as `render_completion` writes it, and leaves the order of the pages to the model.
        """
        count, typed = self._token_count, state.typed.decode()
        if state.part is Part.ended:
            return 1
        if state.part is Part.answer_close:
            return count(ANSWER_CLOSE[len(typed) :]) + 1
        after_list_open, first_entry = self._list_tokens(state.unused)
        if state.part is Part.separator:
            return after_list_open
        if state.part is Part.page_id and typed:
            ids = [i for i in state.unused if str(i).startswith(typed)]
            return after_list_open + min(count(str(i)[len(typed) :]) - count(f", {i}") for i in ids)
        after_list_open += first_entry
        before_list = _TEXT_BEFORE_LIST[state.part]
        tags = count(before_list[len(typed) :])
        if state.part is Part.thinking:  # the closing tag can also begin again
            tags = min(tags, count(before_list))
        return tags + after_list_open

    def _count_list_tokens(self, unused: frozenset[int]) -> tuple[int, int]:
        """The tokens from the comma before the ids `unused` to the end, and by how many the first one changes it.

        That id may be the list's first one or follow a comma that is there, so it needs no comma.
        """
        count = self._token_count
        entries = {i: count(f", {i}") for i in unused}
        first = min((min(count(str(i)), count(f" {i}")) - entries[i] for i in unused), default=0)
        return sum(entries.values()) + count(f"]{ANSWER_CLOSE}") + 1, first

    def _count_tokens(self, text: str) -> int:
        """The smallest number of tokens that spell `text`."""
        data, counts = text.encode(), [0]
        for end in range(1, len(data) + 1):
            counts.append(1 + min(counts[start] for start in range(end) if data[start:end] in self._spelled))
        return counts[-1]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each token, by id: empty for special tokens, which decoding skips, and for ids without a token.

    Raises `InputError` if the tokenizer is neither a byte-level BPE (Qwen, Llama 3) nor has byte fallback (Gemma).
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.decoder.__getstate__()))
    if '"ByteLevel"' in decoder:
        bytes_of_characters = {character: byte for byte, character in bytes_to_unicode().items()}

        def to_bytes(token: str) -> bytes:
            try:
                return bytes([bytes_of_characters[character] for character in token])
            except KeyError:  # an added token is stored as text
                return token.encode()

    elif '"ByteFallback"' in decoder:

        def to_bytes(token: str) -> bytes:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    else:
        raise InputError("constrain: needs a byte-level tokenizer, or one with byte fallback; set constrain=false")
    ids = tokenizer.get_vocab()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    tokens = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        if i not in special:
            tokens[i] = to_bytes(token)
    return tokens


def _walk(trie: dict[int, Any], state: CompletionState) -> list[int]:
    """The tokens of the trie that may come next in `state`."""
    found: list[int] = []
    nodes = [(trie, state)]
    while nodes:
        node, state_there = nodes.pop()
        for byte, child in node.items():
            if byte == _TOKENS:
                found += child
            elif following := state_there.advance(bytes([byte])):
                nodes.append((child, following))
    return found


def _trie(tokens: Iterable[tuple[bytes, int]]) -> dict[int, Any]:
    """Nested dictionaries that lead from byte to byte to the ids of the tokens."""
    root: dict[int, Any] = {}
    for token, i in tokens:
        node = root
        for byte in token:
            node = node.setdefault(byte, {})
        node.setdefault(_TOKENS, []).append(i)
    return root
