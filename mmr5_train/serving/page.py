"""The server's web page: one self-contained HTML file, with a content security policy that enforces this."""

from __future__ import annotations

import base64
import hashlib
from pathlib import PurePath

from markupsafe import Markup

from mmr5_train.reporting.page import TEMPLATES, render_page
from mmr5_train.serving.settings import MB, Limits


def web_page(model: str, limits: Limits) -> tuple[str, dict[str, str]]:
    """The HTML and its headers.

    Their content security policy allows the page's own script and style, `data:` images and calls to this server.
    """
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "serve.css"))
    script = (TEMPLATES / "serve.js").read_text(encoding="utf-8")
    html = render_page(
        "serve.html.j2",
        style=Markup(style),
        script=Markup(script),
        model=shown_name(model),
        pages=limits.pages,
        pdf_bytes=int(limits.pdf_mb * MB),
        query_chars=limits.query_chars,
    )
    policy = {
        "default-src": "'none'",
        "script-src": _csp_hash(script),
        "style-src": _csp_hash(style),
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


def shown_name(model: str) -> str:
    """The model's name as the page shows it: of an absolute path, the last two parts."""
    path = PurePath(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
