"""The policy: what may be done about a training, on what, and how often. One object, written as
people write it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from geodiag.spikes.event import Spike

Mode = Literal["off", "auto", "on"]
MODES = ("off", "auto", "on")
ACTIONS = {
    "rollback": "back to the newest snapshot from before the onset",
    "skip-batch": "the batches of the onset are left out when training comes by again; needs rollback",
    "route": "anticipatory routing for the period",
    "lower-lr": "the learning rate times this for the period, written lower-lr=0.5",
    "clamp": "the SwiGLU clamp at this limit for the period, written clamp=10",
}
"""Everything that can be done, in the order in which it is done."""
_NUMBERED = ("lower-lr", "clamp")
_LONGEST_SKIP = 16


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to intervene, how, for how long and how often.

        Policy(mode="auto", on="spike,warning", actions="rollback,route,lower-lr=0.5")

    `on` and `actions` are lists with commas. ValueError for what makes no sense.
    """

    mode: Mode = "off"
    """`off` only records what it would do, `auto` does it, `on` keeps anticipatory routing on."""
    on: str = "spike"
    actions: str = "route"
    period: int = 50
    """Steps that an intervention lasts, warm-up of the routing not counted."""
    cooldown: int = 100
    """Steps after a period in which a new spike does not start another one."""
    budget: int = 8
    """Interventions allowed in a run."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"policy is off, auto or on, not {self.mode!r}")
        if self.period < 1 or self.cooldown < 0 or self.budget < 0:
            raise ValueError("period is at least 1, cooldown and budget at least 0")
        for trigger in _words(self.on):
            if trigger not in ("spike", "warning") and not trigger.startswith("schedule:"):
                raise ValueError(
                    f"cannot act on {trigger!r}; it is spike, warning or schedule:START-END"
                )
        _ = self.schedules
        self._check_actions()

    def _check_actions(self) -> None:
        wanted = self._wanted
        for name, value in wanted.items():
            if name not in ACTIONS:
                raise ValueError(f"there is no action {name!r}; it is one of {', '.join(ACTIONS)}")
            if (name in _NUMBERED) != (value is not None):
                raise ValueError(
                    f"write {name}=NUMBER" if name in _NUMBERED else f"{name} takes no number"
                )
        if not 0 <= wanted.get("lower-lr", 0.5) < 1:  # type: ignore[operator]
            raise ValueError(f"lower-lr is a factor from 0 to below 1, not {wanted['lower-lr']:g}")
        if not wanted.get("clamp", 1.0) > 0:  # type: ignore[operator]
            raise ValueError(f"clamp is a limit above 0, not {wanted['clamp']:g}")
        if "skip-batch" in wanted and "rollback" not in wanted:
            raise ValueError(
                "skip-batch needs rollback: a batch that was trained on can only be left out by going back"
            )

    @cached_property
    def _wanted(self) -> dict[str, float | None]:
        pairs = [word.partition("=") for word in _words(self.actions)]
        return {name: _number(name, value) if equals else None for name, equals, value in pairs}

    @cached_property
    def schedules(self) -> tuple[tuple[int, int], ...]:
        """(first step, the step after the last) of every fixed period."""
        return tuple(_span(word) for word in _words(self.on) if word.startswith("schedule:"))

    def acts_on(self, trigger: str) -> bool:
        return trigger in _words(self.on)

    def does(self, action: str) -> bool:
        return action in self._wanted

    def value(self, action: str) -> float:
        """The number that `lower-lr` or `clamp` was given."""
        value = self._wanted[action]
        assert value is not None, "__post_init__ has seen it"
        return value

    @property
    def lasting(self) -> tuple[str, ...]:
        """What begins with a period and ends with it; `on` keeps routing in any case."""
        kept = ("lower-lr", "clamp") if self.mode == "on" else ("route", "lower-lr", "clamp")
        return tuple(a for a in kept if self.does(a))

    def skipped(self, spike: "Spike") -> range | None:
        """The steps whose batches are left out after going back: from the update that led to the
        onset to detection.
        """
        if not self.does("skip-batch"):
            return None
        first = max(spike.onset - 1, 0)
        return range(first, min(spike.detected, first + _LONGEST_SKIP - 1) + 1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text} is no number") from None


def _span(word: str) -> tuple[int, int]:
    first, dash, after = word.removeprefix("schedule:").partition("-")
    if not (dash and first.isdecimal() and after.isdecimal() and int(first) < int(after)):
        raise ValueError(
            f"cannot read {word!r}; write schedule:START-END, two steps, the second the larger"
        )
    return int(first), int(after)


def as_policy(policy: Any) -> Policy:
    """A policy as it is, or one that a mode alone names."""
    return policy if isinstance(policy, Policy) else Policy(mode=policy)
