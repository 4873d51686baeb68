"""The way back to the training: ask for a routing policy, see it *asked*, then see it *on*."""

import time
from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import Dash, Input, Output, State, ctx, html, no_update

from geodiag.control import MODES
from geodiag.dashboard.components.components import aria, card, notice, tip
from geodiag.dashboard.components.text import POLICY, ROUTING, integer
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.errors import GeodiagError
from geodiag.events import details

_CONTROLS = (*(f"ask-{m}" for m in MODES), "ask-delay")
_DELAY, _MOST_DELAY = 8, 64
_WHY_NOT = "The training is not running, so nobody would answer. It was last seen at step {step}."


def panel(cache: RunCache) -> html.Section:
    """The buttons; `state` fills in what is going on."""
    now = _show(cache, None)
    looks = dict(zip(MODES, now["variants"], strict=True))
    idle = now["disabled"][0]
    buttons = [
        tip(dmc.Button(m, id=f"ask-{m}", size="xs", variant=looks[m], disabled=idle), POLICY[m])
        for m in MODES
    ]
    steps = dmc.NumberInput(
        id="ask-delay", value=delay(cache), disabled=idle, min=0, max=_MOST_DELAY, allowDecimal=False,
        size="xs", w=86,
        **aria("delay in steps"),
    )  # fmt: skip
    about = "Which weights choose the experts. The request is one small file; the training obeys at its next step."
    return card(
        "Anticipatory routing",
        html.Div(
            [dmc.ButtonGroup(buttons), html.Label(["Δ", steps, "steps"], className="delay")],
            className="ask",
        ),
        html.Div(now["state"], id="control-state"),
        tip=about,
    )


def state(cache: RunCache, error: str | None = None) -> list:
    """*Asked* or not, what holds now, and why it was last decided."""
    steps, events, request = cache.steps(), cache.events(), cache.run.pending()
    mode = cache.routing_mode()
    since = _since(steps) if len(steps["step"]) else None
    lines: list[Any] = []
    if error:
        lines.append(notice(error, "bad"))
    if request is not None:
        age = max(0, round(time.time() - request.time))
        lag = "" if request.delay_steps is None else f", Δ = {request.delay_steps}"
        said = [
            html.B(f"asked: {request.routing}{lag}"),
            f" {age} s ago, by {request.by}; not yet answered",
        ]
        lines.append(_line("asked", said))
    answer = next((e for e in reversed(events) if e["kind"] == "acknowledge"), None)
    if answer is not None:
        obeyed = details(answer["data"]).get("obeyed", True)
        said = [
            html.B(f"answered at step {integer(answer['step'])}"),
            f" {answer['message'] or ''}",
        ]
        lines.append(_line("answered" if obeyed else "refused", said))
    now = [html.B(f"now: {mode}"), f" since step {integer(since)}" if since is not None else ""]
    lines.append(tip(html.Div(_line(mode, now), tabIndex=0), ROUTING[mode]))
    why = next((e for e in reversed(events) if e["kind"] == "decision"), None) or next(
        (e for e in reversed(events) if e["kind"] == "routing"), None
    )
    if why is not None:
        lines.append(
            _line("why", [html.B("why"), f" (step {integer(why['step'])}) {why['message'] or ''}"])
        )
    if cache.run.status() != "running":
        last = int(steps["step"][-1]) if len(steps["step"]) else None
        lines.append(notice(_WHY_NOT.format(step=integer(last))))
    return lines


def policy(cache: RunCache) -> str | None:
    """What the training was last told to do, as far as it said."""
    for event in reversed(cache.events()):
        said = details(event["data"])
        if (
            event["kind"] == "acknowledge"
            and said.get("obeyed", True)
            and said.get("routing") in MODES
        ):
            return said["routing"]
    routing = cache.manifest_section("config").get("routing")
    began = routing.get("policy") if isinstance(routing, dict) else cache.setting("routing")
    return began if began in MODES else None


def delay(cache: RunCache) -> int:
    """The delay that the training uses, or the one that it was started with."""
    lag = cache.steps()["routing_lag"]
    if len(lag) and np.isfinite(lag[-1]) and lag[-1] > 0:
        return int(lag[-1])
    routing = cache.manifest_section("config").get("routing")
    said = routing.get("delay_steps") if isinstance(routing, dict) else cache.setting("delay")
    return said if isinstance(said, int) and 0 <= said <= _MOST_DELAY else _DELAY


def register(app: Dash, library: RunLibrary) -> None:
    """asked → state; pulse → state and buttons."""

    @app.callback(
        output=Output("asked", "data"),
        inputs={
            "clicks": [Input(f"ask-{m}", "n_clicks") for m in MODES],
            "steps": State("ask-delay", "value"),
            "pathname": State("url", "pathname"),
        },
        prevent_initial_call=True,
    )
    def ask(clicks, steps, pathname):
        if not any(clicks):
            return no_update  # the buttons were just drawn
        return _ask(library, pathname, str(ctx.triggered_id).removeprefix("ask-"), steps)

    @app.callback(
        output={
            "state": Output("control-state", "children"),
            "disabled": [Output(name, "disabled") for name in _CONTROLS],
            "variants": [Output(f"ask-{m}", "variant") for m in MODES],
        },
        inputs={
            "pulse": Input("pulse", "data"),
            "asked": Input("asked", "data"),
            "pathname": State("url", "pathname"),
        },
    )
    def show(pulse, asked, pathname):
        return _show(library.at_address(pathname), (asked or {}).get("error"))


def _show(cache: RunCache | None, error: str | None) -> dict:
    if cache is None:
        return {
            "state": no_update,
            "disabled": [no_update] * len(_CONTROLS),
            "variants": [no_update] * len(MODES),
        }
    idle, held = cache.run.status() != "running", policy(cache)
    variants = ["filled" if m == held else "default" for m in MODES]
    return {
        "state": state(cache, error),
        "disabled": [idle] * len(_CONTROLS),
        "variants": variants,
    }


def _ask(library: RunLibrary, pathname: str, mode: str, steps: Any) -> dict:
    cache = library.at_address(pathname)
    if cache is None:
        return {"error": "This run is gone."}
    if cache.run.status() != "running":
        return {"error": _WHY_NOT.format(step=integer(cache.run.manifest.get("last_step")))}
    try:
        request = cache.run.request(
            mode, int(steps) if isinstance(steps, int | float) else None, by="dashboard"
        )
    except GeodiagError as e:
        return {"error": str(e)}
    return {"id": request.id}


def _since(steps: dict) -> int:
    mode_S = steps["routing_mode"]
    same = mode_S == mode_S[-1]
    first = len(mode_S) - int((~same[::-1]).argmax()) if not same.all() else 0
    return int(steps["step"][first])


def _line(kind: str, children: list) -> html.Div:
    return html.Div(
        [html.Span(className=f"dot dot-{kind}"), html.Span(children)],
        className=f"said said-{kind}",
    )
