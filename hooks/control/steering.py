"""Steering: carries out and records the controller's decisions and people's requests."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from geodiag import log
from geodiag.control import Request
from geodiag.hooks.control.controller import Controller
from geodiag.hooks.control.decision import Decision
from geodiag.hooks.control.interventions import Interventions
from geodiag.hooks.control.policy import Mode as PolicyMode
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.failure_guard import describe
from geodiag.hooks.record.step_observer import Observation
from geodiag.hooks.routing.base import Mode, Rerouting


class RecordEvent(Protocol):
    """Records an event at the next step."""

    def __call__(self, kind: str, message: str, **more: Any) -> None: ...


GoBack = Callable[[int, range | None], int]
"""Rolls training back to a step, skips the batches of some steps, returns the new attempt."""


class Steering:
    """Connects the controller to the routing, the interventions and the rollback.

    record_event: receives an event for everything that steering does.
    """

    def __init__(
        self,
        routing: Rerouting | None,
        controller: Controller,
        interventions: Interventions,
        ranks: Ranks,
        record_event: RecordEvent,
        go_back: GoBack,
    ) -> None:
        self.routing = routing
        self.controller = controller
        self.interventions = interventions
        self._ranks = ranks
        self._record_event = record_event
        self._go_back = go_back

        self.saved_mode: PolicyMode | None = None
        """The policy's mode in the state that a resumed training was saved with."""
        self._routing_failed = False

        if routing is not None:
            routing.on_change = self._on_mode_change
            routing.on_failure = self._on_routing_failure

    @property
    def mode(self) -> Mode:
        return self.routing.mode if self.routing else "off"

    @property
    def lag(self) -> int:
        return self.routing.lag if self.routing else 0

    @property
    def must_agree(self) -> bool:
        """Whether all ranks must act alike: the policy may act, or routing is not off."""
        return self.controller.policy.mode != "off" or self.mode != "off"

    # -- once a step -------------------------------------------------------------------------

    def begin(self, step: int, attempt: int, resumed: bool) -> None:
        """Apply the policy before the first step.

        A resumed period continues: the snapshot has restored the routing, and the lasting actions
        are applied again here.
        """
        message = f"training began again: attempt {attempt}" if attempt else "training began"
        if resumed:
            message = f"resumed from the snapshot of step {step}: attempt {attempt}"
        self._record_attempt(attempt, message)

        if not resumed:
            self._carry_out(self.controller.begin(step), step)
            return

        requested = self.controller.policy
        if self.saved_mode is not None and self.saved_mode != requested.mode:
            # A resume with another mode has the effect of a request for this mode.
            self.controller.policy = replace(requested, mode=self.saved_mode)
            self._carry_out(self.controller.set_mode(requested.mode, step), step)

        policy = self.controller.policy
        if self.controller.period_end is not None and policy.mode != "off":
            for action in policy.lasting:
                self.interventions.apply(action, policy)

    def act_on(self, observation: Observation, snapshots: list[int]) -> bool:
        """Let the controller decide on one step; return whether training was rolled back.

        snapshots: the steps to which training can roll back.
        """
        if self.routing is not None:
            # The controller plans a period around the warm-up of the routing.
            self.controller.delay_steps = self.routing.delay_steps
        return self._carry_out(self._decide(observation, snapshots), observation.step)

    def _decide(self, observation: Observation, snapshots: list[int]) -> Decision | None:
        """The only place where geodiag decides about a training without a request."""
        warning = None if observation.warning is None else str(observation.warning)
        return self.controller.decide(observation.step, observation.verdict, warning, snapshots)

    # -- other ranks and requests ------------------------------------------------------------

    def take_routing_failure(self) -> bool:
        """Return whether the routing failed since the last call. The other ranks must know."""
        failed = self._routing_failed
        self._routing_failed = False
        return failed

    def fall_back(self, why: str) -> None:
        """Return to today's choice of experts, because another rank did."""
        if self.routing is not None and self.mode != "off":
            self.routing.disable()
            self._record_event("problem", f"anticipatory routing ends: {why}")

    def handle_request(self, request: Request, step: int) -> None:
        """Apply a request, or refuse it with the reason. Either is acknowledged by an event."""
        requested = f"{request.routing} (by {request.by})"
        data: dict[str, Any] = {"request": request.id, "routing": request.routing}
        self._record_event("request", f"asked for routing {requested}", data=data)

        refusal = self._refusal(request)
        if refusal is not None:
            message = f"refused {requested}: {refusal}"
            self._record_event("acknowledge", message, data=data | {"obeyed": False})
            return

        if request.delay_steps is not None and self.routing is not None:
            self.routing.delay_steps = request.delay_steps
        message = f"obeyed: routing {requested}"
        self._record_event("acknowledge", message, data=data | {"obeyed": True})

        decision = self.controller.set_mode(request.routing, step)
        if decision.action != "none":
            self.interventions.revert("lower-lr")
            self.interventions.revert("clamp")
        self._carry_out(decision, step)

    def _refusal(self, request: Request) -> str | None:
        """Return why the request cannot be applied, None if it can."""
        if self.routing is None:
            if request.routing == "off":
                return None
            return "this training gave attach no AnticipatoryRouting, so there is nothing to switch"

        if self._ranks.unreachable_ranks and request.routing != "off":
            return (
                "the other ranks cannot be reached; "
                "call torch.distributed.init_process_group before geodiag.attach"
            )

        delay = request.delay_steps
        if delay is not None and delay != self.routing.delay_steps and self.routing.mode != "off":
            return f"the delay can change only while routing is off; it is in {self.routing.mode}"
        return None

    # -- decisions ---------------------------------------------------------------------------

    def _carry_out(self, decision: Decision | None, step: int) -> bool:
        """Record the decision and do what it contains; return whether training was rolled back."""
        if decision is None:
            return False
        self._record_decision(decision)
        if not decision.acted:
            return False

        # The rollback comes first: restoring a snapshot would undo the actions after it.
        rolled_back = decision.restore is not None and self._roll_back(decision, step)
        for action in decision.actions:
            if action == "route" and self.routing is not None:
                if decision.action == "enable":
                    self.routing.enable()
                else:
                    self.routing.disable()
            elif decision.action == "enable":
                self.interventions.apply(action, self.controller.policy)
            else:
                self.interventions.revert(action)
        return rolled_back

    def _record_decision(self, decision: Decision) -> None:
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
        self._record_event("decision", decision.reason, data=data)

    def _roll_back(self, decision: Decision, step: int) -> bool:
        """Roll back to the decision's snapshot; return whether it succeeded.

        A failure is recorded, and training continues where it is.
        """
        restore = decision.restore
        if restore is None:
            return False
        began = time.perf_counter()
        try:
            attempt = self._go_back(restore, decision.skip)
        except Exception as e:  # an unreadable disk, missing batches: the training must not end
            self.controller.rollback_failed(step)
            self._report_problem(f"could not roll back to step {restore}", e)
            return False

        seconds = time.perf_counter() - began
        self._record_event(
            "rollback",
            f"back from step {step} to step {restore} in {seconds:.2f} s",
            data={"from": step, "to": restore, "seconds": seconds},
        )
        self._record_attempt(
            attempt, f"attempt {attempt} continues from the snapshot of step {restore}"
        )
        return True

    # -- events ------------------------------------------------------------------------------

    def _record_attempt(self, attempt: int, message: str) -> None:
        data = {"attempt": attempt, "policy": self.controller.policy.mode}
        self._record_event("attempt", message, data=data)

    def _on_mode_change(self, old: Mode, new: Mode) -> None:
        delay = self.routing.delay_steps if self.routing else 0
        self._record_event(
            "routing",
            f"routing went from {old} to {new}",
            data={"from": old, "to": new, "delay_steps": delay},
        )

    def _on_routing_failure(self, error: Exception) -> None:
        self._routing_failed = True
        self._report_problem("anticipatory routing went back to today's choice", error)

    def _report_problem(self, what: str, error: Exception) -> None:
        line = f"{what}: {describe(error)}"
        log.warning(f"geodiag: {line}; training goes on")
        self._record_event("problem", line)

    # -- resume and end ----------------------------------------------------------------------

    def load_controller(self, state: dict[str, Any]) -> None:
        """Load the controller's state. The controller keeps the policy that it has now."""
        policy = self.controller.policy
        self.controller.load_state_dict(state)
        self.saved_mode = self.controller.policy.mode
        self.controller.policy = policy

    def close(self) -> None:
        """Stop recording at the end of a run. The routing continues and still ends no training."""
        if self.routing is not None:
            self.routing.on_change = lambda _old, _new: None
            self.routing.on_failure = lambda _error: None
