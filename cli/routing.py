"""`geodiag routing`: request another routing policy of a running training, or print its state."""

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geodiag.cli.output import print_json, prose, screen
from geodiag.defaults import MAX_DELAY_STEPS
from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from geodiag.control import Request
    from geodiag.run import Run

_POLL_SECONDS = 0.1


class Action(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"
    status = "status"


def routing(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a running training.")],
    action: Annotated[
        Action,
        typer.Argument(
            metavar="ACTION",
            help="The policy to request: auto, on or off; status prints the state.",
        ),
    ] = Action.status,
    delay: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_DELAY_STEPS,
            help="Δ: how many steps old the weights are that choose the experts.",
            show_default="unchanged",
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the acknowledgement of the training.")
    ] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Switch the anticipatory routing of a running training, or print its state."""
    from geodiag.run import open_run

    opened = open_run(run)
    if action is Action.status:
        state = _status(opened)
        if json:
            print_json(state)
        else:
            _print_status(state)
        return
    if opened.status() != "running":
        raise GeodiagError(
            f"{run} is {opened.status()}, not running; "
            "only a running training can change its routing"
        )
    result = _request(opened, action, delay, wait)
    if json:
        print_json(result)
    elif result["state"] == "obeyed":
        line = f"requested {action}; acknowledged at step {result['step']}: {result['message']}"
        screen().print(f"{run}: {line}", markup=False)
    else:
        line = f"requested {action}; not acknowledged after {wait:g} s"
        screen().print(f"{run}: {line}; the training reads requests at its next step", markup=False)


def _request(run: "Run", action: Action, delay: int | None, wait: float) -> dict[str, Any]:
    """Write a request and wait for its acknowledgement; GeodiagError if it is refused."""
    from geodiag.events import details

    request = run.request(action.value, delay_steps=delay, by="cli")
    result = {"run": run.url, "asked": action.value, "delay": delay, "request": request.id}
    deadline = time.monotonic() + wait
    while True:
        answer = _acknowledgement(run, request)
        if answer and details(answer["data"]).get("obeyed") is False:
            raise GeodiagError(f"{run.url}: {answer['message']}")
        if answer:
            step = {"step": answer["step"], "message": answer["message"]}
            return result | {"state": "obeyed"} | step
        if time.monotonic() >= deadline:
            return result | {"state": "asked", "step": None, "message": None}
        status = run.status()
        if status != "running":
            raise GeodiagError(
                f"{run.url} is {status} and did not acknowledge; "
                "start the training again, then repeat the request"
            )
        time.sleep(_POLL_SECONDS)


def _acknowledgement(run: "Run", request: "Request") -> dict[str, Any] | None:
    from geodiag.control import acknowledged

    for event in run.read_arrow("events", ["step", "kind", "message", "data"]).to_pylist():
        if event["kind"] == "acknowledge" and acknowledged([event["data"]], request.id):
            return event
    return None


def _status(run: "Run") -> dict[str, Any]:
    """Return the state of routing, and the last decision with its reason."""
    steps = run.read_arrow("steps", ["step", "routing_mode", "routing_lag"])
    last = steps.slice(len(steps) - 1).to_pylist()[0] if len(steps) else {}
    events = run.read_arrow("events", ["step", "kind", "message", "data"]).to_pylist()
    pending = run.pending()
    return {
        "run": run.url,
        "status": run.status(),
        "policy": _policy(run, events),
        "mode": last.get("routing_mode"),
        "lag": last.get("routing_lag"),
        "step": last.get("step"),
        "pending": pending.routing if pending else None,
        "last_decision": _decision(events),
        "last_change": _last(events, "routing"),
        "last_rollback": _last(events, "rollback"),
    }


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """Return step and message of the last event of this kind."""
    found = [e for e in events if e["kind"] == kind]
    return {"step": found[-1]["step"], "reason": found[-1]["message"]} if found else None


def _decision(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last decision: its reason, its actions, and when the next one is possible."""
    from geodiag.events import details

    last = _last(events, "decision")
    if last is None:
        return None
    data = details(next(e for e in reversed(events) if e["kind"] == "decision")["data"])
    names = ("acted", "actions", "restore", "until", "possible", "budget_left")
    return last | {name: data.get(name) for name in names}


def _next(decision: dict[str, Any], status: str) -> list[str]:
    """Return what follows from the last decision; nothing once the training is over."""
    if status != "running":
        return []
    lines = []
    if decision["acted"] is False:
        lines.append("this decision was only recorded; geodiag routing RUN auto makes it act")
    if decision["until"] is not None:
        lines.append(f"the period of this decision lasts until step {decision['until']:,}")
    left = decision["budget_left"]
    possible = decision["possible"]
    if left == 0:
        lines.append("no other intervention: the budget is used up; a request for auto renews it")
    elif possible is not None:
        lines.append(f"another intervention is possible from step {possible:,} on ({left} left)")
    return lines


def _policy(run: "Run", events: list[dict[str, Any]]) -> str | None:
    """Return the mode of the last accepted request, or the mode that the training began with."""
    from geodiag.events import details

    answers = [details(e["data"]) for e in events if e["kind"] == "acknowledge"]
    accepted = [a.get("routing") for a in answers if a.get("obeyed") is not False]
    config = run.manifest.get("config")
    routing = config.get("routing") if isinstance(config, dict) else None
    initial = routing.get("policy") if isinstance(routing, dict) else None
    return next((mode for mode in reversed(accepted) if mode), initial)


def _print_status(state: dict[str, Any]) -> None:
    step = "no step yet" if state["step"] is None else f"step {state['step']:,}"
    routing = f"policy {state['policy'] or 'unknown'}, routing {state['mode'] or 'unknown'}"
    if state["mode"] == "on" and state["lag"] is not None:
        routing += f" (experts chosen by the weights of {state['lag']:g} steps ago)"
    lines = [f"{state['run']}: {state['status']}, {step}", routing]

    if state["pending"]:
        lines.append(f"requested {state['pending']}, not acknowledged yet")
    if state["last_change"]:
        change = state["last_change"]
        lines.append(f"last change, step {change['step']:,}: {change['reason']}")
    if state["last_rollback"]:
        lines.append(f"last rollback: {state['last_rollback']['reason']}")

    decision = state["last_decision"]
    if decision is None:
        lines.append("no decision so far")
    else:
        lines.append(f"last decision, step {decision['step']:,}: {decision['reason']}")
        lines += _next(decision, state["status"])
    for line in lines:
        screen().print(prose(line))
