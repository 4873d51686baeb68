"""Control of a running training: request a routing policy, see the request, see the answer."""

import time
from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import Dash, Input, Output, State, ctx, html, no_update

from geodiag.control import MODES
from geodiag.dashboard.components.basic import aria, card, notice, tip
from geodiag.dashboard.components.text import POLICY, ROUTING, integer
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.errors import GeodiagError
from geodiag.events import details

_CONTROLS = (*(f"ask-{m}" for m in MODES), "ask-delay")
_DEFAULT_DELAY = 8
_MOST_DELAY = 64
_NOT_RUNNING = "The training is not running, so it cannot be controlled. Its last step is {step}."
_ABOUT = (
    "Anticipatory routing chooses experts with the weights of Δ steps ago, which keeps routing "
    "stable after a spike. A request is written to the file control.json; the training applies it "
    "at its next step."
)


def panel(cache: RunCache) -> html.Section:
    """Return the buttons and the current state."""
    now = _show(cache, None)
    variants = dict(zip(MODES, now["variants"], strict=True))
    idle = now["disabled"][0]
    buttons = [
        tip(dmc.Button(m, id=f"ask-{m}", size="xs", variant=variants[m], disabled=idle), POLICY[m])
        for m in MODES
    ]
    steps = dmc.NumberInput(
        id="ask-delay",
        value=delay(cache),
        disabled=idle,
        min=0,
        max=_MOST_DELAY,
        allowDecimal=False,
        size="xs",
        w=86,
        **aria("delay in steps"),
    )
    return card(
        "Anticipatory routing",
        html.Div(
            [dmc.ButtonGroup(buttons), html.Label(["Δ", steps, "steps"], className="delay")],
            className="ask",
        ),
        html.Div(now["state"], id="control-state"),
        tip=_ABOUT,
    )


def state(cache: RunCache, error: str | None = None) -> list:
    """Return lines with the pending request, the last answer, the routing mode and its reason."""
    steps = cache.steps()
    lines: list[Any] = [notice(error, "bad")] if error else []
    lines += _request_lines(cache)
    lines += _answer_lines(cache)
    lines.append(_mode_line(cache))
    lines += _reason_lines(cache)
    if cache.run.status() != "running":
        last = int(steps["step"][-1]) if len(steps["step"]) else None
        lines.append(notice(_NOT_RUNNING.format(step=integer(last))))
    return lines


def _request_lines(cache: RunCache) -> list:
    """The request that the training has not answered yet."""
    request = cache.run.pending()
    if request is None:
        return []
    age = max(0, round(time.time() - request.time))
    delay = "" if request.delay_steps is None else f", Δ = {request.delay_steps}"
    text = [
        html.B(f"requested: {request.routing}{delay}"),
        f" {age} s ago by {request.by}; not answered yet",
    ]
    return [_line("requested", text)]


def _answer_lines(cache: RunCache) -> list:
    """The newest answer of the training."""
    answer = _newest_event(cache, "acknowledge")
    if answer is None:
        return []
    accepted = details(answer["data"]).get("obeyed", True)
    text = [html.B(f"answered at step {integer(answer['step'])}"), f" {answer['message'] or ''}"]
    return [_line("answered" if accepted else "refused", text)]


def _mode_line(cache: RunCache) -> Any:
    """The routing mode and the step at which it began."""
    steps = cache.steps()
    mode = cache.routing_mode()
    since = f" since step {integer(_since(steps))}" if len(steps["step"]) else ""
    line = _line(mode, [html.B(f"now: {mode}"), since])
    return tip(html.Div(line, tabIndex=0), ROUTING[mode])


def _reason_lines(cache: RunCache) -> list:
    """The newest decision, or the newest change of the routing mode."""
    reason = _newest_event(cache, "decision") or _newest_event(cache, "routing")
    if reason is None:
        return []
    text = f" (step {integer(reason['step'])}) {reason['message'] or ''}"
    return [_line("why", [html.B("reason"), text])]


def _newest_event(cache: RunCache, kind: str) -> dict[str, Any] | None:
    return next((e for e in reversed(cache.events()) if e["kind"] == kind), None)


def policy(cache: RunCache) -> str | None:
    """Return the routing policy that the training last accepted, or was started with."""
    for event in reversed(cache.events()):
        if event["kind"] != "acknowledge":
            continue
        answer = details(event["data"])
        if answer.get("obeyed", True) and answer.get("routing") in MODES:
            return answer["routing"]
    routing = cache.manifest_section("config").get("routing")
    initial = routing.get("policy") if isinstance(routing, dict) else cache.setting("routing")
    return initial if initial in MODES else None


def delay(cache: RunCache) -> int:
    """Return the delay Δ that the training uses, or was started with."""
    lag = cache.steps()["routing_lag"]
    if len(lag) and np.isfinite(lag[-1]) and lag[-1] > 0:
        return int(lag[-1])
    routing = cache.manifest_section("config").get("routing")
    initial = routing.get("delay_steps") if isinstance(routing, dict) else cache.setting("delay")
    return initial if isinstance(initial, int) and 0 <= initial <= _MOST_DELAY else _DEFAULT_DELAY


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks: click → request file → state; pulse → state and buttons."""

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
            return no_update  # the buttons were created just now
        return _send_request(library, pathname, str(ctx.triggered_id).removeprefix("ask-"), steps)

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
    idle = cache.run.status() != "running"
    current = policy(cache)
    variants = ["filled" if m == current else "default" for m in MODES]
    return {
        "state": state(cache, error),
        "disabled": [idle] * len(_CONTROLS),
        "variants": variants,
    }


def _send_request(library: RunLibrary, pathname: str, mode: str, steps: Any) -> dict:
    cache = library.at_address(pathname)
    if cache is None:
        return {"error": "This run no longer exists."}
    if cache.run.status() != "running":
        return {"error": _NOT_RUNNING.format(step=integer(cache.run.manifest.get("last_step")))}
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
        className=f"state-line state-line-{kind}",
    )
