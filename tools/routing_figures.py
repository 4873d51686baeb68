"""The pictures of docs/routing.md, from the trials that `geodiag bench routing` wrote:

python tools/routing_figures.py routing_trials.jsonl.gz
"""

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from playwright.sync_api import sync_playwright
from plotly.subplots import make_subplots

from geodiag.benchmarks.routing import order, read
from geodiag.benchmarks.routing_measures import losses, summarise
from geodiag.dashboard.figures.style import FONT, LIGHT

HERE = Path(__file__).resolve().parents[1] / "docs"
PALE = "#c3cad6"
ROLLED_BACK = "#d6336c"


def curves(
    trials: Sequence[Mapping[str, Any]], scenario: str, arms: Sequence[str], seed: int
) -> go.Figure:
    """Loss over executed steps, one panel an arm, over that of no intervention; what was rolled
    back is red.
    """
    by_arm = {
        t["arm"]["name"]: t
        for t in trials
        if t["scenario"]["name"] == scenario and t["seed"] == seed
    }
    figure = make_subplots(
        len(arms), 1, shared_xaxes=True, shared_yaxes="all", vertical_spacing=0.045
    )
    for row, name in enumerate(arms, 1):
        if name != "none":
            plain = losses(by_arm["none"])
            figure.add_scatter(y=plain, line={"color": PALE, "width": 1.2}, row=row, col=1)
        trial = by_arm[name]
        seen, steps = losses(trial), np.array(trial["steps"])
        last = {s: i for i, s in enumerate(steps)}
        replaced = np.array([last[s] != i for i, s in enumerate(steps)])
        figure.add_scatter(y=seen, line={"color": LIGHT.ink, "width": 1.4}, row=row, col=1)
        figure.add_scatter(
            y=np.where(replaced, seen, np.nan),
            line={"color": ROLLED_BACK, "width": 1.6},
            row=row,
            col=1,
        )
        for start, end in routed(trial):
            figure.add_vrect(
                start, end, fillcolor=LIGHT.on, opacity=0.13, line_width=0, row=row, col=1
            )
        label = {
            "text": name,
            "xref": "paper",
            "x": 0.995,
            "xanchor": "right",
            "y": 0.97,
            "yref": f"y{row if row > 1 else ''} domain",
        }
        figure.add_annotation(
            label | {"showarrow": False, "font": {"size": 14, "color": LIGHT.ink}}
        )
    figure.update_yaxes(title="loss", title_font_size=12)
    figure.update_xaxes(title="executed step", row=len(arms), col=1)
    return styled(figure, 1000, 130 * len(arms) + 60)


def routed(trial: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Spans of executed steps that were routed by older weights, from the events in their order."""
    steps = trial["steps"]
    begins = [0, *(i for i in range(1, len(steps)) if steps[i] < steps[i - 1]), len(steps)]
    spans: list[tuple[int, int]] = []
    start, attempt = None, -1
    for event in trial["events"]:
        if event["kind"] == "attempt":
            attempt += 1
        elif event["kind"] == "routing":
            within = range(begins[attempt], begins[attempt + 1])
            at = next((i for i in within if steps[i] >= event["step"]), begins[attempt + 1])
            if event["data"]["to"] == "on":
                start = at
            elif start is not None:
                spans.append((start, at))
                start = None
    return [*spans, (start, len(steps))] if start is not None else spans


def against_none(rows: Sequence[Mapping[str, Any]], measure: str, title: str) -> go.Figure:
    """Each arm's difference from no intervention, paired by seed, with its interval; left of 0 is
    better.
    """
    # Where no spike was detected, every answer to spikes is the training without one, bit for bit.
    rated = [r for r in rows if r["arm"] != "none" and r["against_none"].get(measure, {}).get("n")]
    found = [
        r for r in rated if r["against_none"][measure]["low"] or r["against_none"][measure]["high"]
    ]
    names = [f"{r['scenario']}   <b>{r['arm']}</b>" for r in found]
    cells = [r["against_none"][measure] for r in found]
    colours = [
        LIGHT.on if c["high"] < 0 else LIGHT.spike if c["low"] > 0 else LIGHT.soft for c in cells
    ]
    figure = go.Figure()
    for name, cell, colour in zip(names, cells, colours, strict=True):
        figure.add_scatter(
            x=[cell["low"], cell["high"]], y=[name, name], line={"color": colour, "width": 3}
        )
        figure.add_scatter(
            x=[cell["mean"]], y=[name], mode="markers", marker={"color": colour, "size": 10}
        )
    figure.add_vline(0, line={"color": LIGHT.ink, "width": 1})
    figure.update_xaxes(title=title)
    figure.update_yaxes(autorange="reversed", tickfont_size=12)
    return styled(figure, 1250, 24 * len(found) + 90)


def styled(figure: go.Figure, width: int, height: int) -> go.Figure:
    figure.update_layout(
        width=width,
        height=height,
        showlegend=False,
        font={"family": FONT, "size": 13, "color": LIGHT.ink},
        paper_bgcolor=LIGHT.paper,
        plot_bgcolor=LIGHT.paper,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
    )
    figure.update_xaxes(gridcolor=LIGHT.line, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=LIGHT.line, zeroline=False, automargin=True)
    return figure


def shoot(figures: Mapping[Path, go.Figure]) -> None:
    """Draws each in the system Chromium (or $CHROMIUM) and keeps the picture."""
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for path, figure in figures.items():
            size = {"width": int(figure.layout.width), "height": int(figure.layout.height)}
            page = browser.new_page(viewport=size, device_scale_factor=2)
            page.set_content(figure.to_html(include_plotlyjs=True, config={"staticPlot": True}))
            page.wait_for_selector(".main-svg")
            page.locator(".plot-container").screenshot(path=str(path))
            page.close()
            print(path)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", type=Path, help="trials of the bench, .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, default=HERE / "screenshots")
    options = parser.parse_args()
    trials = sorted(read([options.trials]), key=order)
    natural = trials_of(trials, "learning rate 0.1, hc, clamp")
    # The seed in which going back alone went back most often.
    seed = max((len(t["steps"]), t["seed"]) for t in natural if t["arm"]["name"] == "rollback")[1]
    arms = ("none", "rollback", "rollback + anticipatory", "rollback + lower-lr")
    small = "small, learning rate × 30 from step 90, hc, clamp"
    shoot(
        {
            options.out / "routing-natural.png": curves(
                natural, "learning rate 0.1, hc, clamp", arms, seed
            ),
            options.out / "routing-small.png": curves(trials, small, arms, 0),
            options.out / "routing-excess.png": against_none(
                summarise(trials), "excess", "excess loss against no intervention, nats · steps"
            ),
        }
    )


def trials_of(trials: Sequence[Mapping[str, Any]], scenario: str) -> list[Mapping[str, Any]]:
    return [t for t in trials if t["scenario"]["name"] == scenario]


if __name__ == "__main__":
    main()
