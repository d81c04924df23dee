"""Constrained decoding with scripted and random scores, on the tiny model's tokenizer and on real ones."""

import copy
from collections import Counter

import pytest
import tokenizers
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import decoders
from tokenizers.models import BPE
from transformers import AddedToken, PreTrainedTokenizerFast

from mmr5_train.common.files import InputError
from mmr5_train.inference.constrained import PermutationLogitsProcessor
from mmr5_train.inference.local import load_backend
from mmr5_train.inference.vocabulary import Vocabulary, token_bytes
from mmr5_train.models.config import CheckpointOptions
from mmr5_train.models.pages import prepare_page
from mmr5_train.ranking.answer import parse_answer
from mmr5_train.ranking.answer_constraints import CompletionState
from mmr5_train.ranking.prompt import render_completion

LOGITS = 152_064  # more than the real tokenizers have tokens


@pytest.fixture(scope="module")
def tiny_vocabulary(processor):
    return Vocabulary(processor.tokenizer)


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer):
    return Vocabulary(qwen_tokenizer)


@pytest.fixture(scope="module")
def qwen3(qwen_tokenizer):
    from standin import QWEN3_TOKENS

    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN3_TOKENS])
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module", params=["tiny_vocabulary", "qwen", "qwen3"])
def vocabulary(request):
    return request.getfixturevalue(request.param)


def logits(vocabulary):
    return max(len(vocabulary.tokens), LOGITS if len(vocabulary.tokens) > 100_000 else 0)


def decode(vocabulary, page_counts, think, limit, scores_at):
    """Decodes a batch greedily from `scores_at(step)`, (rows, V).

    Returns the tokens of each row, and the processor. As in `generate`, rows that have ended are padded.
    """
    constraint = PermutationLogitsProcessor(
        vocabulary, page_counts, think=think, prompt_length=2, max_new_tokens=limit
    )
    ids = torch.ones(len(page_counts), 2, dtype=torch.long)
    ended = torch.zeros(len(page_counts), dtype=torch.bool)
    for step in range(limit):
        highest, following = constraint(ids, scores_at(step)).max(1)
        assert (highest > -torch.inf).all(), "no token is allowed"
        following[ended] = vocabulary.tokenizer.pad_token_id
        ids = torch.cat([ids, following[:, None]], 1)
        ended |= following == vocabulary.end_id
        if ended.all():
            break
    rows = [row[2:].tolist() for row in ids]
    return [
        row[: row.index(vocabulary.end_id) + 1] if vocabulary.end_id in row else row for row in rows
    ], constraint


def scripted(vocabulary, scripts):
    """Scores of a model that would generate the token ids of `scripts[r]` in row r, and then the end token."""
    scores = torch.empty(len(scripts), logits(vocabulary))

    def scores_at(step):
        scores.fill_(-30.0)
        for row, script in enumerate(scripts):
            scores[row, script[step] if step < len(script) else vocabulary.end_id] = 30.0
        return scores

    return scores_at


def text_of(vocabulary, ids):
    return vocabulary.tokenizer.decode(ids, skip_special_tokens=True)


# --- a right completion does not change ---

pieces = st.sampled_from(
    ["<", "</", "</thin", "</think", "<think>", "<answer>[1, 2]</answer>", "</answer>", ">", "\n\n", "The page ",
     "</thinking>", "Image 1: a table, so it helps.\n", ".", " ", "\r\n", "é", "中文", "🙂", "\u200d", "]", "[, 1"]
)  # fmt: skip
thoughts = st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=12).map("".join)
page_count = st.one_of(*[st.integers(1, 12)] * 3, st.integers(1, 120))
page_lists = page_count.flatmap(lambda n: st.permutations(range(1, n + 1)))
gaps = st.sampled_from(["", "\n", "\n\n", " ", "\r\n"])


@st.composite
def completions(draw):
    """The text of a right completion, its page ids, and whether it is written as in the SFT data."""
    think, order = draw(st.none() | thoughts), draw(page_lists)
    assume(think is None or "</think>" not in think)
    text = render_completion(think, order)
    if draw(st.booleans()):
        return text, order, True
    head, _, tail = text.rpartition("<answer>[")
    between = draw(st.sampled_from([", ", ",", " , ", ",\n"]))
    tail = tail.replace(", ", between).replace("]", f"]{draw(gaps)}")
    text = f"{head}{draw(gaps)}<answer>{draw(gaps)}[{draw(gaps)}{tail}{draw(gaps)}"
    return text, order, False


