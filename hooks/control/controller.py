"""The controller: verdicts in, decisions out. When to intervene, with what, for how long, and why.

`off` records what it would have done, `auto` does it, `on` keeps routing on. Every decision has its
reason.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from geodiag.hooks.control.policy import Policy, as_policy
from geodiag.spikes.detector import Spike, Verdict

Action = Literal["enable", "disable", "none"]
TROUBLE = ("spike", "divergence", "nonfinite")
"""Kinds that call for something; an outlier is over when it is known."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do now; `acted` is False where it is only on record."""

    action: Action
    """Whether a period begins or ends."""
    reason: str
    acted: bool
    actions: tuple[str, ...] = ()
    """Of the policy's lasting ones, those that begin or end."""
    restore: int | None = None
    """Back to the snapshot of this step, first of all."""
    skip: range | None = None
    """Steps whose batches are left out when training comes by again."""
    next_possible: int | None = None
    """The first step at which a spike could start another period; None where none can."""


@dataclass(kw_only=True)
class Controller:
    """Decides once a step. It has no clock but the steps and touches no model."""

    policy: Policy = field(default_factory=Policy)
    delay_steps: int = 8
    activations: int = 0
    period_end: int | None = None
    """The step at which the period under way ends; also kept for periods that were only on record.
    """
    cooldown_end: int = -1
    rolled_back: bool = False
    """Whether the period under way began, or was continued, with a rollback."""
    awaiting_recovery: bool = False
    """The period is over and the loss is not back yet."""
    restored_step: int = -1
    """The snapshot that training last went back to."""
    rolled_back_from: int = -1
    """The last step before it did."""

    # -- what people ask for -----------------------------------------------------------------

    def begin(self, step: int) -> Decision | None:
        """What is to be done before the first step."""
        return (
            self.set_mode("on", step) if self.policy.mode == "on" else self._on_schedule(step - 1)
        )

    def set_mode(self, mode: str, step: int) -> Decision:
        """Somebody set the mode by hand: takes effect at once, with no period, no cooldown and a
        whole budget.

        Asking for the `auto` that is there already changes nothing, a period under way included.
        ValueError for an unknown mode.
        """
        before, asked = self.policy.mode, as_policy(mode).mode
        reason = f"asked for: {asked}"
        if asked == before == "auto":
            return self._decision("none", f"{reason}, as it was", acted=True)
        self.policy = replace(self.policy, mode=asked)
        self.period_end, self.cooldown_end, self.activations = None, -1, 0
        self.rolled_back = self.awaiting_recovery = False
        if asked == "on":
            return self._decision("enable", reason, acted=True, actions=("route",))
        if asked == "off" or before == "on":
            return self._decision(
                "disable", reason, acted=True, actions=("route", "lower-lr", "clamp")
            )
        return self._decision("none", reason, acted=True)

    # -- what a step calls for ---------------------------------------------------------------

    def decide(
        self, step: int, verdict: Verdict, warning: str | None = None, snapshots: Sequence[int] = ()
    ) -> Decision | None:
        """What this step calls for; None where nothing is to be said.

        warning: what an early warning said, where one was given. snapshots: steps that training
        could go back to.
        """
        raised = verdict.raised
        if raised is not None and raised.kind in TROUBLE:
            return self._on_trouble(step, raised, snapshots)
        if warning is not None and self.policy.acts_on("warning"):
            return self._on_warning(step, warning)
        return self._on_schedule(step) or self._at_the_end(step, verdict.active)

    def _on_trouble(self, step: int, spike: Spike, snapshots: Sequence[int]) -> Decision | None:
        policy, fatal = self.policy, spike.kind == "nonfinite"
        back = self._snapshot_before(spike, snapshots) if policy.does("rollback") else None
        if fatal and back is None:
            return self._hopeless(spike)
        if not fatal and (
            not policy.acts_on("spike") or (policy.mode == "on" and not self._does_more())
        ):
            return None
        what = f"{spike.kind} raised at step {step} (onset {spike.onset}, {spike.score:.1f} σ)"
        if fatal:
            what = f"the loss is not finite since step {spike.onset}"
        running = self.period_end is not None
        if not fatal and running and (back is None or self.rolled_back):
            # The warm-up is paid already, or still to come as planned: a whole period follows the
            # spike either way.
            self._last_until(step + policy.period)
            return self._decision(
                "none",
                f"{what} while the period was running: it lasts until step {self.period_end}",
            )
        if not fatal and not running and step < self.cooldown_end:
            resting = "routing rests" if policy.actions == "route" else "the controller rests"
            return self._decision(
                "none", f"{what}, but {resting} until step {self.cooldown_end} (cooldown)"
            )
        if self.activations >= policy.budget:
            return self._decision(
                "none", f"{what}, but the budget of {policy.budget} activations is used up"
            )
        return self._begin(step, what, back, policy.skipped(spike) if back is not None else None)

    def _on_warning(self, step: int, warning: str) -> Decision:
        what, policy = f"early warning at step {step} ({warning})", self.policy
        if self.period_end is not None:
            self._last_until(step + policy.period)
            return self._decision(
                "none",
                f"{what} while the period was running: it lasts until step {self.period_end}",
            )
        if step < self.cooldown_end:
            return self._decision(
                "none", f"{what}, but the controller rests until step {self.cooldown_end}"
            )
        if self.activations >= policy.budget or not policy.lasting:
            why = (
                f"the budget of {policy.budget} activations is used up"
                if policy.lasting
                else "nothing is to be done"
            )
            return self._decision("none", f"{what}, but {why}")
        return self._begin(step, what, None, None, going_back=False)

    def _on_schedule(self, step: int) -> Decision | None:
        for first, after in self.policy.schedules if self.policy.mode != "on" else ():
            if first - 1 <= step < after - 1 and (
                self.period_end is None or self.period_end < after - 1
            ):
                fresh = self.period_end is None
                self._last_until(after - 1)
                said = f"schedule: from step {first} until step {after}"
                return self._decision(
                    "enable" if fresh else "none",
                    said,
                    actions=self.policy.lasting if fresh else (),
                )
        return None

    def _at_the_end(self, step: int, active: bool) -> Decision | None:
        policy = self.policy
        back = self.awaiting_recovery and not active
        if self.period_end is None or (step < self.period_end and not back):
            return None
        if active and not self.awaiting_recovery:
            over = f"the period of {policy.period} steps is over, but the loss is not back in its range"
            self.awaiting_recovery, self.period_end = True, step + policy.period
            return self._decision(
                "none", f"{over}: on until it is, at most until step {self.period_end}"
            )
        return self._end(step)

    def _end(self, step: int) -> Decision:
        self.period_end, self.cooldown_end = None, step + self.policy.cooldown
        self.rolled_back = self.awaiting_recovery = False
        return self._decision(
            "disable",
            f"the period of {self.policy.period} steps is over",
            actions=self.policy.lasting,
        )

    # -- how a period begins -----------------------------------------------------------------

    def _begin(
        self, step: int, what: str, restore: int | None, skip: range | None, going_back: bool = True
    ) -> Decision:
        policy = self.policy
        self.activations += 1
        base = step
        if restore is not None and policy.mode != "off":
            base, self.restored_step, self.rolled_back_from = restore - 1, restore, step
        self.rolled_back = restore is not None
        self.awaiting_recovery = False
        warm_up = self.delay_steps if "route" in policy.lasting else 0
        if policy.lasting:
            self.period_end = base + warm_up + policy.period
        else:
            self.period_end, self.cooldown_end = None, base + policy.cooldown
        plan = self._in_words(restore, skip, warm_up, going_back)
        action: Action = "enable" if policy.lasting else "none"
        return self._decision(
            action, f"{what}: {plan}", actions=policy.lasting, restore=restore, skip=skip
        )

    def _in_words(
        self, restore: int | None, skip: range | None, warm_up: int, going_back: bool
    ) -> str:
        policy, parts = self.policy, []
        if restore is not None:
            parts.append(f"back to the snapshot of step {restore}")
        elif policy.does("rollback") and going_back:
            parts.append("no snapshot from before it is kept, so no way back")
        if skip is not None:
            parts.append(f"without the batches of steps {skip.start} to {skip.stop - 1}")
        if "lower-lr" in policy.lasting:
            parts.append(f"learning rate × {policy.value('lower-lr'):g}")
        if "clamp" in policy.lasting:
            parts.append(f"clamp at {policy.value('clamp'):g}")
        if policy.lasting:
            parts.append(
                f"on for {policy.period} steps"
                + (f" after {warm_up} of warm-up" if warm_up else "")
            )
        return ", ".join(parts)

    def _snapshot_before(self, spike: Spike, snapshots: Sequence[int]) -> int | None:
        """The newest from strictly before the onset; early enough for the warm-up where one is that
        old.

        Where going back did not help, the one before it: the same snapshot would lead to the same
        place.
        """
        before = [s for s in snapshots if s < spike.onset]
        if not before:
            return None
        if spike.onset <= self.rolled_back_from and any(s < self.restored_step for s in before):
            return max(s for s in before if s < self.restored_step)
        warm = (
            [s for s in before if s + self.delay_steps <= spike.onset]
            if self.policy.does("route")
            else []
        )
        return max(warm or before)

    def _hopeless(self, spike: Spike) -> Decision:
        why = "routing cannot mend weights"
        if self.policy.does("rollback"):
            why = "no snapshot from before it is kept"
        reason = f"the loss is not finite since step {spike.onset}: {why}; restart from a checkpoint before that step"
        return self._decision("none", reason, acted=False)

    def rollback_failed(self, step: int) -> None:
        """The rollback that was decided on failed: the period counts from here."""
        if self.period_end is not None:
            self.period_end += step + 1 - self.restored_step
        self.rolled_back = False

    # -- odds and ends -----------------------------------------------------------------------

    def _does_more(self) -> bool:
        return any(self.policy.does(a) for a in ("rollback", "lower-lr", "clamp"))

    def _last_until(self, step: int) -> None:
        self.period_end, self.awaiting_recovery = max(self.period_end or step, step), False

    def _decision(
        self,
        action: Action,
        reason: str,
        *,
        acted: bool | None = None,
        **more: Any,
    ) -> Decision:
        would = self.policy.mode == "off" and acted is None
        possible = None
        if self.policy.mode != "on" and self.activations < self.policy.budget:
            possible = (
                max(self.cooldown_end, 0)
                if self.period_end is None
                else self.period_end + 1 + self.policy.cooldown
            )
        return Decision(
            action=action,
            reason=f"would have acted: {reason}" if would else reason,
            acted=not would if acted is None else acted,
            next_possible=possible,
            **more,
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, Policy(**value) if name == "policy" else value)
