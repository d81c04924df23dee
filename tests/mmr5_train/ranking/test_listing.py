import itertools
import re

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.listing import (
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
def test_every_beginning_of_an_answer_is_one(order):
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
def test_what_can_become_no_answer_on_three_pages(text):
    assert not is_answer_prefix(text, 3)


@given(permutations, st.data())
def test_a_walk_through_what_is_taken_ends_in_a_permutation(order, data):
    """Characters in the place of tokens: whatever is chosen, the text comes to a whole answer."""
    n = len(order)
    thinks = data.draw(st.booleans())
    row = CompletionState(n, Phase.opening if thinks else Phase.answering, must_finish=data.draw(st.booleans()))
    text = ""
    while row.phase is not Phase.ended:
        characters = [c for c in "<>/[]answerthik, 0123456789\n" if row.allows(c)]
        assert characters, f"nothing may follow {text!r}"
        character = data.draw(st.sampled_from(characters))
        if row.phase is Phase.thinking and len(text) > 40:  # a thought ends some time
            character = missing_think_close(row.text)[0]
        text += character
        row.append(character)
    answer = parse_answer(text, n, expect_think=thinks)
    assert answer.is_complete_permutation
    assert answer.structure_valid


def test_a_token_may_reach_across_the_end_of_a_thought():
    row = CompletionState(2, Phase.thinking, "so it helps.</think")
    assert row.allows("><")
    assert row.allows(">\n")
    assert not row.allows(">.")
    assert not row.allows("><b")
    assert row.allows("ing")
    row.append("><")
    assert (row.phase, row.text) == (Phase.answering, "<")


def test_a_thought_that_runs_out_of_tokens_says_so():
    row = CompletionState(2, Phase.thinking, "a</")
    row.force_finish()
    assert row.cut_off
    assert row.allows("think>")
    assert not row.allows("table")
    answering = CompletionState(2, Phase.answering)
    answering.force_finish()
    assert not answering.cut_off


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_grammar_holds_exactly_the_permutations(n):
    found = set(expansions(gbnf_grammar(n)))
    assert found == {render_completion(None, order) for order in itertools.permutations(range(1, n + 1))}


@pytest.mark.parametrize("n", [1, 2, 5, MAX_EXACT_PAGES, 20])
def test_what_vllm_and_sglang_compile_takes_permutations(n):
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([chr(i) for i in range(256)]))
    compiled = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(gbnf_grammar(n)))

    def takes(text):
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        return matcher.accept_string(text) and matcher.is_terminated()

    pages = list(range(1, n + 1))
    assert takes(render_completion(None, pages))
    assert takes(render_completion(None, pages[::-1]))
    assert not takes(render_completion(None, pages) + "\n")
    for wrong in (pages[1:], [*pages, n + 1], [*pages[1:], n + 1], [*pages[1:], 0]):
        assert not takes(render_completion(None, wrong)), wrong
    if 1 < n <= MAX_EXACT_PAGES:
        assert not takes(render_completion(None, [1, *pages[:-1]]))


def test_beyond_some_pages_the_grammar_stays_small():
    assert len(gbnf_grammar(MAX_EXACT_PAGES)) < 60_000
    assert len(gbnf_grammar(50)) < 2_000
    assert gbnf_grammar(50).count(" id") == 50


def expansions(grammar):
    """All texts of a grammar without recursion."""
    rules = dict(line.split(" ::= ") for line in grammar.strip().splitlines())

    def texts(rule):
        for way in rules[rule].split(" | "):
            parts = [
                [piece[1:-1]] if piece.startswith('"') else list(texts(piece))
                for piece in re.findall(r'"[^"]*"|[\w-]+', way)
            ]
            yield from map("".join, itertools.product(*parts))

    return texts("root")
