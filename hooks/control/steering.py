"""Steering: what the controller decides and what people ask for, carried out and put on record."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from geodiag.control import Request
from geodiag.hooks.control.controller import Controller
from geodiag.hooks.control.decision import Decision
from geodiag.hooks.control.interventions import Interventions
from geodiag.hooks.control.policy import Mode as PolicyMode
from geodiag.hooks.record.step_observer import Observation
from geodiag.hooks.routing.base import Mode, Rerouting


class Tell(Protocol):
    """Records an event at the coming step."""

    def __call__(self, kind: str, message: str, **more: Any) -> None: ...


class Steering:
    """Joins the controller to what it may act on. Everything it does becomes an event.

    `snapshots()` are the steps that training can go back to; `go_back(step, skip)` does so and says
    the new attempt.
    """

    unreachable_ranks = False
    """Whether there are ranks that nothing can be agreed with."""

    def __init__(
        self,
        routing: Rerouting | None,
        controller: Controller,
        tell: Tell,
        interventions: Interventions,
        *,
        snapshots: Callable[[], list[int]] = list,
        go_back: Callable[[int, range | None], int] | None = None,
    ) -> None:
        self.routing, self.controller, self.interventions, self._tell = (
            routing,
            controller,
            interventions,
            tell,
        )
        self._snapshots, self._go_back = snapshots, go_back
        self.saved_mode: PolicyMode | None = None
        """The mode of the policy that a resumed training was saved with."""
        self.routing_failed = False
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

    def begin(self, step: int, attempt: int, resumed: bool) -> None:
        """What the policy wants before the first step. A resumed period goes on: its routing came
        with the snapshot.
        """
        began = "training began" if attempt == 0 else f"training began again: attempt {attempt}"
        self._tell_attempt(
            attempt,
            f"resumed from the snapshot of step {step}: attempt {attempt}" if resumed else began,
        )
        wanted = self.controller.policy
        if resumed and self.saved_mode is not None and self.saved_mode != wanted.mode:
            # Another mode than it was saved with is as if somebody had asked for it now.
            self.controller.policy = replace(wanted, mode=self.saved_mode)
            self._carry_out(self.controller.set_mode(wanted.mode, step), step)
        policy, under_way = self.controller.policy, self.controller.period_end is not None
        if not resumed:
            self._carry_out(self.controller.begin(step), step)
        elif under_way and policy.mode != "off":
            for action in policy.lasting:
                self.interventions.apply(action, policy)

    def _tell_attempt(self, attempt: int, message: str) -> None:
        self._tell(
            "attempt", message, data={"attempt": attempt, "policy": self.controller.policy.mode}
        )

    def act_on(self, seen: Observation) -> bool:
        """One step's observation to the controller, and what follows from it; whether training went
        back.
        """
        if self.routing is not None:
            self.controller.delay_steps = (
                self.routing.delay_steps
            )  # the warm-up that a period is planned around
        return self._carry_out(self._decide(seen), seen.step)

    def _decide(self, seen: Observation) -> Decision | None:
        """The one place where a training decides for itself."""
        warning = None if seen.warning is None else str(seen.warning)
        return self.controller.decide(seen.step, seen.verdict, warning, self._snapshots())

    @property
    def must_agree(self) -> bool:
        """Whether what the ranks do must be the same on all of them."""
        return self.controller.policy.mode != "off" or self.mode != "off"

    def fall_back(self, why: str) -> None:
        """Back to today's choice, because another rank had to."""
        if self.routing is not None and self.mode != "off":
            self.routing.disable()
            self._tell("problem", f"anticipatory routing ends: {why}")

    def handle_request(self, request: Request, step: int) -> None:
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
        decision = self.controller.set_mode(request.routing, step)
        if decision.action != "none":
            self.interventions.revert("lower-lr")
            self.interventions.revert("clamp")
        self._carry_out(decision, step)

    # -- doing it ----------------------------------------------------------------------------

    def _carry_out(self, decision: Decision | None, step: int) -> bool:
        if decision is None:
            return False
        policy = self.controller.policy
        data: dict[str, Any] = {
            "action": decision.action,
            "acted": decision.acted,
            "policy": policy.mode,
            "actions": decision.actions,
            "restore": decision.restore,
            "until": self.controller.period_end,
            "possible": decision.next_possible,
            "budget_left": policy.budget - self.controller.activations,
        }
        self._tell("decision", decision.reason, data=data)
        if not decision.acted:
            return False
        rolled_back = decision.restore is not None and self._back(decision, step)
        for action in decision.actions:
            if action == "route" and self.routing is not None:
                (self.routing.enable if decision.action == "enable" else self.routing.disable)()
            elif decision.action == "enable":
                self.interventions.apply(action, policy)
            else:
                self.interventions.revert(action)
        return rolled_back

    def _back(self, decision: Decision, step: int) -> bool:
        """Whether training stands before the snapshot's step now. A failure is on record, and
        training goes on.
        """
        restore = decision.restore
        if restore is None or self._go_back is None:
            return False
        began = time.perf_counter()
        try:
            attempt = self._go_back(restore, decision.skip)
        except (
            Exception
        ) as e:  # a disk that refuses, a loop that keeps no batches: training goes on where it is
            self.controller.rollback_failed(step)
            line = f"could not go back to step {restore}: {type(e).__name__}: {e}".splitlines()[0]
            print(f"geodiag: {line}; training goes on", file=sys.stderr, flush=True)
            self._tell("problem", line)
            return False
        seconds = time.perf_counter() - began
        data = {"from": step, "to": restore, "seconds": seconds}
        self._tell(
            "rollback", f"back from step {step} to step {restore} in {seconds:.2f} s", data=data
        )
        self._tell_attempt(
            attempt, f"attempt {attempt} goes on from the snapshot of step {restore}"
        )
        return True

    def _why_not(self, request: Request) -> str | None:
        if self.routing is None:
            nothing = (
                "this training gave attach no AnticipatoryRouting, so there is nothing to switch"
            )
            return None if request.routing == "off" else nothing
        if self.unreachable_ranks and request.routing != "off":
            return "other ranks cannot be told; call torch.distributed.init_process_group before geodiag.attach"
        delay = request.delay_steps
        if delay is not None and delay != self.routing.delay_steps and self.routing.mode != "off":
            return f"the delay can change only while routing is off; it is in {self.routing.mode}"
        return None

    def _changed(self, old: Mode, new: Mode) -> None:
        delay = self.routing.delay_steps if self.routing else 0
        self._tell(
            "routing",
            f"routing went from {old} to {new}",
            data={"from": old, "to": new, "delay_steps": delay},
        )

    def _failed(self, error: Exception) -> None:
        self.routing_failed = True
        line = f"anticipatory routing went back to today's choice: {type(error).__name__}: {error}".splitlines()[
            0
        ]
        print(f"geodiag: {line}; training goes on", file=sys.stderr, flush=True)
        self._tell("problem", line)

    def close(self) -> None:
        """The run is over: the routing goes on without being recorded, and still does not end a
        training.
        """
        if self.routing is not None:
            self.routing.on_change = lambda _old, _new: None
            self.routing.on_failure = lambda _error: None
