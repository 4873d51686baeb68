"""Events: the audit trail. What was seen, asked, decided and done, each row with its reason."""

from typing import Any
from urllib.parse import quote

from dash import Dash, Input, Output, State, dcc, html, no_update

from geodiag.dashboard.components.components import card, notice
from geodiag.dashboard.components.table import table
from geodiag.dashboard.components.text import utc
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.live_figures import register_drawing
from geodiag.dashboard.url.url_state import View
from geodiag.events import KINDS, details
from geodiag.health import SPIKES

NAME, TITLE = "events", "Events"
_AROUND = 60
"""Steps shown before and after an event that was jumped to."""

_NUMBER = {"filter": "agNumberColumnFilter", "type": "rightAligned"}
_COMMAS = {"function": "d3.format(',')(params.value)"}
_COLUMNS: list[dict[str, Any]] = [
    {"field": "step", "headerName": "step", "width": 92, "valueFormatter": _COMMAS, **_NUMBER},
    {"field": "kind", "headerName": "kind", "width": 128, "cellRenderer": "Kind", "tooltipField": "meaning"},
    {"field": "message", "headerName": "message", "flex": 1, "minWidth": 280, "wrapText": True, "autoHeight": True},
    {"field": "layer", "headerName": "layer", "width": 88, **_NUMBER},
    {"field": "site", "headerName": "site", "width": 84},
    {"field": "expert", "headerName": "expert", "width": 92, **_NUMBER},
    {"field": "attempt", "headerName": "attempt", "width": 100, **_NUMBER},
    {"field": "time", "headerName": "time, UTC", "width": 172},
]  # fmt: skip


def layout(cache: RunCache, view: View) -> html.Div:
    trail = table("events-table", _COLUMNS, rows(cache), height="calc(100vh - 190px)")
    return html.Div(
        [
            card(
                "Audit trail",
                html.Div(_none(cache), id="events-none"),
                trail,
                tip="Every spike, request, answer, decision and change of state. "
                "Click a row for its step, a spike for its cascade. "
                + " ".join(f"{k}: {v}." for k, v in KINDS.items()),
            ),
            dcc.Location(id="events-jump", refresh="callback-nav"),
        ]
    )


def register(app: Dash, library: RunLibrary) -> None:
    register_drawing(app, library, "events-table", "rowData", lambda r, v, theme: rows(r))
    register_drawing(app, library, "events-none", "children", lambda r, v, theme: _none(r))

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
    """Where an event is looked at: a spike or a warning in its cascade, the rest in the middle of
    the overview.
    """
    step, run = event["step"], quote(cache.run.name)
    if event["kind"] in (*SPIKES, "cascade", "early_warning"):
        onset = details(event["data"]).get("spike_onset" if event["kind"] == "cascade" else "onset")
        at = onset if isinstance(onset, int) else step
        return f"/run/{run}/cascade{View(spike=at).query_string()}"
    view = View(steps=(max(0, step - _AROUND), step + _AROUND), step=step)
    return f"/run/{run}/overview{view.query_string()}"


def rows(cache: RunCache) -> list[dict[str, Any]]:
    """The trail as the table takes it, newest first: by time, for a rollback repeats steps."""
    out = []
    for i, e in enumerate(cache.events()):
        row = {k: e[k] for k in ("step", "kind", "message", "layer", "site", "expert", "attempt")}
        out.append(
            row | {"id": str(i), "time": utc(e["time"]), "meaning": KINDS.get(e["kind"], "")}
        )
    return out[::-1]


def _none(cache: RunCache) -> list:
    return [] if cache.events() else [notice("No events yet.")]
