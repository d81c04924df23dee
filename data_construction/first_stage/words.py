"""The words of texts in any language, for BM25.

Letters are normalized, so that forms that readers take for the same match: Unicode's compatibility forms ("ﬁ",
half width), upper and lower case, Arabic letters and vowel signs (after Larkey et al. 2002, "Improving stemming
for Arabic information retrieval"), the Cyrillic ё. Scripts without spaces between words become pairs of
characters. Stop words are English ones and those of the languages that the texts are in.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from data_construction.corpus.languages import language_of
from mmr5_train.common.bm25s_import import bm25s

# Han and kana, which are written without spaces between words; Hangul, whose words carry endings; Thai, Lao,
# Burmese and Khmer.
_UNSPACED = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff々"
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]+"
)
# At least two letters, digits or Indic signs: Python does not count vowel signs of Indic scripts as letters.
_WORD = r"(?u)[\w\u0900-\u0dff]{2,}"
_SIGNS = (*range(0x0591, 0x05C8), *range(0x0610, 0x061B), *range(0x064B, 0x0660), 0x0670, 0x0640)
_FOLDED = str.maketrans(
    {
        "ё": "е", "أ": "ا", "إ": "ا", "آ": "ا", "ٱ": "ا", "ى": "ي", "ی": "ي", "ک": "ك", "ة": "ه",
        **{chr(sign): None for sign in _SIGNS},  # Hebrew and Arabic vowel signs, and the Arabic elongation
    }
)  # fmt: skip
_LISTS = bm25s.stopwords
_STOP_WORDS = {
    "en": _LISTS.STOPWORDS_EN,
    "de": _LISTS.STOPWORDS_GERMAN,
    "nl": _LISTS.STOPWORDS_DUTCH,
    "fr": _LISTS.STOPWORDS_FRENCH,
    "es": _LISTS.STOPWORDS_SPANISH,
    "pt": _LISTS.STOPWORDS_PORTUGUESE,
    "it": _LISTS.STOPWORDS_ITALIAN,
    "ru": _LISTS.STOPWORDS_RUSSIAN,
    "sv": _LISTS.STOPWORDS_SWEDISH,
    "no": _LISTS.STOPWORDS_NORWEGIAN,
    "tr": _LISTS.STOPWORDS_TURKISH,
    "da": _LISTS.STOPWORDS_DANISH,
}
_SAMPLE, _SAMPLE_LETTERS = 20, 1_000
_MIN_SHARE = 0.1


def normalize(text: str) -> str:
    """The text in lower case, with one form of each letter, and spaces between the words of every script."""
    return split_unspaced(unicodedata.normalize("NFKC", text).casefold().translate(_FOLDED))


def split_unspaced(text: str) -> str:
    """The text with spaces around the pairs of neighboring characters in scripts without spaces between words.

    So a question in Chinese or Japanese matches a page on which its words stand, without a dictionary (Nie et al.
    2000, "On the use of words and n-grams for Chinese information retrieval").
    """

    def pairs(match: re.Match[str]) -> str:
        run = match[0]
        words = [run[i : i + 2] for i in range(len(run) - 1)] or [run * 2]  # a word has at least two characters
        return f" {' '.join(words)} "

    return _UNSPACED.sub(pairs, text)


def languages_of(texts: Sequence[str]) -> list[str]:
    """English, and the languages with stop words that at least a tenth of a sample of the texts is in."""
    with_text = [text for text in texts if text.strip()]
    step = max(1, len(with_text) // _SAMPLE)
    sample = with_text[::step][:_SAMPLE]
    counts = Counter(language_of(text[:_SAMPLE_LETTERS]) for text in sample)
    return [name for name in _STOP_WORDS if name == "en" or counts[name] >= max(1, _MIN_SHARE * len(sample))]


@cache
def stop_words(languages: tuple[str, ...]) -> tuple[str, ...]:
    """The normalized stop words of these languages."""
    lists = (_STOP_WORDS[name] for name in languages)
    return tuple(sorted({normalize(word).strip() for words in lists for word in words}))


def to_words(texts: Sequence[str], languages: Sequence[str], **options: Any) -> Any:
    """The texts in bm25s's form, without stop words. `languages` are those of the collection that is searched."""
    return bm25s.tokenize(
        [normalize(text) for text in texts],
        lower=False,
        token_pattern=_WORD,
        stopwords=list(stop_words(tuple(languages))),
        show_progress=False,
        **options,
    )
