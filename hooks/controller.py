"""The controller: verdicts in, decisions out. When anticipatory routing goes on, for how long, and why.

`off` records what it would have done, `auto` does it, `on` keeps routing on. Every decision has its reason.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from geodiag.spikes import Spike, Verdict

Policy = Literal["off", "auto", "on"]
TRIGGERS = ("spike", "divergence")


def _checked(policy: str) -> Policy:
    if policy not in ("off", "auto", "on"):
        raise ValueError(f"policy is off, auto or on, not {policy!r}")
    return policy  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do about routing now; `acted` is False where it is only on record."""

    action: Literal["enable", "disable", "none"]
    reason: str
    acted: bool


@dataclass(kw_only=True)
class Controller:
    """Decides once a step. It has no clock but the steps and touches no model."""

    policy: Policy = "off"
    period: int = 50
    """Steps that routing stays on after a spike, warm-up not counted."""
    cooldown: int = 100
    """Steps after a period in which a new spike does not start another one."""
    budget: int = 8
    """Activations allowed in a run."""
    delay_steps: int = 8
    activations: int = 0
    until: int | None = None
    """The step at which the period under way ends; also kept for periods that were only on record."""
    resting_until: int = -1

    def __post_init__(self) -> None:
        self.policy = _checked(self.policy)
        if self.period < 1 or self.cooldown < 0 or self.budget < 0:
            raise ValueError("period is at least 1, cooldown and budget at least 0")

    def set_policy(self, policy: str) -> None:
        """The policy that a run begins with. ValueError for an unknown one."""
        self.policy = _checked(policy)

    def ask(self, policy: str, step: int) -> Decision:
        """Somebody set the policy by hand: takes effect at once, with no period, no cooldown and a whole budget.

        Asking for the `auto` that is there already changes nothing, a period under way included.
        """
        before, self.policy = self.policy, _checked(policy)
        reason = f"asked for: {policy}"
        if policy == before == "auto":
            return Decision(action="none", reason=f"{reason}, as it was", acted=True)
        self.until, self.resting_until, self.activations = None, -1, 0
        if policy == "on":
            return Decision(action="enable", reason=reason, acted=True)
        if policy == "off" or before == "on":
            return Decision(action="disable", reason=reason, acted=True)
        return Decision(action="none", reason=reason, acted=True)

    def decide(self, step: int, verdict: Verdict) -> Decision | None:
        """What this step's verdict calls for; None where nothing is to be said."""
        raised = verdict.raised
        if raised is not None and raised.kind == "nonfinite":
            return Decision(
                action="none",
                reason=f"the loss is not finite since step {raised.onset}: "
                "routing cannot mend weights; restart from a checkpoint before that step",
                acted=False,
            )
        if self.policy == "on":
            return None
        if raised is not None and raised.kind in TRIGGERS:
            return self._on_spike(step, raised)
        if self.until is not None and step >= self.until:
            self.until = None
            self.resting_until = step + self.cooldown
            return self._decision("disable", f"the period of {self.period} steps is over")
        return None

    def _on_spike(self, step: int, spike: Spike) -> Decision:
        what = f"{spike.kind} raised at step {step} (onset {spike.onset}, {spike.score:.1f} σ)"
        if self.until is not None:
            # The warm-up is paid already, or still to come as planned: a whole period follows the spike either way.
            self.until = max(self.until, step + self.period)
            return self._decision("none", f"{what} while the period was running: it lasts until step {self.until}")
        if step < self.resting_until:
            return self._decision("none", f"{what}, but routing rests until step {self.resting_until} (cooldown)")
        if self.activations >= self.budget:
            return self._decision("none", f"{what}, but the budget of {self.budget} activations is used up")
        self.activations += 1
        self.until = step + self.delay_steps + self.period
        return self._decision("enable", f"{what}: on for {self.period} steps after {self.delay_steps} of warm-up")

    def _decision(self, action: Literal["enable", "disable", "none"], reason: str) -> Decision:
        acted = self.policy == "auto"
        return Decision(action=action, reason=reason if acted else f"would have acted: {reason}", acted=acted)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