def tokenize(vocabulary, texts):
    """The token ids of each text in turn; rejects the example if a text contains a special token."""
    ids = [i for text in texts for i in vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assume(all(vocabulary.tokens[i] for i in ids))
    return ids


@settings(max_examples=10)
@given(st.lists(completions(), min_size=1, max_size=3), st.data())
def test_a_right_completion_does_not_change(vocabulary, batch, data):
    """In a batch, with the tokens of the tokenizer or other tokens of the same text, however short the limit."""
    think = batch[0][0].startswith("<think>")
    batch = [each for each in batch if each[0].startswith("<think>") == think]
    scripts, limits = [], []
    for text, order, is_rendered in batch:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        scripts.append(
            tokenize(vocabulary, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
        )
        # At the limit, tokens are reserved for a comma and a space between two page ids.
        limits.append(len(scripts[-1]) + 1 + (0 if is_rendered else 2 * len(order)))
    limit = max(limits) + data.draw(st.integers(0, 3))
    page_counts = [len(order) for _, order, _ in batch]
    rows, constraint = decode(vocabulary, page_counts, think, limit, scripted(vocabulary, scripts))
    assert rows == [[*script, vocabulary.end_id] for script in scripts]
    assert not any(constraint.cut_off)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 2**31), max_size=30), page_lists)
def test_any_tokens_may_be_in_the_think_block(vocabulary, numbers, order):
    """Also tokens that no text is tokenized to, such as parts of a character in any order."""
    tokens = [number % len(vocabulary.tokens) for number in numbers]
    tokens = [i for i in tokens if vocabulary.tokens[i]]
    assume(b"</think>" not in b"".join(vocabulary.tokens[i] for i in tokens) + b"</think")
    around = [tokenize(vocabulary, [part]) for part in ("<think>", render_completion("", order)[len("<think>") :])]
    script = [*around[0], *tokens, *around[1]]
    [row], constraint = decode(vocabulary, [len(order)], True, len(script) + 1, scripted(vocabulary, [script]))
    assert row == [*script, vocabulary.end_id]
    assert not constraint.cut_off[0]
    assert parse_answer(text_of(vocabulary, row), len(order)).ids == tuple(order)


@pytest.mark.parametrize("text", [
    "<think>The page helps.</think><answer>[10, 2, 1, 3, 4, 5, 6, 7, 8, 9]</answer>",
    "<think>This\n\nhelps.</think>\n\n<answer>[2, 1]</answer>",
    "<think>\n\nIt helps.\n</think>\n<answer>[1,2]</answer>\n",
    "<think></think><answer>[1]</answer>",
    "<think></think</think><answer>[1]</answer>",
    "<think>(see 2 > 1)</think> <answer> [ 2 , 1 ] </answer>",
])  # fmt: skip
def test_real_tokens_that_span_tags_are_allowed(vocabulary, text):
    ids = tokenize(vocabulary, [text])
    n = text.rpartition("<answer>")[2].count(",") + 1
    [row], _ = decode(vocabulary, [n], True, len(ids) + 20, scripted(vocabulary, [ids]))
    assert text_of(vocabulary, row) == text_of(vocabulary, ids)
    assert parse_answer(text_of(vocabulary, row), n).structure_valid


# --- whatever the scores are, a completion ends in a permutation ---


