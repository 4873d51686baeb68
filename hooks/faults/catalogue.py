"""docs/faults.md, printed from `KINDS`."""

from geodiag.hooks.faults.spec import FORM, KINDS, LASTING, Kind

_NEEDS = {
    "experts": "experts",
    "router": "a learned router",
    "bias": "a balancing bias",
    "res": "hyper-connections",
}
"""Target of a fault → what the model must have."""


def page() -> str:
    """Return docs/faults.md as text. A test compares the file with this function's result."""
    head = f"""# Faults to plant

Printed from `hooks/faults/spec.py` by `python -m geodiag.hooks.faults`. A fault is written
`{FORM}`, and `--inject` may be given several times:
`geodiag train --inject expert-scale@120:3=30`. Without a layer, geodiag takes the middle one of the
layers that have what the fault needs; the expert is STEP modulo the number of experts. A fault of a
weight stays; all other faults last {LASTING} steps and are then removed. Each fault is recorded as
an event of kind `fault` with its layer, expert and magnitude.

With FIRST-LAST a fault grows: `residual-expand@120-150:2=1.1` is planted at each of these steps, on
top of itself, in the same layer and expert, and reaches 1.1 to the 31st power at the last step. A
fault that lasts then continues for {LASTING} steps, counted from LAST.

| kind | what is done | MAGNITUDE unless given | needs | lasts | grows |
|---|---|---|---|---|---|"""
    rows = [_row(name, kind) for name, kind in KINDS.items()]
    return "\n".join([head, *rows]) + "\n"


def _row(name: str, kind: Kind) -> str:
    magnitude = "–" if kind.magnitude is None else f"{kind.magnitude:g}"
    cells = [
        f"`{name}`",
        kind.help,
        magnitude,
        _NEEDS.get(kind.place or "", "nothing"),
        f"{LASTING} steps" if kind.lasts else "stays",
        "yes" if kind.grows else "no",
    ]
    return f"| {' | '.join(cells)} |"
