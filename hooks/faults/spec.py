"""Kinds of faults, and the notation KIND@STEP[-LAST][:LAYER][=MAGNITUDE] for one planted fault.

A fault with FIRST-LAST grows: it is planted again at each of these steps, on top of itself.
"""

import math
import re
from dataclasses import dataclass

from geodiag.errors import GeodiagError

LASTING = 10
"""Steps that a fault of the forward, the gradients, the batch or the learning rate lasts.

A fault of a weight stays.
"""


@dataclass(frozen=True)
class Kind:
    """One kind of fault: what its magnitude means, and where it can be planted."""

    magnitude: float | None
    """Default magnitude; None for a kind that has no magnitude."""
    help: str
    place: str | None
    """What a layer must have: experts, router, bias, res or block. None for a fault of no layer."""
    lasts: bool = False
    """True if the fault is removed after `LASTING` steps, False if it changes a weight for good."""
    grows: bool = True
    """Whether planting the fault again makes it larger."""


KINDS = {
    "expert-scale": Kind(30.0, "one expert's gate and up weights times MAGNITUDE", "experts"),
    "gate-column": Kind(30.0, "one expert's row of the router times MAGNITUDE", "router"),
    "router-shift": Kind(
        3.0, "MAGNITUDE standard deviations of noise added to the router's weights", "router"
    ),
    "router-permute": Kind(None, "the router's rows in another order", "router", grows=False),
    "bias-kick": Kind(1.0, "MAGNITUDE added to one expert's balancing bias", "bias"),
    "residual-expand": Kind(1.5, "H_res of the layer's sites times MAGNITUDE", "res", lasts=True),
    "block-scale": Kind(20.0, "the feed-forward output times MAGNITUDE", "block", lasts=True),
    "lr-shock": Kind(10.0, "the learning rate times MAGNITUDE", None, lasts=True),
    "far-batch": Kind(None, "batches of random tokens", None, lasts=True, grows=False),
    "grad-scale": Kind(
        100.0, "the layer's gradients, before clipping, times MAGNITUDE", "block", lasts=True
    ),
    "bit-flip": Kind(
        -2.0,
        "bit MAGNITUDE of the largest gate weight of one expert flipped; "
        "-1 is its sign, -2 the bit below",
        "experts",
        grows=False,
    ),
}
"""Every kind of fault."""

FORM = "KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"
_FORM = re.compile(
    r"(?P<kind>[a-z-]+)@(?P<step>\d+)(-(?P<until>\d+))?(:(?P<layer>\d+))?(=(?P<magnitude>.+))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One planted fault."""

    kind: str
    step: int
    layer: int | None
    magnitude: float | None
    until: int | None = None
    """The last step at which the fault grows; None for a fault that does not grow."""

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Parse `KIND@STEP[-LAST][:LAYER][=MAGNITUDE]`. GeodiagError for any other text."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise GeodiagError(f"cannot read the fault {text!r}; write {FORM}")
        _check_options(match)

        name = match["kind"]
        kind = KINDS[name]
        magnitude = kind.magnitude
        if match["magnitude"] is not None:
            magnitude = _number(match["magnitude"], whole=name == "bit-flip")

        fault = cls(
            kind=name,
            step=int(match["step"]),
            layer=None if match["layer"] is None else int(match["layer"]),
            magnitude=magnitude,
            until=None if match["until"] is None else int(match["until"]),
        )
        if kind.lasts and not math.isfinite(fault.strength(fault.last_step)):
            raise GeodiagError(
                f"{text} grows beyond the largest float; pass a smaller MAGNITUDE, or fewer steps"
            )
        return fault

    @property
    def planted(self) -> range:
        """The steps at which the fault is planted: one, or all those at which it grows."""
        last = self.step if self.until is None else self.until
        return range(self.step, last + 1)

    @property
    def last_step(self) -> int:
        """The last disturbed step; for a fault of a weight, the last step of planting."""
        last_planted = self.planted[-1]
        return last_planted + LASTING - 1 if KINDS[self.kind].lasts else last_planted

    def strength(self, step: int) -> float:
        """Return the factor of a lasting fault at `step`: MAGNITUDE ** (steps it has grown)."""
        grown = min(step, self.planted[-1]) - self.step + 1
        try:
            return (self.magnitude or 0.0) ** grown
        except OverflowError:
            return math.inf

    @property
    def description(self) -> str:
        """What the fault does, in words."""
        kind = KINDS[self.kind]
        what = kind.help
        if self.magnitude is not None:
            what = what.replace("MAGNITUDE", f"{self.magnitude:g}")
        grows = "" if self.until is None else f", again at every step to {self.until}"
        lasts = f" for {LASTING} steps" if kind.lasts else ""
        return f"{what}{grows}{lasts}"


def _check_options(match: re.Match[str]) -> None:
    """GeodiagError for an unknown kind, or for an option that the kind does not have."""
    name = match["kind"]
    step = int(match["step"])
    if name not in KINDS:
        raise GeodiagError(f"unknown fault kind {name!r}; one of {', '.join(KINDS)}")

    kind = KINDS[name]
    if match["layer"] is not None and kind.place is None:
        raise GeodiagError(f"{name} belongs to no layer; write {name}@{step}")
    if match["magnitude"] is not None and kind.magnitude is None:
        raise GeodiagError(f"{name} has no magnitude; leave out ={match['magnitude']}")

    if match["until"] is None:
        return
    until = int(match["until"])
    if not kind.grows:
        raise GeodiagError(f"{name} cannot grow; write {name}@{step}")
    if until <= step:
        example = f"{step}-{step + 30}"
        raise GeodiagError(
            f"{name}@{step}-{until} ends before it grows; write FIRST-LAST, e.g. {example}"
        )


def _number(text: str, whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (whole and value != int(value)):
        raise GeodiagError(f"the magnitude {text!r} is no {'whole' if whole else 'finite'} number")
    return value
