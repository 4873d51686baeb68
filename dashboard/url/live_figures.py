"""Callbacks that redraw a chart when the address, the run or the colour theme changes."""

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
from dash import Dash, Input, Output, State, no_update

from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.timeline_marks import (
    Mark,
    SpikeMark,
    marks_from_events,
    spikes_from_events,
)
from geodiag.dashboard.figures.style import THEMES, Theme
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View

DrawFunction = Callable[[RunCache, View, Theme], Any]


def register_drawing(
    app: Dash, library: RunLibrary, name: str, prop: str, make: DrawFunction
) -> None:
    """Set property `prop` of component `name` to `make(cache, view, theme)` after every change."""

    @app.callback(
        Output(name, prop),
        Input("url", "search"),
        Input("pulse", "data"),
        Input("theme", "data"),
        State("url", "pathname"),
    )
    def draw(search, pulse, theme_name, pathname):
        cache = library.at_address(pathname)
        if cache is None or (pulse or {}).get("run") != cache.run.name:
            return no_update  # the pulse of this run comes next and draws the chart
        made = make(cache, View.parse(search), THEMES.get(theme_name, THEMES["light"]))
        if isinstance(made, go.Figure):
            # A constant revision keeps what the reader toggled when live data arrive.
            made.update_layout(uirevision=f"{pathname}{name}")
        return made


def detected_spikes(cache: RunCache) -> list[SpikeMark]:
    """Return the spikes of the run, oldest first."""
    return cache.memo("spikes", lambda: spikes_from_events(cache.events()))


def event_marks(cache: RunCache) -> list[Mark]:
    """Return the events that are marked on every time axis of the run."""
    return cache.memo("marks", lambda: marks_from_events(cache.events(), detected_spikes(cache)))


def step_extent(cache: RunCache) -> tuple[int, int] | None:
    """Return the first and the last step: the common time axis of all charts of a page."""
    step_S = cache.steps()["step"]
    return (int(step_S[0]), int(step_S[-1])) if len(step_S) else None
