import itertools
import re

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st

from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.answer_constraints import MAX_BLANKS, MAX_EXACT_PAGES, CompletionState, Part, gbnf_grammar
from mmr5_train.ranking.prompt import render_completion

permutations = st.integers(1, 13).flatmap(lambda n: st.permutations(range(1, n + 1)))
blanks = st.text(" \n\r\t", max_size=MAX_BLANKS)


def answering(text, n=3):
    """The state after `text` in a completion without a think block, or None."""
    return CompletionState.start(n, think=False).advance(text.encode())


@given(permutations)
def test_every_prefix_of_an_answer_is_accepted(order):
    text = render_completion(None, order)
    assert all(answering(text[:length], len(order)) for length in range(len(text)))
    assert answering(text, len(order)).part is Part.ended


@pytest.mark.parametrize(
    "text",
    [
        "x", "<answer>(", "<answer>[0", "<answer>[4", "<answer>[1,2,,", "<answer>[1, 1", "<answer>[1, ]",
        "<answer>[]", "<answer>[1, 2]", "<answer>[+1", "<answer>[01", "<answer>[1 2", "<answer>[1, 2, 3, ",
        "<answer>[1, 2, 3].", "<answer>[1, 2, 3]</answer>.", "<answer>[-1", "<answer>[1, 2, 3,", "<ans wer>",
        "<answer>[1, 2, 3]</answer><answer>", "<think>", "\n" * (MAX_BLANKS + 1),
        "<answer>[\u00b9", "<answer>[\u0661",
    ],
)  # fmt: skip
def test_text_that_cannot_start_an_answer_is_rejected(text):
    assert answering(text) is None


@given(permutations, st.data())
def test_white_space_is_accepted_wherever_the_parser_accepts_it(order, data):
    draw = lambda: data.draw(blanks)  # noqa: E731
    entries = ",".join(f"{draw()}{i}{draw()}" for i in order)
    text = f"{draw()}<answer>{draw()}[{entries}]{draw()}</answer>{draw()}"
    assert answering(text, len(order)).part is Part.ended
    answer = parse_answer(text, len(order), expect_think=False)
    assert answer.structure_valid
    assert answer.is_complete_permutation


@given(permutations, st.data())
def test_any_sequence_of_allowed_characters_ends_in_a_permutation(order, data):
    """Single characters stand for tokens: any choice among the allowed ones leads to a complete answer."""
    n = len(order)
    thinks = data.draw(st.booleans())
    state, text = CompletionState.start(n, think=thinks), ""
    while state.part is not Part.ended:
        allowed = [c for c in "<>/[]answerthik, 0123456789\n" if state.advance(c.encode())]
        assert allowed, f"nothing may follow {text!r}"
        character = data.draw(st.sampled_from(allowed))
        if state.part is Part.thinking and len(text) > 40:  # close the think block after some characters
            character = "</think>"[len(state.typed)]
        text += character
        state = state.advance(character.encode())
    answer = parse_answer(text, n, expect_think=thinks)
    assert answer.is_complete_permutation
    assert answer.structure_valid


def test_token_may_span_the_end_of_the_think_block():
    state = CompletionState.start(2, think=True).advance(b"<think>so it helps.</think")
    assert state.typed == b"</think"
    assert state.advance(b">\n")
    assert state.advance(b">.") is None
    assert state.advance(b"><b") is None
    assert state.advance(b"ing").part is Part.thinking
    assert state.advance(b"</").typed == b"</"
    following = state.advance(b"><")
    assert (following.part, following.typed) == (Part.answer_open, b"<")


def test_token_may_span_the_start_of_the_think_block():
    state = CompletionState.start(2, think=True).advance(b"<think")
    assert state.advance(b">The").part is Part.thinking
    assert state.advance(b">\xe2\x80").part is Part.thinking  # a part of a character
    assert state.advance(b"></").typed == b"</"
    assert state.advance(b"></think>No") is None
    assert state.advance(b".") is None


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_grammar_generates_exactly_the_permutations(n):
    texts = set(expand(gbnf_grammar(n).replace("ws ::=", "blanks ::=").replace(" ws", "")))
    texts = {text.replace(",", ", ") for text in texts}
    assert texts == {render_completion(None, order) for order in itertools.permutations(range(1, n + 1))}


def xgrammar_accepts(grammar):
    """A function that says whether `grammar` accepts a text, according to xgrammar, which vLLM and SGLang use."""
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([bytes([i]) for i in range(256)]))
    compiled = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(grammar))

    def accepts(text):
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        return matcher.accept_string(text) and matcher.is_completed()

    return accepts


@pytest.mark.parametrize("n", [1, 2, 5, MAX_EXACT_PAGES, 20])
def test_xgrammar_compiles_the_grammar_and_accepts_permutations(n):
    accepts = xgrammar_accepts(gbnf_grammar(n))
    pages = list(range(1, n + 1))
    assert accepts(render_completion(None, pages))
    assert accepts(render_completion(None, pages[::-1]))
    assert accepts("\n\n" + render_completion(None, pages).replace(", ", ",") + "\n")
    assert not accepts(render_completion(None, pages) + ".")
    for wrong in (pages[1:], [*pages, n + 1], [*pages[1:], n + 1], [*pages[1:], 0]):
        assert not accepts(render_completion(None, wrong)), wrong
    if 1 < n <= MAX_EXACT_PAGES:
        assert not accepts(render_completion(None, [1, *pages[:-1]]))


def test_grammar_with_a_think_block_accepts_any_reasoning():
    """Qwen2.5's tokenizer has no think tokens, so a server can't exempt the think block from the grammar."""
    accepts = xgrammar_accepts(gbnf_grammar(2, think=True))
    for think in (
        "",
        "The page\n\nhelps.",
        "a < b, </thin, <</think, </thinking>",
        "é中🙂",
        "<answer>[1]</answer>",
    ):
        assert accepts(render_completion(think, [2, 1])), think
        assert not accepts(render_completion(think, [2, 2])), think
        assert not accepts(render_completion(think, [2, 1]).replace("</think>", "</think>So")), think
    assert accepts("<think>\nA.\n</think>\n\n<answer>[1, 2]</answer>")
    assert accepts("<answer>[1, 2]</answer>"), (
        "the text after the think block, if the server has a reasoning parser"
    )


def test_grammar_for_many_pages_is_small():
    assert len(gbnf_grammar(MAX_EXACT_PAGES)) < 60_000
    assert len(gbnf_grammar(50)) < 2_000
    assert gbnf_grammar(50).count(" id") == 50


def expand(grammar):
    """All texts that a grammar without recursion generates, starting from the rule root."""
    rules = dict(line.split(" ::= ") for line in grammar.strip().splitlines())

    def texts(rule):
        for option in rules[rule].split(" | "):
            parts = [
                [symbol[1:-1]] if symbol.startswith('"') else list(texts(symbol))
                for symbol in re.findall(r'"[^"]*"|[\w-]+', option)
            ]
            yield from map("".join, itertools.product(*parts))

    return texts("root")
