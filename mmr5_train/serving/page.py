"""The web page of a server: one HTML file that loads nothing else, and the headers that hold it to that."""

from __future__ import annotations

import base64
import hashlib

from markupsafe import Markup

from mmr5_train.reporting.page import TEMPLATES, render_page
from mmr5_train.serving.settings import MB, Limits


def web_page(model: str, limits: Limits) -> tuple[str, dict[str, str]]:
    """The page, and headers under which only its own script and style run, and talk to this server alone."""
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "serve.css"))
    script = (TEMPLATES / "serve.js").read_text(encoding="utf-8")
    html = render_page(
        "serve.html.j2",
        style=Markup(style),
        script=Markup(script),
        model=model,
        pages=limits.pages,
        pdf_bytes=int(limits.pdf_mb * MB),
        query_chars=limits.query_chars,
    )
    policy = {
        "default-src": "'none'",
        "script-src": _source(script),
        "style-src": _source(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html, {
        "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
