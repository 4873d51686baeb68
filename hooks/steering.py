"""Steering: what the controller decides and what people ask for, carried out on the routing and put on record."""

import sys
from collections.abc import Callable
from typing import Any, Protocol

from geodiag.control import Request
from geodiag.hooks.anticipatory import AnticipatoryRouting, Mode
from geodiag.hooks.controller import Controller, Decision
from geodiag.spikes import Verdict


class Tell(Protocol):
    """Records an event at the coming step."""

    def __call__(self, kind: str, message: str, **more: Any) -> None: ...


class Steering:
    """Joins the controller to the routing, if the training has one. Everything it does becomes an event."""

    strangers = False
    """Whether there are ranks that nothing can be agreed with."""

    def __init__(self, routing: AnticipatoryRouting | None, controller: Controller, tell: Tell) -> None:
        self.routing, self.controller, self._tell = routing, controller, tell
        self.gave_up = False
        """Whether looking ahead failed lately: the other ranks must hear of it."""
        if routing is not None:
            routing.on_change, routing.on_failure = self._changed, self._failed

    @property
    def mode(self) -> Mode:
        return self.routing.mode if self.routing else "off"

    @property
    def lag(self) -> int:
        return self.routing.lag if self.routing else 0

    @property
    def replaying(self) -> bool:
        return self.routing is not None and self.routing.replaying

    def start(self, step: int) -> None:
        """A policy of `on` is carried out before the first step."""
        if self.controller.policy == "on":
            self._carry_out(self.controller.ask("on", step))

    def judge(self, step: int, verdict: Verdict) -> None:
        """One step's verdict to the controller, and what follows from it."""
        if self.routing is not None:
            self.controller.delay_steps = self.routing.delay_steps  # the warm-up that a period is planned around
        decision = self.controller.decide(step, verdict)
        if decision is not None:
            self._carry_out(decision)

    @property
    def acts(self) -> bool:
        """Whether what the ranks do must be the same on all of them: routing is, or may be, switched."""
        return self.routing is not None and (self.controller.policy != "off" or self.mode != "off")

    def fall_back(self, why: str) -> None:
        """Back to today's choice, because another rank had to."""
        if self.routing is not None and self.mode != "off":
            self.routing.disable()
            self._tell("problem", f"anticipatory routing ends: {why}")

    def let_go(self, why: str, step: int) -> None:
        """Steers no more."""
        self._tell("problem", f"steering ends: {why}")
        self._carry_out(self.controller.ask("off", step))

    def obey(self, request: Request, step: int) -> None:
        """Carries out what somebody asked for, or refuses with the reason; either is acknowledged."""
        asked = f"{request.routing} (by {request.by})"
        data: dict[str, Any] = {"request": request.id, "routing": request.routing}
        self._tell("request", f"asked for routing {asked}", data=data)
        refusal = self._why_not(request)
        if refusal is not None:
            self._tell("acknowledge", f"refused {asked}: {refusal}", data=data | {"obeyed": False})
            return
        if request.delay_steps is not None and self.routing is not None:
            self.routing.delay_steps = request.delay_steps
        self._tell("acknowledge", f"obeyed: routing {asked}", data=data | {"obeyed": True})
        self._carry_out(self.controller.ask(request.routing, step))

    def _carry_out(self, decision: Decision) -> None:
        data = {"action": decision.action, "acted": decision.acted, "policy": self.controller.policy}
        self._tell("decision", decision.reason, data=data)
        if self.routing is None or not decision.acted:
            return
        carry: dict[str, Callable[[], None]] = {"enable": self.routing.enable, "disable": self.routing.disable}
        if decision.action in carry:
            carry[decision.action]()

    def _why_not(self, request: Request) -> str | None:
        if self.routing is None:
            nothing = "this training gave attach no AnticipatoryRouting, so there is nothing to switch"
            return None if request.routing == "off" else nothing
        if self.strangers and request.routing != "off":
            return "other ranks cannot be told; call torch.distributed.init_process_group before geodiag.attach"
        delay = request.delay_steps
        if delay is not None and delay != self.routing.delay_steps and self.routing.mode != "off":
            return f"the delay can change only while routing is off; it is in {self.routing.mode}"
        return None

    def _changed(self, old: Mode, new: Mode) -> None:
        delay = self.routing.delay_steps if self.routing else 0
        self._tell("routing", f"routing went from {old} to {new}", data={"from": old, "to": new, "delay_steps": delay})

    def _failed(self, error: Exception) -> None:
        self.gave_up = True
        line = f"anticipatory routing went back to today's choice: {type(error).__name__}: {error}".splitlines()[0]
        print(f"geodiag: {line}; training goes on", file=sys.stderr, flush=True)
        self._tell("problem", line)

    def close(self) -> None:
        """The run is over: the routing goes on without being recorded, and still does not end a training."""
        if self.routing is not None:
            self.routing.on_change = lambda _old, _new: None
            self.routing.on_failure = lambda _error: None
