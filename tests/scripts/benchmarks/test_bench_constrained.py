"""The benchmark of constrained decoding, with the tokenizer of the tiny model."""

import bench_constrained as bench
import pytest

from mmr5_train.inference.vocabulary import Vocabulary


@pytest.fixture
def vocabulary(processor):
    return Vocabulary(processor.tokenizer)


@pytest.mark.parametrize("text", [bench.THOUGHT, bench.LIST])
def test_steps_continue_the_text(vocabulary, text):
    assert bench.step_ms(vocabulary, 3, batch=2, text=text, steps=4) > 0


def test_xgrammar_is_measured_in_the_list(processor):
    figures = bench.xgrammar_figures(processor.tokenizer, 3, batch=2)
    assert figures.keys() == {"compile_s", "masks_ms"}
    assert min(figures.values()) > 0


def test_text_outside_the_grammar_is_refused(vocabulary):
    with pytest.raises(AssertionError):
        bench.step_ms(vocabulary, 3, batch=1, text="<answer>[4,", steps=1)
