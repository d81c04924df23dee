import itertools
import re

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.answer_constraints import (
    MAX_EXACT_PAGES,
    CompletionState,
    Phase,
    gbnf_grammar,
    is_answer_prefix,
    missing_think_close,
)
from mmr5_train.ranking.prompt import render_completion

permutations = st.integers(1, 13).flatmap(lambda n: st.permutations(range(1, n + 1)))


@given(permutations)
def test_every_prefix_of_an_answer_is_accepted(order):
    text = render_completion(None, order)
    assert all(is_answer_prefix(text[:length], len(order)) for length in range(len(text) + 1))
    assert not is_answer_prefix(text + " ", len(order))


@pytest.mark.parametrize(
    "text",
    [
        "x", "<answer>(", "<answer>[0", "<answer>[4", "<answer>[1,2", "<answer>[1, 1", "<answer>[1, ]",
        "<answer>[]", "<answer>[1, 2]", "<answer>[ 1", "<answer>[01", "<answer>[1 ", "<answer>[1, 2, 3, ",
        "<answer>[1, 2, 3].", "<answer>[1, 2, 3]</answer>.", "<answer>[-1", "<answer>[1, 2, 3,",
    ],
)  # fmt: skip
def test_text_that_cannot_start_an_answer_is_rejected(text):
    assert not is_answer_prefix(text, 3)


@given(permutations, st.data())
def test_any_sequence_of_allowed_characters_ends_in_a_permutation(order, data):
    """Single characters stand for tokens: any choice among the allowed ones leads to a complete answer."""
    n = len(order)
    thinks = data.draw(st.booleans())
    state = CompletionState(n, Phase.opening if thinks else Phase.answering, must_finish=data.draw(st.booleans()))
    text = ""
    while state.phase is not Phase.ended:
        allowed = [c for c in "<>/[]answerthik, 0123456789\n" if state.allows(c)]
        assert allowed, f"nothing may follow {text!r}"
        character = data.draw(st.sampled_from(allowed))
        if state.phase is Phase.thinking and len(text) > 40:  # close the think block after some characters
            character = missing_think_close(state.text)[0]
        text += character
        state.append(character)
    answer = parse_answer(text, n, expect_think=thinks)
    assert answer.is_complete_permutation
    assert answer.structure_valid


def test_token_may_span_the_end_of_the_think_block():
    state = CompletionState(2, Phase.thinking, "so it helps.</think")
    assert state.allows("><")
    assert state.allows(">\n")
    assert not state.allows(">.")
    assert not state.allows("><b")
    assert state.allows("ing")
    state.append("><")
    assert (state.phase, state.text) == (Phase.answering, "<")


def test_force_finish_closes_the_think_block_and_sets_cut_off():
    state = CompletionState(2, Phase.thinking, "a</")
    state.force_finish()
    assert state.cut_off
    assert state.allows("think>")
    assert not state.allows("table")
    answering = CompletionState(2, Phase.answering)
    answering.force_finish()
    assert not answering.cut_off


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_grammar_generates_exactly_the_permutations(n):
    texts = set(expand(gbnf_grammar(n)))
    assert texts == {render_completion(None, order) for order in itertools.permutations(range(1, n + 1))}


@pytest.mark.parametrize("n", [1, 2, 5, MAX_EXACT_PAGES, 20])
def test_xgrammar_compiles_the_grammar_and_accepts_permutations(n):
    """vLLM and SGLang compile grammars with xgrammar."""
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([chr(i) for i in range(256)]))
    compiled = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(gbnf_grammar(n)))

    def accepts(text):
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        return matcher.accept_string(text) and matcher.is_terminated()

    pages = list(range(1, n + 1))
    assert accepts(render_completion(None, pages))
    assert accepts(render_completion(None, pages[::-1]))
    assert not accepts(render_completion(None, pages) + "\n")
    for wrong in (pages[1:], [*pages, n + 1], [*pages[1:], n + 1], [*pages[1:], 0]):
        assert not accepts(render_completion(None, wrong)), wrong
    if 1 < n <= MAX_EXACT_PAGES:
        assert not accepts(render_completion(None, [1, *pages[:-1]]))


def test_grammar_for_many_pages_is_small():
    assert len(gbnf_grammar(MAX_EXACT_PAGES)) < 60_000
    assert len(gbnf_grammar(50)) < 2_000
    assert gbnf_grammar(50).count(" id") == 50


def expand(grammar):
    """All texts that a grammar without recursion generates."""
    rules = dict(line.split(" ::= ") for line in grammar.strip().splitlines())

    def texts(rule):
        for option in rules[rule].split(" | "):
            parts = [
                [symbol[1:-1]] if symbol.startswith('"') else list(texts(symbol))
                for symbol in re.findall(r'"[^"]*"|[\w-]+', option)
            ]
            yield from map("".join, itertools.product(*parts))

    return texts("root")
