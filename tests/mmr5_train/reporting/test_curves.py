"""The training curves of the report."""

import re

import pytest

from mmr5_train.reporting.curves import tick_label, training_charts


def chart_of(values: list[float]) -> str:
    history = [{"step": step, "heldout/recall@1": value} for step, value in enumerate(values, 1)]
    return training_charts(history, "sft")[0].svg


def heights(svg: str) -> list[float]:
    """The height of each point of the chart's bold line."""
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--s2\)[^>]*stroke-width: 1.8', svg)
    assert path, svg
    return [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path[1])]


def test_short_series_is_drawn_as_logged():
    """A running mean of two values would be a horizontal line."""
    first, last = heights(chart_of([0.25, 0.75]))
    assert first - last > 20


def test_long_series_is_smoothed():
    drawn = heights(chart_of([0.0, 1.0] * 15))
    assert max(drawn) - min(drawn) < 80


def test_axis_of_one_step_has_one_tick():
    labels = re.findall(r">([^<>]+)</text>", chart_of([0.5]))
    assert labels[0] == "1"
    assert "0.950" not in labels


@pytest.mark.parametrize(
    ("value", "label"), [(7.25e-6, "7.25e−6"), (-0.00054, "−5.4e−4"), (0.03, "0.03"), (0, "0"), (1500, "1500")]
)
def test_small_values_have_their_exponent_in_the_label(value, label):
    """An exponent above the axis, for all labels, would cover the chart's title."""
    assert tick_label(value) == label


def test_no_exponent_above_the_axis():
    assert not re.search(r">\s*1e.\d+\s*<", chart_of([7e-6, 8e-6]))
