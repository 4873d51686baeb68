"""Page Runs: the list of runs with status, loss, spikes and composite gain."""

from functools import partial
from typing import Any
from urllib.parse import quote

import numpy as np
from dash import Dash, Input, Output, State, dcc, html, no_update

from geodiag.dashboard.components.basic import card
from geodiag.dashboard.components.table import table
from geodiag.dashboard.components.text import metric, metric_help, number, utc
from geodiag.dashboard.components.tiles import COMPOSITES, worst_now
from geodiag.dashboard.data.grid import row_name
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.live_figures import detected_spikes
from geodiag.health import SPIKES

NAME = "runs"
TITLE = "Runs"
_SPARK = 90
"""Points of the small loss curve."""
_MANY = 40
"""Longer lists get a scroll bar of their own."""

_NUMBER = {"filter": "agNumberColumnFilter", "type": "rightAligned"}
_COMMAS = {"function": "params.value == null ? '–' : d3.format(',')(params.value)"}
_DIGITS = {
    "function": "params.value == null ? params.data.no_loss : d3.format('.4g')(params.value)"
}
_TIMES = "'×' + d3.format('.4g')(params.value) + params.data.gain_at"
_GAIN = {"function": f"params.value == null ? params.data.no_gain : {_TIMES}"}
_LOSS_HELP, _GAIN_HELP = (
    metric_help(metric("steps", "loss")),
    metric_help(metric("layers", COMPOSITES[0])),
)
_COLUMNS: list[dict[str, Any]] = [
    {"field": "name", "headerName": "run", "flex": 1, "minWidth": 104, "cellRenderer": "RunLink",
     "tooltipField": "name"},
    {"field": "status", "headerName": "status", "width": 106, "cellRenderer": "Status"},
    {"field": "step", "headerName": "last step", "width": 86, "valueFormatter": _COMMAS, **_NUMBER},
    {"field": "spark", "headerName": "loss over steps", "width": 128, "cellRenderer": "Spark",
     "cellDataType": False, "sortable": False, "filter": False},
    {"field": "loss", "headerName": "loss", "width": 82, "headerTooltip": _LOSS_HELP,
     "valueFormatter": _DIGITS, **_NUMBER},
    {"field": "spikes", "headerName": "spikes", "width": 82, **_NUMBER},
    {"field": "gain", "headerName": "gain now", "width": 140, "headerTooltip": _GAIN_HELP,
     "valueFormatter": _GAIN, **_NUMBER},
    {"field": "model", "headerName": "model", "width": 102},
    {"field": "began", "headerName": "started, UTC", "width": 138, "sort": "desc"},
]  # fmt: skip


def layout(library: RunLibrary) -> html.Div:
    """Return the page: the table of runs."""
    now = rows(library)
    runs = table(
        "runs-table", _COLUMNS, now, height="calc(100vh - 180px)" if len(now) > _MANY else None
    )
    help = "All runs in the served folder, updated while you watch. Click a run to open it."
    return html.Div(
        [card("Runs", runs, tip=help), dcc.Location(id="runs-jump", refresh="callback-nav")]
    )


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks of the page."""

    @app.callback(
        Output("runs-table", "rowData"),
        Input("tick", "data"),
        State("runs-table", "rowData"),
        prevent_initial_call=True,
    )
    def follow(tick, shown):
        now = rows(library)
        return now if now != shown else no_update

    @app.callback(
        Output("runs-jump", "href"), Input("runs-table", "cellClicked"), prevent_initial_call=True
    )
    def go(cell):
        return (
            f"/run/{quote(str(cell['rowId']))}/overview"
            if cell and cell.get("rowId")
            else no_update
        )


def rows(library: RunLibrary) -> list[dict[str, Any]]:
    """Return one row per run, computed once for each version of the run."""
    caches = [r for r in map(library.get, library.names()) if r is not None]
    return [r.memo("row", partial(_row, r)) | {"status": r.run.status()} for r in caches]


def _row(cache: RunCache) -> dict[str, Any]:
    steps = cache.steps()
    some = len(steps["step"]) > 0
    worst = worst_now(cache, *COMPOSITES)
    gain, _, at = worst.worst() if worst else (None, None, None)  # type: ignore[misc]
    loss = float(steps["loss"][-1]) if some and np.isfinite(steps["loss"][-1]) else None
    return {
        "id": cache.run.name,
        "name": cache.run.name,
        "step": int(steps["step"][-1]) if some else None,
        "spark": _spark(steps),
        "loss": loss,
        "no_loss": number(float(steps["loss"][-1]) if some else None),
        "spikes": len([s for s in detected_spikes(cache) if s.kind in SPIKES]),
        "gain": gain if gain is not None and np.isfinite(gain) else None,
        "no_gain": number(gain),
        "gain_at": f" at {row_name(at)}" if at else "",
        "model": ", ".join(
            str(value) for key in ("residual", "size") if (value := cache.setting(key))
        )
        or "–",
        "began": utc(cache.run.manifest.get("created"), "%Y-%m-%d %H:%M"),
    }


def _spark(steps: dict[str, np.ndarray]) -> list[float | None]:
    """Return the largest loss of each of a few dozen parts, so that a spike stays visible."""
    loss_S = np.where(np.isinf(steps["loss"]), np.nan, steps["loss"])
    parts = np.array_split(loss_S, min(_SPARK, max(1, len(loss_S))))
    return [
        round(float(np.nanmax(p)), 4) if len(p) and not np.isnan(p).all() else None for p in parts
    ]
