"""`geodiag routing`: ask a running training for another routing policy, and see whether it obeyed."""

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geodiag.cli.output import print_json, prose, screen
from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from geodiag.control import Request
    from geodiag.run import Run

_LOOK_EVERY = 0.1


class Action(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"
    status = "status"


def routing(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a running training.")],
    action: Annotated[
        Action, typer.Argument(metavar="ACTION", help="The policy to ask for; `status` only looks.")
    ] = Action.status,
    delay: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="Δ: route with the weights of so many steps ago.",
            show_default=False,
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the training to obey.")
    ] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Switch anticipatory routing of a running training: auto, on or off; or see how it stands."""
    from geodiag.run import open_run

    opened = open_run(run)
    if action is Action.status:
        said = _status(opened)
        if json:
            print_json(said)
        else:
            _print_status(said)
        return
    if opened.status() != "running":
        raise GeodiagError(
            f"{run} is {opened.status()}, not running; only a running training can change its routing"
        )
    said = _ask(opened, action, delay, wait)
    if json:
        print_json(said)
    elif said["state"] == "obeyed":
        screen().print(
            f"{run}: asked for {action}; the training obeyed at step {said['step']}: {said['message']}",
            markup=False,
        )
    else:
        screen().print(
            f"{run}: asked for {action}; not yet obeyed after {wait:g} s, the training does so at its next step"
        )


def _ask(run: "Run", action: Action, delay: int | None, wait: float) -> dict[str, Any]:
    from geodiag.events import details

    request = run.request(action.value, delay_steps=delay, by="cli")
    said = {"run": run.url, "asked": action.value, "delay": delay, "request": request.id}
    deadline = time.monotonic() + wait
    while True:
        answer = _answer(run, request)
        if answer and details(answer["data"]).get("obeyed") is False:
            raise GeodiagError(f"{run.url}: {answer['message']}")
        if answer:
            return said | {"state": "obeyed", "step": answer["step"], "message": answer["message"]}
        if time.monotonic() >= deadline:
            return said | {"state": "asked", "step": None, "message": None}
        status = run.status()
        if status != "running":
            raise GeodiagError(
                f"{run.url} is {status} and did not obey; start the training again, then ask again"
            )
        time.sleep(_LOOK_EVERY)


def _answer(run: "Run", request: "Request") -> dict[str, Any] | None:
    from geodiag.control import acknowledged

    for event in run.read_arrow("events", ["step", "kind", "message", "data"]).to_pylist():
        if event["kind"] == "acknowledge" and acknowledged([event["data"]], request.id):
            return event
    return None


def _status(run: "Run") -> dict[str, Any]:
    """How routing stands, and the last decision with its reason."""
    steps = run.read_arrow("steps", ["step", "routing_mode", "routing_lag"])
    last = steps.slice(len(steps) - 1).to_pylist()[0] if len(steps) else {}
    trail = run.read_arrow("events", ["step", "kind", "message", "data"]).to_pylist()
    pending = run.pending()
    return {
        "run": run.url,
        "status": run.status(),
        "policy": _policy(run, trail),
        "mode": last.get("routing_mode"),
        "lag": last.get("routing_lag"),
        "step": last.get("step"),
        "pending": pending.routing if pending else None,
        "last_decision": _decision(trail),
        "last_change": _last(trail, "routing"),
        "last_rollback": _last(trail, "rollback"),
    }


def _last(trail: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    found = [e for e in trail if e["kind"] == kind]
    return {"step": found[-1]["step"], "reason": found[-1]["message"]} if found else None


def _decision(trail: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What was decided last, why, what came of it, and when the next could be."""
    from geodiag.events import details

    last = _last(trail, "decision")
    if last is None:
        return None
    data = details(next(e for e in reversed(trail) if e["kind"] == "decision")["data"])
    names = ("acted", "actions", "restore", "until", "possible", "budget_left")
    return last | {name: data.get(name) for name in names}


def _next(decision: dict[str, Any], status: str) -> list[str]:
    """What follows from the last decision, as far as it says; nothing once the training is over."""
    if status != "running":
        return []
    lines = []
    if decision["acted"] is False:
        lines.append(
            "that was only put on record; geodiag routing RUN auto lets the controller act"
        )
    if decision["until"] is not None:
        lines.append(f"the period it began lasts until step {decision['until']:,}")
    left, possible = decision["budget_left"], decision["possible"]
    if left == 0:
        lines.append(
            "no other intervention: the budget is used up; asking for auto gives a new one"
        )
    elif possible is not None:
        lines.append(f"another intervention is possible from step {possible:,} on ({left} left)")
    return lines


def _policy(run: "Run", trail: list[dict[str, Any]]) -> str | None:
    """What was last asked for and obeyed; before that, what the training began with."""
    from geodiag.events import details

    answers = [details(e["data"]) for e in trail if e["kind"] == "acknowledge"]
    asked = [a.get("routing") for a in answers if a.get("obeyed") is not False]
    config = run.manifest.get("config")
    routing = config.get("routing") if isinstance(config, dict) else None
    began = routing.get("policy") if isinstance(routing, dict) else None
    return next((a for a in reversed(asked) if a), began)


def _print_status(said: dict[str, Any]) -> None:
    at = "no step yet" if said["step"] is None else f"step {said['step']:,}"
    lines = [
        f"{said['run']}: {said['status']}, {at}",
        f"policy {said['policy'] or 'unknown'}, routing {said['mode'] or 'unknown'}",
    ]
    if said["mode"] == "on" and said["lag"] is not None:
        lines[1] += f" (experts chosen by the weights of {said['lag']:g} steps ago)"
    if said["pending"]:
        lines.append(f"asked for {said['pending']}, not yet obeyed")
    if said["last_change"]:
        lines.append(
            f"last change, step {said['last_change']['step']:,}: {said['last_change']['reason']}"
        )
    decision = said["last_decision"]
    if said["last_rollback"]:
        lines.append(f"last rollback: {said['last_rollback']['reason']}")
    lines.append(
        f"last decision, step {decision['step']:,}: {decision['reason']}"
        if decision
        else "no decision so far"
    )
    lines += _next(decision, said["status"]) if decision else []
    for line in lines:
        screen().print(prose(line))
