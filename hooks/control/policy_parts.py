"""Actions and triggers of a policy, and their text forms: `str(LowerLr(0.5)) == "lower-lr=0.5"`.

The command line, the manifest and snapshots use the text forms.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, get_args


@dataclass(frozen=True)
class _Named:
    """An action or a trigger whose text form is its name."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return self.name


# -- actions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollback(_Named):
    """Roll back to the newest snapshot from before the onset of the spike."""

    name = "rollback"


@dataclass(frozen=True)
class SkipBatch(_Named):
    """Skip the batches that led to the spike after a rollback; needs `Rollback`."""

    name = "skip-batch"


@dataclass(frozen=True)
class Route(_Named):
    """Choose experts by older weights (anticipatory routing) for the period."""

    name = "route"


@dataclass(frozen=True)
class LowerLr(_Named):
    """Multiply the learning rate by `factor` for the period."""

    name = "lower-lr"
    factor: float
    """From 0 to below 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise ValueError(f"lower-lr is a factor from 0 to below 1, not {self.factor:g}")

    def __str__(self) -> str:
        return f"{self.name}={_short(self.factor)}"


@dataclass(frozen=True)
class Clamp(_Named):
    """Clamp the SwiGLU pre-activations of all experts at `limit` for the period."""

    name = "clamp"
    limit: float
    """Above 0."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"clamp is a limit above 0, not {self.limit:g}")

    def __str__(self) -> str:
        return f"{self.name}={_short(self.limit)}"


Action = Rollback | SkipBatch | Route | LowerLr | Clamp
ACTIONS: dict[str, type[Action]] = {kind.name: kind for kind in get_args(Action)}
"""Every action by its name, in the order in which actions are carried out."""


# -- triggers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnSpike(_Named):
    """Intervene on a spike or a divergence. A loss that is not finite needs no trigger."""

    name = "spike"


@dataclass(frozen=True)
class OnWarning(_Named):
    """Intervene on an early warning, before the loss spikes."""

    name = "warning"


@dataclass(frozen=True)
class Schedule(_Named):
    """Intervene from step `start` until step `end`, which is excluded."""

    name = "schedule"
    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(
                f"cannot read {str(self)!r}; write schedule:START-END, two steps, "
                "the second the larger"
            )

    def __str__(self) -> str:
        return f"{self.name}:{self.start}-{self.end}"


Trigger = OnSpike | OnWarning | Schedule


# -- text ----------------------------------------------------------------------------------


def as_text(parts: Iterable[Action | Trigger]) -> str:
    """Return the text form that `parse_actions` and `parse_triggers` read."""
    return ",".join(map(str, parts))


def _short(number: float) -> str:
    """Return the shortest text that reads back as the same number: 0.5, 10."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def parse_actions(text: str) -> tuple[Action, ...]:
    """Return the actions of a text such as "rollback,lower-lr=0.5". ValueError with the fix."""
    return tuple(_parse_action(word) for word in _words(text))


def parse_triggers(text: str) -> tuple[Trigger, ...]:
    """Return the triggers of a text such as "spike,schedule:5-9". ValueError with the fix."""
    return tuple(_parse_trigger(word) for word in _words(text))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parse_action(word: str) -> Action:
    name, equals, value = word.partition("=")
    kind = ACTIONS.get(name)
    if kind is None:
        raise ValueError(f"there is no action {name!r}; it is one of {', '.join(ACTIONS)}")
    if kind is LowerLr or kind is Clamp:
        if not equals:
            raise ValueError(f"write {name}=NUMBER")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{word} is no number") from None
        return kind(number)
    if equals:
        raise ValueError(f"{name} takes no number")
    return kind()  # type: ignore[call-arg]  # neither LowerLr nor Clamp


def _parse_trigger(word: str) -> Trigger:
    for kind in (OnSpike, OnWarning):
        if word == kind.name:
            return kind()
    name, _, span = word.partition(":")
    if name != Schedule.name:
        raise ValueError(f"cannot act on {word!r}; it is spike, warning or schedule:START-END")
    start, _, end = span.partition("-")
    if not (start.isdecimal() and end.isdecimal()):
        raise ValueError(
            f"cannot read {word!r}; write schedule:START-END, two steps, the second the larger"
        )
    return Schedule(int(start), int(end))
