"""Trials of `geodiag bench routing`: scenarios, their arms, and the order of the trials."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from geodiag.benchmarks.routing_trial import ARMS, RAISED_AT, Arm, Scenario

Plan = list[tuple[Scenario, tuple[str, ...]]]
"""Scenario → its arms; the healthy twins of planted faults are trained too."""
Job = tuple[Scenario, Arm, int]
"""With its seed."""
RESIDUALS = [(r, c) for r in ("hc", "mhc") for c in (10.0, None)]

# -- tiny ----------------------------------------------------------------------------------------

_FAULTY = Scenario(name="", steps=150, residual="hc")
FAULTS = ("lr-shock@75=100", "far-batch@75", "expert-scale@75=30")
PLANTED = [replace(_FAULTY, name=f"{f}, hc, clamp", fault=f) for f in FAULTS]
GRID = [
    replace(
        _FAULTY,
        name=f"{FAULTS[2]}, {r}, {'clamp' if c else 'no clamp'}",
        residual=r,
        clamp=c,
        fault=FAULTS[2],
    )
    for r, c in RESIDUALS
    if (r, c) != ("hc", 10.0)  # that one is among the others
]
NATURAL = Scenario(name="learning rate 0.1, hc, clamp", steps=280, residual="hc", lr=0.1)
NATURAL_GRID = [
    replace(
        NATURAL, name=f"learning rate 0.1, {r}, {'clamp' if c else 'no clamp'}", residual=r, clamp=c
    )
    for r, c in RESIDUALS
    if (r, c) != ("hc", 10.0)
]
DOMAINS = Scenario(
    name="domains in turn, learning rate 0.03, hc", steps=240, residual="hc", lr=0.03, turn=60
)
ANSWERS = (
    "none",
    "rollback",
    "rollback + anticipatory",
    "rollback + skip-batch",
    "anticipatory",
    "router-lag",
)
ALWAYS = (
    "none",
    "rollback",
    "rollback + noise",
    "rollback + anticipatory",
    "rollback + lower-lr",
    "rollback + anticipatory + lower-lr",
    "always anticipatory",
    "always router-lag",
)
DELAYS = ("always anticipatory, Δ = 1", "always anticipatory, Δ = 32")
MAIN: Plan = [
    (NATURAL, ALWAYS),
    (PLANTED[0].twin, ("none", "always anticipatory", "always router-lag")),
    *((s, ANSWERS) for s in PLANTED),
    (DOMAINS, ("none", "rollback + anticipatory", "always anticipatory")),
]
MORE: Plan = [
    (NATURAL, DELAYS),
    *((s, ("none", "always anticipatory")) for s in NATURAL_GRID),
    *((s, ("none", "rollback + anticipatory")) for s in GRID),
]
"""Other delays, and the clamp with each kind of residual: after every three seeds of `MAIN`, for
those seeds.
"""

# -- small, on GPUs ------------------------------------------------------------------------------

_SMALL = Scenario(name="", steps=220, residual="hc", size="small", deterministic=True)
SMALL_LR = 0.1
BACK = (
    "rollback",
    "rollback + noise",
    "rollback + anticipatory",
    "rollback + router-lag",
    "rollback + lower-lr",
    "rollback + anticipatory + lower-lr",
)
"""What differs only in what comes with going back: from the same spike on, seed by seed."""


def driven(lr: float, residual: str = "hc", clamp: float | None = 10.0) -> Scenario:
    """`small` at an aggressive learning rate, where spikes come by themselves."""
    name = f"small, learning rate {lr:g}, {residual}, {'clamp' if clamp else 'no clamp'}"
    return replace(_SMALL, name=name, lr=lr, residual=residual, clamp=clamp)


def in_turn(lr: float) -> Scenario:
    """`small` on one domain after another."""
    return replace(
        _SMALL, name=f"small, domains in turn, learning rate {lr:g}, hc, clamp", lr=lr, turn=55
    )


def faulty(fault: str) -> Scenario:
    """`small` at a stable learning rate with a planted fault."""
    return replace(_SMALL, name=f"small, {fault}, hc, clamp", fault=fault, steps=160)


def raised(factor: float, residual: str = "hc", clamp: float | None = 10.0) -> Scenario:
    """`small` at a stable learning rate that becomes far too large and stays there."""
    clamped = "clamp" if clamp else "no clamp"
    name = f"small, learning rate × {factor:g} from step {RAISED_AT}, {residual}, {clamped}"
    return replace(_SMALL, name=name, raised=factor, residual=residual, clamp=clamp, steps=190)


def small(lr: float, fault: str = "lr-shock@90=30") -> list[Plan]:
    """Return the plans of `small`, the most informative first: one scenario with every arm."""
    few = ("none", "rollback + noise", "rollback + anticipatory")
    return [
        [
            (
                raised(30),
                (
                    "none",
                    *BACK,
                    "anticipatory",
                    "router-lag",
                    "always anticipatory",
                    "always router-lag",
                ),
            )
        ],
        [
            *(
                (raised(30, r, c), ("none", "rollback + anticipatory"))
                for r, c in RESIDUALS
                if (r, c) != ("hc", 10.0)
            ),
            (raised(10), (*few, "rollback + lower-lr")),
            (driven(lr), (*few, "rollback + lower-lr")),
            (in_turn(lr / 2), few),
            (faulty(fault), ("none", "rollback", "rollback + anticipatory")),
        ],
    ]


PILOT: list[Scenario] = [
    *(driven(lr) for lr in (0.02, 0.03, 0.05, 0.1, 0.2)),
    *(driven(lr, "mhc") for lr in (0.05, 0.1, 0.2)),
    in_turn(0.02),
    faulty("lr-shock@90=30"),
    faulty("lr-shock@90=100"),
    faulty("far-batch@90"),
    raised(10),
    raised(30),
]
"""Which of these spike? Trained without intervention on a seed that no plan uses, and shorter."""
PILOT_SEED = 1000
PILOT_STEPS = 130

# -- order ---------------------------------------------------------------------------------------


def plans(size: str, lr: Sequence[float] = (SMALL_LR,)) -> list[Plan]:
    """Return the plans of a size; `lr`: learning rates at which the pilot of `small` spiked."""
    return [MAIN, MORE] if size == "tiny" else [plan for each in lr for plan in small(each)]


def jobs(
    plans: Sequence[Plan], seeds: Sequence[int], only: Sequence[str] = (), together: int = 3
) -> Iterator[Job]:
    """Yield `together` seeds of a plan before the next plan.

    Whenever the time is up, every scenario then has about as many trials.
    """
    for first in range(0, len(seeds), together):
        for plan in plans:
            chosen = [
                (s, arms) for s, arms in plan if not only or any(word in s.name for word in only)
            ]
            pairs = [(s, arm) for s, arms in chosen for arm in arms]
            pairs = list(dict.fromkeys([*((s.twin, "none") for s, _ in chosen if s.fault), *pairs]))
            yield from (
                (s, ARMS[arm], seed) for seed in seeds[first : first + together] for s, arm in pairs
            )


def pilot() -> Iterator[Job]:
    """Yield the jobs of the pilot. No plan trains on its seed.

    A scenario that was chosen because it spiked has to be measured on other seeds.
    """
    yield from ((replace(s, steps=PILOT_STEPS), ARMS["none"], PILOT_SEED) for s in PILOT)
