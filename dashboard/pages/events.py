"""Page Events: the audit trail of spikes, requests, decisions and actions, with reasons."""

from typing import Any
from urllib.parse import quote

from dash import Dash, Input, Output, State, dcc, html, no_update

from geodiag.dashboard.components.basic import card, notice
from geodiag.dashboard.components.table import table
from geodiag.dashboard.components.text import utc
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.live_figures import register_drawing
from geodiag.dashboard.url.url_state import View
from geodiag.events import KINDS, details
from geodiag.health import SPIKES

NAME = "events"
TITLE = "Events"
_AROUND = 60
"""Steps shown before and after an event that was clicked."""

_NUMBER = {"filter": "agNumberColumnFilter", "type": "rightAligned"}
_COMMAS = {"function": "d3.format(',')(params.value)"}
_COLUMNS: list[dict[str, Any]] = [
    {"field": "step", "headerName": "step", "width": 92, "valueFormatter": _COMMAS, **_NUMBER},
    {"field": "kind", "headerName": "kind", "width": 128, "cellRenderer": "Kind",
     "tooltipField": "meaning"},
    {"field": "message", "headerName": "message", "flex": 1, "minWidth": 280, "wrapText": True,
     "autoHeight": True},
    {"field": "layer", "headerName": "layer", "width": 88, **_NUMBER},
    {"field": "site", "headerName": "site", "width": 84},
    {"field": "expert", "headerName": "expert", "width": 92, **_NUMBER},
    {"field": "attempt", "headerName": "attempt", "width": 100, **_NUMBER},
    {"field": "time", "headerName": "time, UTC", "width": 172},
]  # fmt: skip


def layout(cache: RunCache, view: View) -> html.Div:
    """Return the page: the table of all events."""
    trail = table("events-table", _COLUMNS, rows(cache), height="calc(100vh - 190px)")
    return html.Div(
        [
            card(
                "Audit trail",
                html.Div(_none(cache), id="events-none"),
                trail,
                tip="Every spike, request, answer, decision and change of state. "
                "Click a row to open its step, a spike to open its cascade. "
                + " ".join(f"{k}: {v}." for k, v in KINDS.items()),
            ),
            dcc.Location(id="events-jump", refresh="callback-nav"),
        ]
    )


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks of the page."""
    register_drawing(app, library, "events-table", "rowData", lambda c, v, _: rows(c))
    register_drawing(app, library, "events-none", "children", lambda c, v, _: _none(c))

    @app.callback(
        Output("events-jump", "href"),
        Input("events-table", "cellClicked"),
        State("events-table", "rowData"),
        State("url", "pathname"),
        prevent_initial_call=True,
    )
    def go(cell, shown, pathname):
        cache = library.at_address(pathname)
        row = next((r for r in shown or [] if cell and r["id"] == str(cell.get("rowId"))), None)
        return jump(cache, cache.events()[int(row["id"])]) if cache and row else no_update


def jump(cache: RunCache, event: dict[str, Any]) -> str:
    """Return the address of an event: the cascade of a spike or a warning, else the overview."""
    step = event["step"]
    run = quote(cache.run.name)
    if event["kind"] in (*SPIKES, "cascade", "early_warning"):
        onset = details(event["data"]).get("spike_onset" if event["kind"] == "cascade" else "onset")
        at = onset if isinstance(onset, int) else step
        return f"/run/{run}/cascade{View(spike=at).query_string()}"
    view = View(steps=(max(0, step - _AROUND), step + _AROUND), step=step)
    return f"/run/{run}/overview{view.query_string()}"


def rows(cache: RunCache) -> list[dict[str, Any]]:
    """Return the rows of the table, newest first by time, because a rollback repeats steps."""
    out = []
    for i, e in enumerate(cache.events()):
        row = {k: e[k] for k in ("step", "kind", "message", "layer", "site", "expert", "attempt")}
        out.append(
            row | {"id": str(i), "time": utc(e["time"]), "meaning": KINDS.get(e["kind"], "")}
        )
    return out[::-1]


def _none(cache: RunCache) -> list:
    return [] if cache.events() else [notice("No events so far.")]
