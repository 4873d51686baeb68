"""The controller's state: the policy, the current period and cooldown, and the last rollback."""

from dataclasses import dataclass, field, fields
from typing import Any

from geodiag.defaults import DELAY_STEPS
from geodiag.hooks.control.policy import Policy

_OLD_NAMES = {
    "until": "period_end",
    "resting_until": "cooldown_end",
    "went_back": "rolled_back",
    "lingering": "awaiting_recovery",
    "restored": "restored_step",
    "reached": "rolled_back_from",
}
"""Fields in snapshots of geodiag before version 0.2, by the name that they had."""


@dataclass(kw_only=True)
class ControllerState:
    """Everything that a controller remembers from one step to the next."""

    policy: Policy = field(default_factory=Policy)
    delay_steps: int = DELAY_STEPS
    """Δ of the routing: the number of warm-up steps."""
    activations: int = 0
    """Periods so far, to be compared with `policy.budget`."""
    period_end: int | None = None
    """The step at which the current period ends, also of a period that is only recorded."""
    cooldown_end: int = -1
    """Before this step no spike starts a period."""
    rolled_back: bool = False
    """Whether the current period has used its rollback."""
    awaiting_recovery: bool = False
    """Whether the period is over but continues, because the loss has not recovered."""
    restored_step: int = -1
    """The snapshot of the last rollback."""
    rolled_back_from: int = -1
    """The last step before the last rollback."""

    def reset(self) -> None:
        """End the current period and cooldown, and restore the full budget."""
        self.activations = 0
        self.period_end = None
        self.cooldown_end = -1
        self.rolled_back = False
        self.awaiting_recovery = False

    def extend_period(self, step: int) -> None:
        """Let the current period, or a new one, last at least until `step`."""
        self.period_end = max(self.period_end or step, step)
        self.awaiting_recovery = False

    def end_period(self, step: int) -> None:
        """End the period at `step` and begin the cooldown."""
        self.period_end = None
        self.cooldown_end = step + self.policy.cooldown
        self.rolled_back = False
        self.awaiting_recovery = False

    def rollback_failed(self, step: int) -> None:
        """Count the current period from `step`, because its rollback could not be done."""
        if self.period_end is not None:
            self.period_end += step + 1 - self.restored_step
        self.rolled_back = False

    def next_possible(self) -> int | None:
        """Return the first step at which a spike could start a period, None if no step can."""
        if self.policy.mode == "on" or self.activations >= self.policy.budget:
            return None
        if self.period_end is None:
            return max(self.cooldown_end, 0)
        return self.period_end + 1 + self.policy.cooldown

    def state_dict(self) -> dict[str, Any]:
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        return state | {"policy": self.policy.as_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            name = _OLD_NAMES.get(name, name)
            setattr(self, name, Policy.parse(**value) if name == "policy" else value)
