"""Training curves as small inline SVG charts.

Matplotlib draws with placeholder colors that are then replaced by CSS variables, so that a chart follows the light
or dark color scheme of its page. The same history gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from mmr5_train.common.files import InputError

SIZE = (3.5, 1.75)  # inches at 72 points: about the width of a phone, so that text is not scaled
SERIES = ("var(--s1)", "var(--s2)", "var(--s3)", "var(--s4)", "var(--s5)", "var(--s6)")
INK, RULE = "#010203", "#010204"
PLACEHOLDERS = {INK: "var(--muted)", RULE: "var(--rule)"} | {
    f"#0a0b0{i}": variable for i, variable in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmr5-train",
    "font.family": "DejaVu Sans",  # part of matplotlib, so the layout is the same on every machine
    "font.size": 8.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}

# (keys of the log, title, note); a key that ends in "*" selects all keys with that prefix.
SFT_CHARTS = (
    (("loss", "eval_loss"), "Loss", "cross-entropy on the answer's tokens"),
    (("heldout/recall@1",), "Held-out recall@1", "greedy answers, at each checkpoint"),
    (("mean_token_accuracy",), "Token accuracy", "share of answer tokens predicted correctly"),
    (("entropy",), "Entropy", "of the next token, in nats"),
)
GRPO_CHARTS = (
    (("reward",), "Reward", "weighted sum, mean over completions"),
    (("rewards/*",), "", "mean over completions"),
    (("frac_reward_zero_std",), "Zero-variance groups", "share whose completions all get the same reward"),
    (("entropy",), "Entropy", "of the next token, in nats"),
    (("kl",), "KL", "from the initial model of GRPO"),
    (("heldout/recall@1",), "Held-out recall@1", "greedy answers, at each checkpoint"),
    (
        ("answers/true_verdicts", "answers/follow_verdicts"),
        "Verdicts",
        "share that is true; answers that follow them",
    ),
    (("first/*",), "Ranked first", "share of answers, by position in the prompt"),
    (("completions/mean_length",), "Completion length", "tokens, mean"),
    (("defects/*",), "Defects", "share of sampled completions"),
    (("loss",), "Loss", "GRPO objective; near 0 by construction"),
)


@dataclass(frozen=True)
class Line:
    """One series of a chart: (step, value) points."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    lines: tuple[Line, ...]
    svg: str

    @property
    def summary(self) -> str:
        """First and last value of each series as text, for screen readers."""
        ends = [
            f"{line.name} {show(line.points[0][1])} at step {line.points[0][0]:g}, "
            f"{show(line.points[-1][1])} at step {line.points[-1][0]:g}"
            for line in self.lines
        ]
        return f"{self.title}: {'; '.join(ends)}."


def read_history(path: Path) -> list[dict[str, Any]]:
    """Reads a trainer's `log_history.json`: a list of objects, one per logged step."""
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as a training log ({error}); train again") from None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise InputError(f"{path}: expected a list of objects, one per logged step; train again")
    return history


def training_charts(history: Sequence[dict[str, Any]], stage: str) -> list[Chart]:
    """The charts of a stage ("sft" or "grpo"), without those for which nothing was logged."""
    charts = []
    color = 1 if stage == "sft" else 2
    for keys, title, note in SFT_CHARTS if stage == "sft" else GRPO_CHARTS:
        lines = [line for key in keys for line in _lines(history, key, color)]
        if keys == ("rewards/*",):  # each reward has its own scale
            charts += [draw(*_reward_title(line.name, note), [line]) for line in lines]
        elif lines:
            if len(lines) > 1:
                lines = [Line(line.name, line.points, i) for i, line in enumerate(lines)]
            charts.append(draw(title, note, lines))
    return charts


def _reward_title(name: str, note: str) -> tuple[str, str]:
    if name == "no defect":  # logged as a reward of weight 0
        return "Answers without defect", "share of sampled completions"
    return f"{name.capitalize()} reward", note


def _lines(history: Sequence[dict[str, Any]], key: str, color: int) -> list[Line]:
    if key.endswith("*"):
        start = key[:-1]
        keys = {k for entry in history for k in entry if k.startswith(start) and not k.endswith("/std")}
    else:
        start, keys = "", {key}
    lines = []
    for name in sorted(keys):
        points = _points(history, name)
        if points and not (start == "defects/" and not any(value for _, value in points)):
            series_name = name.removesuffix("/mean").rpartition("/")[2].replace("_", " ")
            lines.append(Line(series_name, points, color))
    return lines


def _points(history: Sequence[dict[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    points = []
    for index, entry in enumerate(history, 1):
        value = entry.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            points.append((float(entry.get("step", index)), float(value)))
    return tuple(points)


def draw(title: str, note: str, lines: Sequence[Line]) -> Chart:
    """Draws a chart: the logged values as a thin line, their running mean as a bold one.

    A short series (`is_smoothed`) is drawn as it was logged.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((0.16, 0.135, 0.82, 0.835))
        for line in lines:
            _plot(axes, line)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.margins(x=0.02, y=0.08)
        steps = {step for line in lines for step, _ in line.points}
        axes.xaxis.set_major_locator(FixedLocator([*steps]) if len(steps) == 1 else MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    names = re.sub(r"\W+", "-", f"{title} {'/'.join(line.name for line in lines)}").lower()
    return Chart(title, note, tuple(lines), inline(stream.getvalue(), f"{names}-{lines[0].color}"))


def _plot(axes: Axes, line: Line) -> None:
    steps, values = zip(*line.points, strict=True)
    color = list(PLACEHOLDERS)[2 + line.color % len(SERIES)]
    if is_smoothed(line):
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        values = tuple(running_mean(values, max(1, len(values) // 25)))
    axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if len(values) == 1 else None)


def is_smoothed(line: Line) -> bool:
    """Whether the bold line of a series is its running mean. In a short series, the mean would hide the change."""
    return len(line.points) > 20


def tick_label(value: float) -> str:
    """A value of an axis, with a label of its own: an exponent above the axis would cover the chart's title."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        text = f"{value:g}"
    return text.replace("-", "\N{MINUS SIGN}")


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and its `width` neighbors on both sides."""
    windows = (values[max(0, i - width) : i + width + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def show(value: float) -> str:
    """A number with three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}"


def inline(svg: str, prefix: str) -> str:
    """Prepares an SVG file for embedding in HTML: removes prolog, namespaces and styles, and makes ids unique."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    svg = re.sub(r'\sid="(?:figure|axes|patch|matplotlib|line2d|text|xtick|ytick)[\w.]*"', "", svg)
    svg = re.sub(r'(\sid="|"#|url\(#)(?=[mp][0-9a-f]{8,}\b)', rf"\1{prefix}-", svg)
    for placeholder, variable in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    return svg.replace("'DejaVu Sans'", "var(--sans)").strip()
