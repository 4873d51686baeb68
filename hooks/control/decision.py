"""One decision of the controller, and its reasons in words."""

from dataclasses import dataclass
from typing import Literal

from geodiag.hooks.control.policy import Policy, Rollback
from geodiag.spikes.detector import Spike

Action = Literal["enable", "disable", "none"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do now, and why."""

    action: Action
    """Whether a period begins (`enable`) or ends (`disable`)."""
    reason: str
    acted: bool
    """False for a decision that is only recorded."""
    actions: tuple[str, ...] = ()
    """The policy's lasting actions that begin or end."""
    restore: int | None = None
    """First of all, roll back to the snapshot of this step."""
    skip: range | None = None
    """Steps whose batches are skipped after the rollback."""
    next_possible: int | None = None
    """The first step at which a spike could start another period; None if no step can."""


def spike_text(spike: Spike, step: int) -> str:
    """Return what was detected, and when."""
    if spike.kind == "nonfinite":
        return f"the loss is not finite since step {spike.onset}"
    return f"{spike.kind} raised at step {step} (onset {spike.onset}, {spike.score:.1f} σ)"


def no_remedy_text(spike: Spike, policy: Policy) -> str:
    """Return why nothing can be done about a loss that is not finite."""
    why = "routing cannot repair weights"
    if policy.does(Rollback):
        why = "no snapshot from before the onset is kept"
    return f"{spike_text(spike, spike.onset)}: {why}; restart from a checkpoint before that step"


def plan_text(
    policy: Policy, restore: int | None, skip: range | None, warm_up: int, may_roll_back: bool
) -> str:
    """Return what a period does: rollback, skipped batches, lasting actions and their duration."""
    parts = []
    if restore is not None:
        parts.append(f"roll back to the snapshot of step {restore}")
    elif policy.does(Rollback) and may_roll_back:
        parts.append("no rollback, because no snapshot from before the onset is kept")

    if skip is not None:
        parts.append(f"skip the batches of steps {skip.start} to {skip.stop - 1}")
    if policy.lower_lr is not None:
        parts.append(f"learning rate × {policy.lower_lr.factor:g}")
    if policy.clamp is not None:
        parts.append(f"clamp at {policy.clamp.limit:g}")

    if policy.lasting:
        after = f" after {warm_up} of warm-up" if warm_up else ""
        parts.append(f"on for {policy.period} steps{after}")
    return ", ".join(parts)
