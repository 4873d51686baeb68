"""The policy: when geodiag intervenes in a training, with which actions, and how often.

    Policy(mode="auto", on=[OnSpike(), Schedule(100, 200)], actions=[Rollback(), LowerLr(0.5)])

`geodiag.policy` is this module. It is light: it loads neither torch nor numpy.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack, get_args

from geodiag.hooks.control.policy_parts import (
    Action,
    Clamp,
    LowerLr,
    OnSpike,
    OnWarning,
    Rollback,
    Route,
    Schedule,
    SkipBatch,
    Trigger,
    as_text,
    parse_actions,
    parse_triggers,
)

if TYPE_CHECKING:
    from geodiag.spikes.event import Spike

__all__ = [
    "Clamp",
    "LowerLr",
    "OnSpike",
    "OnWarning",
    "Policy",
    "Rollback",
    "Route",
    "Schedule",
    "SkipBatch",
]

Mode = Literal["off", "auto", "on"]
MODES: tuple[Mode, ...] = get_args(Mode)

_LONGEST_SKIP = 16
"""A late detection skips no more batches than this."""

_Part = TypeVar("_Part")


class _Settings(TypedDict, total=False):
    """Fields of a policy without a text form of their own."""

    mode: Mode
    period: int
    cooldown: int
    budget: int


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to intervene, how, for how long and how often. ValueError for a contradiction.

    The text forms `on="spike,warning"` and `actions="rollback,lower-lr=0.5"` are deprecated; use
    `Policy.parse` for text.
    """

    mode: Mode = "off"
    """`off` only records what it would do, `auto` does it, `on` keeps anticipatory routing on."""
    on: Sequence[Trigger] = (OnSpike(),)
    """What `auto` responds to."""
    actions: Sequence[Action] = (Route(),)
    """What `auto` does."""
    period: int = 50
    """Steps that an intervention lasts, without the warm-up of the routing."""
    cooldown: int = 100
    """Steps after a period in which a spike starts no other period."""
    budget: int = 8
    """Largest number of interventions in a run."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"policy is off, auto or on, not {self.mode!r}")
        if self.period < 1 or self.cooldown < 0 or self.budget < 0:
            raise ValueError("period is at least 1, cooldown and budget at least 0")

        if isinstance(self.on, str):
            _replace_text(self, "on", parse_triggers(self.on))
        if isinstance(self.actions, str):
            _replace_text(self, "actions", parse_actions(self.actions))
        object.__setattr__(self, "on", _checked(self.on, Trigger, "trigger"))
        object.__setattr__(self, "actions", _checked(self.actions, Action, "action"))

        if self.does(SkipBatch) and not self.does(Rollback):
            raise ValueError(
                "skip-batch needs rollback: a batch that was trained on can only be skipped after "
                "a rollback"
            )

    @classmethod
    def parse(
        cls, actions: str, *, on: str | None = None, **settings: Unpack[_Settings]
    ) -> "Policy":
        """Return the policy of texts such as "rollback,lower-lr=0.5" and "spike,schedule:5-9".

        settings: the other fields: mode, period, cooldown, budget.
        """
        triggers = cls.on if on is None else parse_triggers(on)
        return cls(actions=parse_actions(actions), on=triggers, **settings)

    def as_dict(self) -> dict[str, Any]:
        """Return the keyword arguments of `parse` for this policy; JSON can hold them."""
        return {
            "mode": self.mode,
            "on": as_text(self.on),
            "actions": as_text(self.actions),
            "period": self.period,
            "cooldown": self.cooldown,
            "budget": self.budget,
        }

    def acts_on(self, trigger: type[Trigger]) -> bool:
        """Whether the policy responds to triggers of this kind."""
        return self.find(trigger, self.on) is not None

    def does(self, action: type[Action]) -> bool:
        """Whether the policy has an action of this kind."""
        return self.find(action, self.actions) is not None

    @staticmethod
    def find(kind: type[_Part], parts: Iterable[Any]) -> _Part | None:
        """Return the last of `parts` that is of this kind."""
        return next((p for p in reversed(tuple(parts)) if isinstance(p, kind)), None)

    @property
    def lower_lr(self) -> LowerLr | None:
        return self.find(LowerLr, self.actions)

    @property
    def clamp(self) -> Clamp | None:
        return self.find(Clamp, self.actions)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The fixed periods."""
        return tuple(t for t in self.on if isinstance(t, Schedule))

    @property
    def lasting(self) -> tuple[str, ...]:
        """Names of the actions that begin and end with a period; mode `on` always routes."""
        kinds: tuple[type[Action], ...] = (Route, LowerLr, Clamp)
        kept = kinds[1:] if self.mode == "on" else kinds
        return tuple(kind.name for kind in kept if self.does(kind))

    def skipped(self, spike: "Spike") -> range | None:
        """Return the steps whose batches are skipped after a rollback, None without `SkipBatch`.

        They are those from the update that led to the onset until the detection.
        """
        if not self.does(SkipBatch):
            return None
        first = max(spike.onset - 1, 0)
        return range(first, min(spike.detected, first + _LONGEST_SKIP - 1) + 1)


def as_policy(policy: "Policy | str") -> Policy:
    """Return the policy itself, or the default policy in the mode of that name."""
    return policy if isinstance(policy, Policy) else Policy(mode=policy)  # type: ignore[arg-type]


def _replace_text(policy: Policy, field: str, parts: Sequence[Any]) -> None:
    """Replace the deprecated text of a field by its parts."""
    text = getattr(policy, field)
    fix = f"write {field}={list(parts)}, with the names in geodiag.policy, or use Policy.parse"
    warnings.warn(f"Policy({field}={text!r}) is deprecated; {fix}", DeprecationWarning, 4)
    object.__setattr__(policy, field, parts)


def _checked(parts: Iterable[_Part], kinds: Any, what: str) -> tuple[_Part, ...]:
    for part in parts:
        if not isinstance(part, kinds):
            names = ", ".join(kind.__name__ for kind in get_args(kinds))
            raise ValueError(f"there is no {what} {part!r}; it is one of {names}")
    return tuple(parts)
