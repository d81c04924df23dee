"""Renders templates to self-contained HTML pages, and prepares page pictures for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmr5_train.ranking.records import Page, PageId
from mmr5_train.reporting.pictures import Picture
from mmr5_train.reporting.views import FILTERS, page_name

TEMPLATES = Path(__file__).parents[1] / "templates"


def render_page(template: str, *folders: Path, **values: Any) -> str:
    """Renders a template from `folders` or from this package. Text is escaped."""
    loader = FileSystemLoader([*folders, TEMPLATES])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= FILTERS
    return environment.get_template(template).render(**values)


def picture_views(pictures: Mapping[PageId, Picture]) -> dict[PageId, dict[str, Any]]:
    """The template variable `pictures`. The HTML file contains each picture once, with its `id`."""
    return {
        page: {
            "id": f"page-{i}",
            "url": picture.url,
            "width": picture.width,
            "height": picture.height,
            "problem": picture.problem,
        }
        for i, (page, picture) in enumerate(pictures.items())
    }


def sheet_views(
    anchor: str,
    numbers: Mapping[PageId, int],
    relevant: Collection[PageId],
    pages: Mapping[PageId, Page],
    pictures: Mapping[PageId, Picture],
) -> dict[str, Any]:
    """A question's pages for a template: anchor, aspect ratio, and a sheet for each page that can be enlarged."""
    sheets = []
    for page, number in numbers.items():
        record = pages.get(page)
        shows = record.description if record else ""
        description = shows or (record.text[:200] if record else "")
        alt = f"{page_name(page)}{': ' if description else ''}{' '.join(description.split())}"
        sheets.append({"page": page, "number": number, "relevant": page in relevant, "shows": shows, "alt": alt})
    ratios = sorted(pictures[page].width / pictures[page].height for page in numbers)
    return {"anchor": anchor, "sheets": sheets, "aspect": f"{ratios[len(ratios) // 2]:.3f}"}
