"""Building blocks of the pages: cards, tiles, help buttons, graphs, notices."""

from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
import plotly.graph_objects as go
from dash import dcc, html

_REMOVED = [
    "select2d",
    "lasso2d",
    "autoScale2d",
    "zoomIn2d",
    "zoomOut2d",
    "pan2d",
    "zoom2d",
    "sendChartToCloud",
]
CHART_CONFIG: Any = {
    "displaylogo": False,
    "plotlyServerURL": "",  # no button that uploads a chart to Plotly's servers
    "responsive": True,
    "doubleClick": "autosize",
    "displayModeBar": "hover",
    "modeBarButtonsToRemove": _REMOVED,
    "showTips": False,
}
"""Plotly's configuration of every chart."""


def card(
    title: str, *children: Any, tip: str = "", controls: Any = None, **more: Any
) -> html.Section:
    """Return a framed part of a page with a title, a help button and controls."""
    head = [
        html.H2(title),
        bubble(title, tip) if tip else None,
        html.Div(controls, className="card-controls"),
    ]
    return html.Section(
        [html.Div(head, className="card-head"), *children], className="card", **more
    )


def bubble(about: str, text: str) -> dmc.Tooltip:
    """Return a small "?" button with an explanation; it can be reached by keyboard."""
    mark = html.Button("?", className="bubble", type="button", **aria(f"{about}: {text}"))
    return tip(mark, text)


def tip(child: Any, text: str) -> dmc.Tooltip:
    """Return `child` with an explanation on hover and on focus."""
    return dmc.Tooltip(
        child,
        label=text,
        multiline=True,
        w=280,
        withArrow=True,
        openDelay=150,
        events={"hover": True, "focus": True, "touch": True},
    )


def graph(name: str, height: int) -> html.Div:
    """Return a chart that a callback fills. Its space is reserved, so that nothing moves later."""
    chart = dcc.Graph(
        id=name, figure=_blank(height), config=CHART_CONFIG, className="chart", responsive="auto"
    )
    return html.Div(chart, className="chart-frame", style={"minHeight": height})


def tile(label: str, value: Any, note: str = "", text: str = "", tone: str = "") -> Any:
    """Return one headline number with its label, a note and an explanation."""
    inside = [
        html.Span(label, className="tile-label"),
        html.Span(value, className=f"tile-value {tone}"),
        html.Span(note, className="tile-note"),
    ]
    return tip(html.Div(inside, className="tile", tabIndex=0), text)


def badge(status: str) -> html.Span:
    """Return the status of a run as a colour and a word."""
    return html.Span([html.Span(className="dot"), status], className=f"badge badge-{status}")


def notice(text: Any, kind: str = "info") -> html.Div:
    """Return a line about what is missing or wrong."""
    return html.Div(text, className=f"notice notice-{kind}", role="note")


def aria(label: str) -> dict[str, Any]:
    """Return an accessible name for screen readers."""
    return {"aria-label": label}


def options(labels: Mapping[str, str]) -> list[dict[str, str]]:
    """Return `value → label` as options of a select or of segments."""
    return [{"value": value, "label": label} for value, label in labels.items()]


def select(name: str, value: str | None, options: list, label: str, width: int = 210) -> dmc.Select:
    """Return a drop-down list."""
    return dmc.Select(
        id=name,
        value=value,
        data=options,
        size="xs",
        w=width,
        allowDeselect=False,
        checkIconPosition="right",
        maxDropdownHeight=380,
        **aria(label),
    )


def segments(name: str, value: str, options: list, label: str) -> dmc.SegmentedControl:
    """Return a row of buttons of which one is selected."""
    return dmc.SegmentedControl(id=name, value=value, data=options, size="xs", **aria(label))


def _blank(height: int) -> go.Figure:
    hidden = {"visible": False}
    clear = "rgba(0,0,0,0)"
    return go.Figure(
        layout={
            "height": height,
            "xaxis": hidden,
            "yaxis": hidden,
            "paper_bgcolor": clear,
            "plot_bgcolor": clear,
        }
    )
