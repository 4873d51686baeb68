"""What every chart of a run has in common: when it is redrawn, and what it is drawn from."""

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
from dash import Dash, Input, Output, State, no_update

from geodiag.dashboard.data.run_cache import Record
from geodiag.dashboard.data.timeline_marks import Mark, Spike, marks, spikes
from geodiag.dashboard.figures.style import LOOKS, Look
from geodiag.dashboard.server.run_library import Library
from geodiag.dashboard.url.url_state import View

Drawing = Callable[[Record, View, Look], Any]


def draws(app: Dash, library: Library, name: str, prop: str, make: Drawing) -> None:
    """`name.prop` is `make(record, view, look)`, made anew when the address, the run or the look
    changes.
    """

    @app.callback(
        Output(name, prop),
        Input("url", "search"),
        Input("pulse", "data"),
        Input("theme", "data"),
        State("url", "pathname"),
    )
    def draw(search, pulse, theme, pathname):
        record = library.at(pathname)
        if record is None or (pulse or {}).get("run") != record.run.name:
            return no_update  # the pulse of this run is on its way, and draws
        made = make(record, View.parse(search), LOOKS.get(theme, LOOKS["light"]))
        if isinstance(made, go.Figure):
            made.update_layout(
                uirevision=f"{pathname}{name}"
            )  # a live update keeps what the reader toggled
        return made


def raised(record: Record) -> list[Spike]:
    """The run's spikes, read from its events once a version."""
    return record.memo("spikes", lambda: spikes(record.events()))


def happened(record: Record) -> list[Mark]:
    """What gets a line on every time axis of the run."""
    return record.memo("marks", lambda: marks(record.events(), raised(record)))


def extent(record: Record) -> tuple[int, int] | None:
    """First and last step, so that all charts of a page share one time axis."""
    step_S = record.steps()["step"]
    return (int(step_S[0]), int(step_S[-1])) if len(step_S) else None