def random_scores(vocabulary, rows, seed):
    """Random scores that favor tokens with characters of tags, so that tags open and close in many ways."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.zeros(logits(vocabulary))
    bias[[i for i, token in enumerate(vocabulary.tokens) if token and token in b"</think><answer>"]] = 6.0
    bias[[i for i, token in enumerate(vocabulary.tokens) if b"<" in token or b">" in token]] += 2.0
    noise = torch.randn(rows, 2 * len(bias), generator=generator) * 2

    def scores_at(step):
        start = torch.randint(len(bias), (1,), generator=generator).item()
        return noise[:, start : start + len(bias)] + bias

    return scores_at


@settings(max_examples=6)
@given(
    st.lists(page_count, min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 60),
    st.integers(0, 1000),
)
@example([5, 1], True, 0, 0)
def test_random_scores_give_permutations_within_the_limit(vocabulary, page_counts, think, spare_tokens, seed):
    start = CompletionState.start(max(page_counts), think=think)
    limit = vocabulary.fewest_tokens(start) + spare_tokens
    rows, constraint = decode(
        vocabulary, page_counts, think, limit, random_scores(vocabulary, len(page_counts), seed)
    )
    for n, row in zip(page_counts, rows, strict=True):
        assert row[-1] == vocabulary.end_id, "the limit cut the answer off"
        assert all(vocabulary.tokens[i] for i in row[:-1]), "a special token, or an id without text"
        text = text_of(vocabulary, row)
        answer = parse_answer(text, n, expect_think=think)
        assert answer.is_complete_permutation, text
        assert answer.structure_valid, text
    if not think:
        assert not any(constraint.cut_off)


def test_special_tokens_and_ids_without_text_are_never_generated(vocabulary):
    favored = [*vocabulary.textless_ids, *range(len(vocabulary.tokens), logits(vocabulary))]
    scores = torch.zeros(2, logits(vocabulary))
    scores[:, favored] = 100.0
    rows, _ = decode(vocabulary, [3, 1], True, 60, lambda _: scores)
    assert all(i not in favored for row in rows for i in row[:-1])
    assert [row[-1] for row in rows] == [vocabulary.end_id] * 2


def test_a_long_thought_is_closed_in_time_and_marked(vocabulary):
    ids = tokenize(vocabulary, ["<think>" + "The page helps. " * 60])
    text = render_completion("x", range(1, 21))
    limit = len(tokenize(vocabulary, [text])) + 40
    other = tokenize(vocabulary, [render_completion("It helps.", [2, 1])])
    rows, constraint = decode(vocabulary, [20, 2], True, limit, scripted(vocabulary, [ids, other]))
    answer = parse_answer(text_of(vocabulary, rows[0]), 20)
    assert answer.is_complete_permutation
    assert answer.structure_valid
    assert len(answer.think) > 30
    assert constraint.cut_off == [True, False]
    assert rows[1] == [*other, vocabulary.end_id]


def test_the_constraint_does_not_favor_an_order(tiny_vocabulary):
    """With equal scores, each of the six orders of three pages is about equally frequent."""
    torch.manual_seed(0)
    size = len(tiny_vocabulary.tokens)
    scores = lambda _: torch.rand(300, size)  # noqa: E731
    rows, _ = decode(tiny_vocabulary, [3] * 300, False, 60, scores)
    orders = Counter(parse_answer(text_of(tiny_vocabulary, row), 3).ids for row in rows)
    assert len(orders) == 6
    assert min(orders.values()) > 20


def test_too_few_tokens_for_an_answer_are_an_error(tiny_vocabulary):
    with pytest.raises(InputError, match=r"max_new_tokens: a list of 40 pages takes up to \d+ tokens, found 50"):
        PermutationLogitsProcessor(tiny_vocabulary, [3, 40], think=True, prompt_length=2, max_new_tokens=50)


# --- tokens as bytes ---


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**31), max_size=20))
def test_token_bytes_are_what_the_tokenizer_decodes(vocabulary, numbers):
    ids = [number % len(vocabulary.tokens) for number in numbers]
    text = b"".join(vocabulary.tokens[i] for i in ids).decode(errors="replace")
    assert text == text_of(vocabulary, ids)


def test_tokens_of_a_tokenizer_with_byte_fallback_are_read():
    """As in Gemma: "▁" stands for a space, and bytes outside the vocabulary have tokens of their own."""
    names = ["</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁the", "é", "th", ">The"]
    model = BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokens = token_bytes(tokenizer)
    assert tokens[0] == b""
    assert tokens[1:257] == [bytes([i]) for i in range(256)]
    assert tokens[257:] == [b" the", "é".encode(), b"th", b">The"]
    assert (
        Vocabulary(tokenizer).fewest_tokens(CompletionState.start(1, think=False))
        == len("<answer>[1]</answer>") + 1
    )
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="set constrain=false"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


# --- with a model ---


@pytest.mark.parametrize(("family", "samples"), [("standin", 0), ("qwen3_standin", 1)])
def test_a_random_model_with_the_real_tokenizer_ranks_all_pages(family, samples, request, prompt):
    """One batch of prompts with one, two and three pages, greedy and sampled."""
    options = CheckpointOptions(prompt=prompt)
    backend = load_backend(request.getfixturevalue(family), options, max_new_tokens=50, constrain=True)
    page = prepare_page(Image.new("RGB", (120, 160), "red"), backend.limits)
    answers = backend.generate(["Which?"] * 3, [[page] * n for n in (1, 2, 3)], samples=samples)
    for n, group in enumerate(answers, 1):
        assert len(group) == max(samples, 1)
        for answer in group:
            assert parse_answer(answer.completion, n).structure_valid, answer.completion
            assert set(answer.defects) <= {"cut_off"}
            assert answer.tokens <= 50
