"""The controller decides after each step: when to intervene, with which actions, and for how long.

    idle ──spike, warning or schedule──▶ period ──period over, loss recovered──▶ cooldown ──▶ idle

A period begins with an optional rollback and keeps the policy's lasting actions (routing, lower
learning rate, clamp) for `policy.period` steps after the routing's warm-up. A spike during a period
extends the period; only a period that began without a rollback can still roll back. A period whose
loss has not recovered goes on until it has, for at most one more period. During the cooldown a
spike starts no new period, except a loss that is not finite. `policy.budget` limits the number of
periods. Mode `off` records each decision and does nothing, `auto` acts, `on` keeps routing on. The
controller has no clock but the step number, touches no model, and records a reason for every
decision, so that all ranks reach the same decision from the same observations.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from geodiag.hooks.control.controller_state import ControllerState
from geodiag.hooks.control.decision import (
    Action,
    Decision,
    no_remedy_text,
    plan_text,
    spike_text,
)
from geodiag.hooks.control.policy import (
    Clamp,
    LowerLr,
    OnSpike,
    OnWarning,
    Rollback,
    Route,
    as_policy,
)
from geodiag.hooks.control.rollback_target import rollback_target
from geodiag.spikes.detector import Spike, Verdict

TROUBLE = ("spike", "divergence", "nonfinite")
"""Kinds of spikes that the controller acts on; an outlier is over when it is detected."""


class Controller(ControllerState):
    """Makes at most one decision per step."""

    # -- requests ----------------------------------------------------------------------------

    def begin(self, step: int) -> Decision | None:
        """Return what to do before the first step."""
        if self.policy.mode == "on":
            return self.set_mode("on", step)
        return self._on_schedule(step - 1)

    def set_mode(self, mode: str, step: int) -> Decision:
        """Change the policy's mode on request, at once: no period, no cooldown, a full budget.

        A request for `auto` while the mode is `auto` changes nothing, not even a current period.
        ValueError for an unknown mode.
        """
        old_mode = self.policy.mode
        new_mode = as_policy(mode).mode
        reason = f"requested: {new_mode}"
        if new_mode == old_mode == "auto":
            return self._decision("none", f"{reason}, unchanged", acted=True)

        self.policy = replace(self.policy, mode=new_mode)
        self.reset()

        if new_mode == "on":
            return self._decision("enable", reason, acted=True, actions=("route",))
        if new_mode == "off" or old_mode == "on":
            actions = ("route", "lower-lr", "clamp")
            return self._decision("disable", reason, acted=True, actions=actions)
        return self._decision("none", reason, acted=True)

    # -- once a step -------------------------------------------------------------------------

    def decide(
        self, step: int, verdict: Verdict, warning: str | None = None, snapshots: Sequence[int] = ()
    ) -> Decision | None:
        """Return the decision after `step`, None if there is nothing to do and nothing to record.

        warning: text of the step's early warning, if any. snapshots: steps to which training can
        roll back.
        """
        spike = verdict.raised
        if spike is not None and spike.kind in TROUBLE:
            return self._on_spike(step, spike, snapshots)
        if warning is not None and self.policy.acts_on(OnWarning):
            return self._on_warning(step, warning)
        return self._on_schedule(step) or self._on_period_end(step, verdict.active)

    def _on_spike(self, step: int, spike: Spike, snapshots: Sequence[int]) -> Decision | None:
        fatal = spike.kind == "nonfinite"
        restore = None
        if self.policy.does(Rollback):
            restore = rollback_target(
                snapshots,
                spike.onset,
                warm_up=self.delay_steps if self.policy.does(Route) else 0,
                restored_step=self.restored_step,
                rolled_back_from=self.rolled_back_from,
            )

        if fatal and restore is None:
            return self._decision("none", no_remedy_text(spike, self.policy), acted=False)
        if not fatal and not self._acts_on_spikes():
            return None

        what = spike_text(spike, step)
        if not fatal:
            postponed = self._extended_or_waiting(step, what, restore)
            if postponed is not None:
                return postponed

        if self.activations >= self.policy.budget:
            return self._no_action(what, self._budget_text())
        skip = self.policy.skipped(spike) if restore is not None else None
        return self._begin_period(step, what, restore, skip)

    def _acts_on_spikes(self) -> bool:
        """Return whether a finite spike can cause any action. Mode `on` already routes."""
        policy = self.policy
        has_more_than_routing = any(policy.does(a) for a in (Rollback, LowerLr, Clamp))
        return policy.acts_on(OnSpike) and (policy.mode != "on" or has_more_than_routing)

    def _extended_or_waiting(self, step: int, what: str, restore: int | None) -> Decision | None:
        """Return the decision on a spike within a period or a cooldown, None for a new period."""
        if self.period_end is not None and (restore is None or self.rolled_back):
            # A full period follows the latest spike. No new period begins: the warm-up was already
            # done, or is still planned.
            return self._extended(step, what)
        if self.period_end is None and step < self.cooldown_end:
            return self._no_action(what, self._cooldown_text())
        return None

    def _on_warning(self, step: int, warning: str) -> Decision:
        """An early warning starts or extends a period. It never rolls back: no spike happened."""
        what = f"early warning at step {step} ({warning})"
        if self.period_end is not None:
            return self._extended(step, what)
        if step < self.cooldown_end:
            return self._no_action(what, self._cooldown_text())
        if not self.policy.lasting:
            return self._no_action(what, "the policy has no lasting action")
        if self.activations >= self.policy.budget:
            return self._no_action(what, self._budget_text())
        return self._begin_period(step, what, None, None, may_roll_back=False)

    def _on_schedule(self, step: int) -> Decision | None:
        """Begin or extend a scheduled period, one step ahead of its first step."""
        if self.policy.mode == "on":
            return None
        for schedule in self.policy.schedules:
            first, after = schedule.start, schedule.end
            covered = self.period_end is not None and self.period_end >= after - 1
            if first - 1 <= step < after - 1 and not covered:
                is_new = self.period_end is None
                self.extend_period(after - 1)
                return self._decision(
                    "enable" if is_new else "none",
                    f"schedule: from step {first} until step {after}",
                    actions=self.policy.lasting if is_new else (),
                )
        return None

    # -- periods -----------------------------------------------------------------------------

    def _begin_period(
        self,
        step: int,
        what: str,
        restore: int | None,
        skip: range | None,
        may_roll_back: bool = True,
    ) -> Decision:
        policy = self.policy
        lasting = policy.lasting
        self.activations += 1
        self.rolled_back = restore is not None
        self.awaiting_recovery = False

        # After a rollback the steps count from the restored one; mode `off` does not roll back.
        base = step
        if restore is not None and policy.mode != "off":
            base = restore - 1
            self.restored_step = restore
            self.rolled_back_from = step

        warm_up = self.delay_steps if "route" in lasting else 0
        if lasting:
            self.period_end = base + warm_up + policy.period
        else:
            self.period_end = None
            self.cooldown_end = base + policy.cooldown

        plan = plan_text(policy, restore, skip, warm_up, may_roll_back)
        return self._decision(
            "enable" if lasting else "none",
            f"{what}: {plan}",
            actions=lasting,
            restore=restore,
            skip=skip,
        )

    def _extended(self, step: int, what: str) -> Decision:
        self.extend_period(step + self.policy.period)
        return self._decision(
            "none", f"{what} during a period: the period lasts until step {self.period_end}"
        )

    def _on_period_end(self, step: int, active: bool) -> Decision | None:
        """End the period when its steps are over and the loss has recovered (`active` is False)."""
        recovered = self.awaiting_recovery and not active
        if self.period_end is None or (step < self.period_end and not recovered):
            return None

        period = self.policy.period
        if active and not self.awaiting_recovery:
            self.awaiting_recovery = True
            self.period_end = step + period
            return self._decision(
                "none",
                f"the period of {period} steps is over, but the loss has not recovered: "
                f"the period goes on until the loss recovers, at most until step {self.period_end}",
            )

        self.end_period(step)
        return self._decision(
            "disable", f"the period of {period} steps is over", actions=self.policy.lasting
        )

    # -- decisions ---------------------------------------------------------------------------

    def _no_action(self, what: str, why: str) -> Decision:
        return self._decision("none", f"{what}, but {why}")

    def _cooldown_text(self) -> str:
        return f"no action before step {self.cooldown_end} (cooldown)"

    def _budget_text(self) -> str:
        return f"the budget of {self.policy.budget} activations is used up"

    def _decision(
        self, action: Action, reason: str, *, acted: bool | None = None, **more: Any
    ) -> Decision:
        """Return a decision of the policy, or of a request if `acted` is given."""
        only_recorded = self.policy.mode == "off" and acted is None
        return Decision(
            action=action,
            reason=f"would have acted: {reason}" if only_recorded else reason,
            acted=not only_recorded if acted is None else acted,
            next_possible=self.next_possible(),
            **more,
        )
