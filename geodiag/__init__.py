"""geodiag: where and why a mixture-of-experts run is about to tear, and what stops it.

Importing this module loads neither torch nor dash nor pandas: each public name loads what it needs
when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geodiag.errors import GeodiagError
from geodiag.extras import requires_extra

if TYPE_CHECKING:
    from geodiag.cascade.explain import explain
    from geodiag.hooks import faults
    from geodiag.hooks.attach import attach
    from geodiag.hooks.control import policy
    from geodiag.hooks.control.policy import Policy
    from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
    from geodiag.hooks.routing.router_lag import RouterLag
    from geodiag.hooks.snapshots.snapshots import Snapshots
    from geodiag.run import Run, open_run
    from geodiag.spikes.detector import SpikeDetector

__version__ = "0.1.0"

__all__ = [
    "AnticipatoryRouting",
    "GeodiagError",
    "Policy",
    "RouterLag",
    "Run",
    "Snapshots",
    "SpikeDetector",
    "__version__",
    "attach",
    "explain",
    "faults",
    "open_run",
    "policy",
]

_HOMES = {
    "AnticipatoryRouting": "geodiag.hooks.routing.anticipatory",
    "Policy": "geodiag.hooks.control.policy",
    "RouterLag": "geodiag.hooks.routing.router_lag",
    "Run": "geodiag.run",
    "Snapshots": "geodiag.hooks.snapshots.snapshots",
    "SpikeDetector": "geodiag.spikes.detector",
    "attach": "geodiag.hooks.attach",
    "explain": "geodiag.cascade.explain",
    "open_run": "geodiag.run",
}


_MODULES = {"faults": "geodiag.hooks.faults", "policy": "geodiag.hooks.control.policy"}
"""Public modules of another folder."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _MODULES:
        raise AttributeError(f"module 'geodiag' has no attribute {name!r}")
    with requires_extra(f"geodiag.{name}"):
        if name in _MODULES:
            return import_module(_MODULES[name])
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
