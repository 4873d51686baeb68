"""The frame of every page: brand, name of the run, tabs, status, light or dark."""

from typing import Any
from urllib.parse import quote

import dash_mantine_components as dmc
import numpy as np
from dash import dcc, html
from flask import has_request_context, request

from geodiag.dashboard.components.basic import aria, badge, notice, tip
from geodiag.dashboard.components.text import ROUTING, STATUS, integer
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.timeline_marks import MARK_HELP
from geodiag.dashboard.url.live_figures import event_marks
from geodiag.dashboard.url.url_state import View
from geodiag.metrics.schema import ROUTING_MODES

REFRESH_MS = 1500
_DARK = [
    "#e6e9f0",
    "#c3c9d4",
    "#98a2b3",
    "#667085",
    "#3a4150",
    "#2a303c",
    "#1f2430",
    "#171b23",
    "#10131a",
    "#0b0d12",
]
_FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
THEME_COOKIE = "geodiag-theme"
MODES = {"warmup": "warm-up", "on": "anticipatory", "drain": "drain"}
"""Routing modes that are drawn as bands → their names in the legend."""
LEGEND = {
    kind: (kind.replace("_", " "), f"{meaning.capitalize()}.")
    for kind, meaning in MARK_HELP.items()
}
LEGEND |= {mode: (f"routing: {name}", ROUTING[mode]) for mode, name in MODES.items()}
LEGEND["superseded"] = (
    "rolled-back steps",
    "Steps before a rollback or a resume; a later attempt replaced them.",
)


def page_frame() -> dmc.MantineProvider:
    """Return the page without its content.

    The colour theme comes from a cookie, so that the first paint already has the right colours.
    """
    theme = request.cookies.get(THEME_COOKIE, "") if has_request_context() else ""
    known = theme if theme in ("light", "dark") else None
    return dmc.MantineProvider(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="interval", interval=REFRESH_MS, disabled=True),
            dcc.Store(id="theme", data=known or "light"),
            dcc.Store(id="theme-known", data=known is not None),
            *(dcc.Store(id=name) for name in ("tick", "pulse", "asked")),
            html.A("Skip to content", href="#page", className="skip"),
            html.Header(
                [html.Div(id="nav", className="nav"), html.Div(_right(), className="right")],
                className="top",
            ),
            html.Div(id="problems"),
            html.Div(id="legend"),
            html.Main(id="page", tabIndex=-1),
        ],
        id="provider",
        forceColorScheme=known or "light",
        theme={
            "primaryColor": "violet",
            "fontFamily": _FONT,
            "defaultRadius": "sm",
            "cursorType": "pointer",
            "colors": {"dark": _DARK},
        },
    )


def nav(
    cache: RunCache | None, tabs: list[tuple[str, str]], pathname: str, view: View, single: bool
) -> list:
    """Return brand, run and tabs. The tabs keep the selected steps, site and layer."""
    brand: Any = [html.Img(src="/assets/mark.svg", alt="", width=22, height=22), "geodiag"]
    out: list[Any] = [dcc.Link(brand, href="/", className="brand", title="all runs")]
    if cache is None:
        return out
    if not single:
        out.append(dcc.Link("runs", href="/", className="crumb"))
    out.append(html.Span(cache.run.name, className="crumb here", title=cache.run.url))
    kept = View(steps=view.steps, step=view.step, site=view.site, layer=view.layer).query_string()
    links = []
    for name, title in tabs:
        here = pathname.rstrip("/").endswith(f"/{name}")
        mark: Any = {"aria-current": "page"} if here else {}
        target = f"/run/{quote(cache.run.name)}/{name}{kept}"
        links.append(
            html.Div(
                dcc.Link(title, href=target), className="g-tab here" if here else "g-tab", **mark
            )
        )
    right: list[Any] = [html.Nav(links, className="tabs", **aria("pages of this run"))]
    if view.steps:
        low, high = map(integer, view.steps)
        back = f"{pathname}{view.replaced(steps=None).query_string()}"
        right.append(
            dcc.Link(
                f"steps {low} – {high}  ×", href=back, className="zoom", title="show all steps"
            )
        )
    return out + right


def run_status(cache: RunCache | None) -> list:
    """Return the status and the newest step of a run, for the top right of its pages."""
    if cache is None:
        return []
    steps = cache.steps()["step"]
    status = cache.run.status()
    step = f"step {integer(int(steps[-1]))}" if len(steps) else "no step yet"
    return [
        tip(html.Span(badge(status), tabIndex=0), STATUS[status]),
        html.Span(step, className="run-status-step"),
    ]


def legend(cache: RunCache | None, pathname: str) -> list:
    """Return a legend of the lines and bands in the charts of a page; empty if there are none."""
    if cache is None or pathname.rstrip("/").endswith("/events"):
        return []
    kinds = {m.kind for m in event_marks(cache)}
    if cache.superseded():
        kinds.add("superseded")
    if pathname.rstrip("/").endswith(("/overview", "/cascade")):
        kinds |= {ROUTING_MODES[m] for m in np.unique(cache.steps()["routing_mode"]) if m > 0}
    shown = {k: v for k, v in LEGEND.items() if k in kinds}
    return [
        tip(html.Span([html.I(className=f"key key-{k}"), name], tabIndex=0), meaning)
        for k, (name, meaning) in shown.items()
    ]


def problems(cache: RunCache | None) -> list:
    """Return a notice about the files that could not be read; everything else is shown."""
    found = cache.problems() if cache else {}
    if not found:
        return []
    lines = [html.Li([html.Code(name), f" {why}"]) for name, why in sorted(found.items())[:12]]
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    count = "1 file" if len(found) == 1 else f"{len(found)} files"
    summary = f"{count} of this run could not be read"
    return [notice(html.Details([html.Summary(summary + more), html.Ul(lines)]), "warn")]


def _right() -> list:
    button = dmc.ActionIcon(
        html.Span(className="sun"),
        id="theme-button",
        variant="subtle",
        color="gray",
        size="lg",
        **aria("light or dark"),
    )
    return [html.Div(id="run-status", className="run-status"), tip(button, "Light or dark")]
