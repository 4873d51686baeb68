"""One page as one HTML file that contains style, charts and the charting library."""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from dash import html
from plotly.offline import get_plotlyjs

from geodiag.dashboard.components.basic import CHART_CONFIG, aria
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.reports.figure import light_and_dark, template
from geodiag.dashboard.reports.static_html import render

_HERE = Path(__file__).parent
_ASSETS = _HERE.parent / "assets"
_SENTENCE_PX = 130
"""Height of a sentence in place of a chart."""


class HtmlFile:
    """Collects the charts of a page, then writes the page as HTML."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._charts: list[dict[str, Any]] = []

    def chart(self, make: Callable[[Theme], go.Figure], what: str, axis: str = "") -> html.Div:
        """Add the figure that `make` draws and return its element; `what` is its accessible name.

        A zoom in time applies to all charts with the same `axis`.
        """
        name = f"chart-{len(self._charts)}"
        made = light_and_dark(make)
        if not made["figure"]["data"]:
            made["figure"]["layout"]["height"] = _SENTENCE_PX  # no data: only a sentence
        self._charts.append({"id": name, "axis": axis} | made)
        height = made["figure"]["layout"].get("height", 300)
        inside = html.Div(
            id=name, className="chart", style={"height": height}, role="img", **aria(what)
        )
        return html.Div(inside, className="chart-frame", style={"minHeight": height})

    def html(self, sections: Sequence[tuple[str, str, Any]], head: list, foot: str) -> str:
        """Return the text of the file. A section is (anchor, name in the menu, content)."""
        page = (_HERE / "page.js").read_text(encoding="utf-8")
        library = get_plotlyjs()
        data = {"charts": self._charts, "template": template(), "config": CHART_CONFIG}
        tabs = [
            html.Div(html.A(name, href=f"#{at}"), className="g-tab") for at, name, _ in sections
        ]
        top = [
            html.Div([*head, html.Nav(tabs, className="tabs", **aria("sections"))], className="nav")
        ]
        body = [html.Section(shown, id=at, className="part") for at, _, shown in sections]
        style = "\n".join(
            p.read_text(encoding="utf-8") for p in (_ASSETS / "style.css", _HERE / "page.css")
        )
        return f"""<!doctype html>
<html lang="en" data-mantine-color-scheme="light">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy([library, page])}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(self.title)}</title>
<link rel="icon" href="{_icon()}">
<style>{style}</style>
</head>
<body>
{render(html.Header(top, className="top"))}
<noscript><p class="notice notice-warn">The charts need JavaScript.</p></noscript>
{render(html.Main(body, id="page"))}
{render(html.Footer(foot, className="foot"))}
<script type="application/json" id="data">{_inert(data)}</script>
<script>{library}</script>
<script>{page}</script>
</body>
</html>
"""


def _policy(scripts: Sequence[str]) -> str:
    """Return a policy that forbids all fetches and all scripts but these two."""
    sums = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{s}'" for s in sums)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def _inert(data: Any) -> str:
    """Return JSON that cannot close the script element around it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _icon() -> str:
    return (
        "data:image/svg+xml;base64,"
        + base64.b64encode((_ASSETS / "favicon.svg").read_bytes()).decode()
    )


def logo() -> html.Img:
    """Return the logo, embedded in the page."""
    return html.Img(src=_icon(), alt="", width=22, height=22)
