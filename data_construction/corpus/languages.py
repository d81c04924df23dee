"""Detects the language of a text, and that it is not in the language of a question.

The detector is py3langid: 140 languages, offline, its model ships inside the package and loads in about a second.
"""

from __future__ import annotations

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# Chosen on short questions and notes in 20 languages: no false alarm on a note in the question's language. A text
# without words ("2015: 17 %") gets the same probability for each language, 1/140: that is above the limit.
MIN_QUESTION_PROBABILITY = 0.5
MAX_TEXT_PROBABILITY = 0.005


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> str | None:
    """The ISO 639 code of the language of a text; None if it is unsure."""
    language, probability = _identifier().classify(text)
    return str(language) if probability >= MIN_QUESTION_PROBABILITY else None


def other_language(text: str, question: str) -> str | None:
    """Describes the two languages if `text` is in another language than `question`; None if not, or if unsure.

    The language of the question must have at least `MIN_QUESTION_PROBABILITY` for the question, and at most
    `MAX_TEXT_PROBABILITY` for the text. Texts of two or three words are often undecided. Languages are ISO 639
    codes. One call takes less than a millisecond on a CPU core.
    """
    identifier = _identifier()
    question_language, probability = identifier.classify(question)
    if probability < MIN_QUESTION_PROBABILITY:
        return None
    probabilities = dict(identifier.rank(text))
    if probabilities[question_language] > MAX_TEXT_PROBABILITY:
        return None
    return f"language {next(iter(probabilities))}, the question's is {question_language}"
