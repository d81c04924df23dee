"""Makes synthetic documents whose pages differ only visually: by the colour and the kind of a figure.

A document has two sections. The pages of a section share their words, so a text retriever finds the section but
not the page. The pages differ in the figure: each shares its colour or its kind, but not both, with another page
of its section (a hard negative), and a question names both. The content of a page is known ("a red bar chart"), so
a model's statements about it can be checked.

Questions come from up to two populations. *Catalogue* questions name colour and kind as page descriptions do.
*Users'* questions ask for the same pages in other sentences, and half of them use another word for the kind. One
part of the users' wording is for training. The other, `USERS_UNSEEN`, is for evaluation only: it shows whether a
model generalises. The question types hold the population.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from typing import Any

from data_construction.corpus.drawing import COLORS, KINDS, PageContent, draw_page

DOMAINS = ("Financial report", "Research report", "Guidebook", "Administration file")
ORGANISATIONS = (
    "Alder", "Birch", "Cedar", "Dunmore", "Elmwood", "Farrow", "Granite", "Harbour", "Iverness", "Juniper",
    "Kestrel", "Larkspur", "Meridian", "Northgate", "Oakfield", "Pinecrest", "Quarry", "Riverton", "Summit",
    "Thornhill", "Upland", "Vale", "Westbrook", "Yarrow",
)  # fmt: skip
TOPICS = (
    "annual revenue", "water use", "staff turnover", "export volume", "energy demand", "crop yield",
    "road traffic", "patient visits", "school enrolment", "tourist arrivals", "air quality", "housing prices",
    "train delays", "forest cover", "waste recycling", "library loans", "market share", "factory output",
    "fish stocks", "customer returns", "internet access", "food imports", "solar capacity", "rainfall levels",
    "museum tickets", "bus ridership", "loan defaults", "parcel delivery", "hospital beds", "museum funding",
)  # fmt: skip
QUERIES = (
    "Which page shows {what} about {topic}?",
    "Where is {what} on {topic}?",
    "Find the page with {what} for {topic}.",
    "On which page is {topic} given as {what}?",
)
CATALOGUE, USERS, USERS_UNSEEN = "catalogue", "users", "users_unseen"  # question types


@dataclass(frozen=True)
class Wording:
    """How users ask: sentence forms, and other words for each kind of figure."""

    forms: tuple[str, ...]
    kinds: dict[str, tuple[str, ...]]


WORDINGS = {
    USERS: Wording(
        (
            "I need the {topic} page, the {kind} one drawn in {color}.",
            "My colleague remembers a {kind} for {topic} and says that its colour was {color}.",
            "Somebody drew {topic} in {color}, as a {kind}. Which page is it?",
            "Please show me {topic}. It was a {kind} and it was {color}.",
        ),
        {
            "bar chart": ("bar graph", "bar plot"),
            "line chart": ("line graph", "line plot"),
            "pie chart": ("pie graph", "pie diagram"),
            "table": ("data table", "spreadsheet"),
        },
    ),
    USERS_UNSEEN: Wording(
        (
            "Looking for the {color} one on {topic}, a {kind} I think.",
            "Do we have {topic} as {kind}? {color}, if I remember well.",
            "Which {kind} in {color} deals with {topic}?",
        ),
        {
            "bar chart": ("column graph",),
            "line chart": ("curve",),
            "pie chart": ("circle diagram",),
            "table": ("grid of numbers",),
        },
    ),
}
OTHER_WORD = 0.5  # share of users' questions with another word for the kind
SENTENCES = (
    "The figures for {topic} are taken from the yearly survey.",
    "Since last year, {topic} changed less than expected.",
    "Regional offices reported their numbers in March.",
    "All values are rounded and may not add up.",
    "A longer discussion follows in the next section.",
    "Readers should compare {topic} with the earlier editions.",
    "The method was revised after an outside review.",
    "{topic} remains the main concern of this section.",
    "Small samples were merged before publication.",
    "The committee asked for a closer look at {topic}.",
)
SECTION_SIZES = (4, 5, 5, 5, 6)
MAX_SECTION = len(COLORS) * len(KINDS)  # pages that all differ
TWO_RELEVANT = 0.7  # share of sections with two pages that show the same


@dataclass(frozen=True)
class SyntheticDocument:
    doc_name: str
    domain: str
    pages: tuple[PageContent, ...]
    questions: tuple[dict[str, Any], ...]  # as in the annotations file


def make_section(rng: random.Random, size: int, two_relevant: float) -> list[tuple[str, str]]:
    """(colour, kind) of each page of a section. Each page shares exactly one of the two with another page."""
    colors, kinds = (rng.sample(COLORS, 3), rng.sample(KINDS, 2)) if size <= 6 else (COLORS, KINDS)
    grid = [(color, kind) for color in colors for kind in kinds]
    rng.shuffle(grid)
    shown = grid[:size]
    if rng.random() < two_relevant:
        shown[-1] = shown[0]
    rng.shuffle(shown)
    for i, (color, kind) in enumerate(shown):
        if not any((color == c) != (kind == k) for c, k in shown):
            # This page shares both or neither with every other page: give it the kind of another page.
            shown[i] = (color, next(k for _, k in shown if k != kind))
    return shown


def make_document(
    index: int,
    seed: int,
    two_relevant: float = TWO_RELEVANT,
    *,
    users: bool = False,
    section_pages: int | None = None,
) -> SyntheticDocument:
    """Document number `index`. It depends only on the seed and its index, not on the number of documents.

    `users` adds two users' questions to each catalogue question, one in each wording. It changes nothing else.
    `section_pages` is the size of each section, at most `MAX_SECTION`; None: 4 to 6 pages, chosen at random.
    """
    rng, users_rng = random.Random(f"{seed}/{index}"), random.Random(f"{seed}/{index}/users")
    organisation, domain = rng.choice(ORGANISATIONS), rng.choice(DOMAINS)
    topics = rng.sample(TOPICS, 2)
    pages: list[PageContent] = []
    questions: list[dict[str, Any]] = []
    for topic in topics:
        first = len(pages)
        section = make_section(rng, section_pages or rng.choice(SECTION_SIZES), two_relevant)
        for color, kind in section:
            lines = [s.format(topic=topic) for s in rng.sample(SENTENCES, rng.randint(3, 5))]
            lines = [line[0].upper() + line[1:] for line in lines]
            title = f"{organisation}: {topic}"
            number = len(pages) + 1
            pages.append(PageContent(title, tuple(lines), color, kind, domain, number, rng.getrandbits(32)))
        for color, kind in dict.fromkeys(section):
            relevant = [first + i for i, shown in enumerate(section) if shown == (color, kind)]
            content = pages[relevant[0]]
            query = rng.choice(QUERIES).format(what=content.description, topic=topic)
            figure = "Table" if kind == "table" else "Chart"
            questions.append(_question(query, relevant, [figure, CATALOGUE] if users else [figure]))
            for population, wording in WORDINGS.items() if users else ():
                query = users_query(wording, topic, color, kind, users_rng)
                questions.append(_question(query, relevant, [figure, population]))
    name = f"{organisation.lower()}-{index:05d}"
    return SyntheticDocument(name, domain, tuple(pages), tuple(questions))


def users_query(wording: Wording, topic: str, color: str, kind: str, rng: random.Random) -> str:
    """A question for the page with a figure of this colour and kind, as a user asks it."""
    word = rng.choice(wording.kinds[kind]) if rng.random() < OTHER_WORD else kind
    query = rng.choice(wording.forms).format(topic=topic, color=color, kind=word)
    return query[0].upper() + query[1:]


def _question(query: str, relevant: list[int], types: list[str]) -> dict[str, Any]:
    """A question in the form of MMDocIR's annotations."""
    return {
        "Q": query,
        "A": f"page {relevant[0] + 1}",
        "page_id": relevant,
        "type": str(types),
        "layout_mapping": [],
    }


def page_rows(document: SyntheticDocument) -> list[dict[str, Any]]:
    """The rows of the document in the page parquet."""
    rows = []
    for number, content in enumerate(document.pages):
        jpeg = io.BytesIO()
        draw_page(content).save(jpeg, "JPEG", quality=85)
        rows.append(
            {
                "doc_name": document.doc_name,
                "domain": document.domain,
                "passage_id": str(number),
                "image_path": f"page_images/{document.doc_name}_{number}.jpg",
                "image_binary": jpeg.getvalue(),
                "ocr_text": content.text,
                "vlm_text": content.description,
            }
        )
    return rows
