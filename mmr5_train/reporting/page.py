"""From a template to one self-contained page, and what the page pictures on it need."""

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
    """A template of `folders` or of this package, filled in; text is escaped."""
    loader = FileSystemLoader([*folders, TEMPLATES])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= FILTERS
    return environment.get_template(template).render(**values)


def picture_views(pictures: Mapping[PageId, Picture]) -> dict[PageId, dict[str, Any]]:
    """`pictures` of a template: each stands in the file once, under its `id`."""
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
    """A question's pages for a template: its anchor, the shape of its pages, and one sheet to enlarge for each."""
    sheets = []
    for page, number in numbers.items():
        record = pages.get(page)
        shows = record.description if record else ""
        said = shows or (record.text[:200] if record else "")
        alt = f"{page_name(page)}{': ' if said else ''}{' '.join(said.split())}"
        sheets.append({"page": page, "number": number, "relevant": page in relevant, "shows": shows, "alt": alt})
    ratios = sorted(pictures[page].width / pictures[page].height for page in numbers)
    return {"anchor": anchor, "sheets": sheets, "aspect": f"{ratios[len(ratios) // 2]:.3f}"}
