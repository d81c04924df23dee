"""Draws a synthetic document page: a title, lines of text, one figure, a footer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

COLORS = ("red", "blue", "green", "orange", "purple", "grey")
KINDS = ("bar chart", "line chart", "pie chart", "table")

WIDTH, HEIGHT = 600, 800  # pixels; large enough to read
FIGURE = (40, 300, 560, 745)  # left, top, right, bottom of the figure
INK, PAPER, RULE = (40, 40, 48), (255, 255, 255), (200, 200, 206)

_RGB = {
    "red": (208, 36, 40),
    "blue": (36, 84, 200),
    "green": (24, 140, 64),
    "orange": (240, 140, 20),
    "purple": (132, 44, 168),
    "grey": (120, 124, 130),
}
_BANDS = {
    "Financial report": (226, 232, 240),
    "Research report": (236, 240, 226),
    "Guidebook": (244, 236, 222),
    "Administration file": (238, 230, 240),
}
_LABELS = ("North", "South", "East", "West", "Centre", "Coast", "Hills")

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class PageContent:
    """The content of a page. `noise` seeds everything without meaning: values, shades, line spacing."""

    title: str
    lines: tuple[str, ...]
    color: str
    kind: str
    domain: str
    number: int
    noise: int

    @property
    def description(self) -> str:
        """What the page shows, e.g. "an orange table"."""
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.kind}"

    @property
    def text(self) -> str:
        """The words on the page as OCR would return them, without those inside the figure."""
        return "\n".join((self.title, *self.lines, f"{self.domain}, page {self.number}"))


def draw_page(content: PageContent) -> Image.Image:
    """The page as an RGB image of `WIDTH` × `HEIGHT` pixels."""
    rng = random.Random(content.noise)
    page = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, WIDTH, 64), fill=_BANDS[content.domain])
    draw.text((40, 18), content.title[:1].upper() + content.title[1:], fill=INK, font=_font(28))
    y = 92
    for line in content.lines:
        draw.text((40, y), line, fill=INK, font=_font(16))
        y += 32 + rng.randint(0, 4)
    shade = rng.randint(-14, 14)
    r, g, b = (min(255, max(0, c + shade)) for c in _RGB[content.color])
    figure = {"bar chart": _bars, "line chart": _line, "pie chart": _pie, "table": _table}[content.kind]
    figure(draw, rng, (r, g, b))
    draw.line((40, 764, 560, 764), fill=RULE)
    draw.text((40, 770), f"{content.domain}, page {content.number}", fill=INK, font=_font(14))
    return page


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # shipped with Pillow, so the same on every machine


def _lighter(color: Color, share: float) -> Color:
    r, g, b = (round(c + (255 - c) * share) for c in color)
    return r, g, b


def _axes(draw: ImageDraw.ImageDraw) -> Box:
    left, top, right, bottom = FIGURE
    plot = (left + 36, top + 10, right, bottom - 34)
    for step in range(5):
        y = plot[1] + (plot[3] - plot[1]) * step // 4
        draw.line((plot[0], y, plot[2], y), fill=RULE)
        draw.text((left, y - 8), str(100 - 25 * step), fill=INK, font=_font(14))
    draw.line((plot[0], plot[1], plot[0], plot[3]), fill=INK, width=2)
    draw.line((plot[0], plot[3], plot[2], plot[3]), fill=INK, width=2)
    return plot


def _bars(draw: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    left, top, right, bottom = _axes(draw)
    count = rng.randint(4, 6)
    slot = (right - left) / count
    for i in range(count):
        x = left + slot * i + slot * 0.18
        y = bottom - (bottom - top) * rng.uniform(0.35, 0.98)
        draw.rectangle((x, y, x + slot * 0.64, bottom), fill=color)
        draw.text((x, bottom + 8), _LABELS[i], fill=INK, font=_font(14))


def _line(draw: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    left, top, right, bottom = _axes(draw)
    count = rng.randint(5, 7)
    value, points = rng.uniform(0.2, 0.8), []
    for i in range(count):
        points.append((left + (right - left) * (i + 0.5) / count, bottom - (bottom - top) * value))
        draw.text((points[-1][0] - 16, bottom + 8), str(2015 + i), fill=INK, font=_font(14))
        value = min(0.95, max(0.06, value + rng.choice((-1, 1)) * rng.uniform(0.12, 0.4)))
    draw.line(points, fill=color, width=14, joint="curve")
    for x, y in points:
        draw.ellipse((x - 14, y - 14, x + 14, y + 14), fill=color)


def _pie(draw: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    left, top, right, bottom = FIGURE
    radius = (bottom - top) // 2 - 6
    x, y = (left + right) // 2 + rng.randint(-40, 40), (top + bottom) // 2
    box = (x - radius, y - radius, x + radius, y + radius)
    cuts = sorted(rng.sample(range(30, 360, 30), rng.randint(2, 4)))
    start = 0
    for i, stop in enumerate([*cuts, 360]):
        draw.pieslice(box, start, stop, fill=_lighter(color, 0.14 * (i % 4)), outline=PAPER, width=5)
        middle = math.radians((start + stop) / 2)
        at = (x + radius * 0.6 * math.cos(middle) - 14, y + radius * 0.6 * math.sin(middle) - 8)
        draw.text(at, f"{round((stop - start) / 3.6)}%", fill=PAPER, font=_font(16))
        start = stop


def _table(draw: ImageDraw.ImageDraw, rng: random.Random, color: Color) -> None:
    left, top, right, bottom = FIGURE
    rows, columns = rng.randint(6, 8), rng.randint(3, 4)
    height, width = (bottom - top) / rows, (right - left) / columns
    for r in range(rows):
        y = top + height * r
        fill = color if r == 0 else _lighter(color, 0.62 if r % 2 else 0.9)
        draw.rectangle((left, y, right, y + height), fill=fill)
        for c in range(columns):
            words = ("Region", "2021", "2022", "2023")[c] if r == 0 else str(rng.randint(10, 990))
            label = _LABELS[r % len(_LABELS)] if c == 0 and r else words
            draw.text((left + width * c + 12, y + height / 2 - 9), label, fill=INK if r else PAPER, font=_font(16))
    for r in range(rows + 1):
        draw.line((left, top + height * r, right, top + height * r), fill=INK, width=2)
    for c in range(columns + 1):
        draw.line((left + width * c, top, left + width * c, bottom), fill=INK, width=2)
