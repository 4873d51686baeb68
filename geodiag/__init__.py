"""geodiag: where and why a mixture-of-experts run is about to tear, and what stops it.

Importing this module loads neither torch nor dash; the names that need torch load it when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geodiag.errors import GeodiagError
from geodiag.run import Run, open_run
from geodiag.spikes import SpikeDetector

if TYPE_CHECKING:
    from geodiag.hooks.anticipatory import AnticipatoryRouting
    from geodiag.hooks.monitor import attach

__version__ = "0.1.0"

__all__ = ["AnticipatoryRouting", "GeodiagError", "Run", "SpikeDetector", "__version__", "attach", "open_run"]

_TORCH_SIDE = {"attach": "geodiag.hooks.monitor", "AnticipatoryRouting": "geodiag.hooks.anticipatory"}


def __getattr__(name: str) -> Any:
    if name in _TORCH_SIDE:
        return getattr(import_module(_TORCH_SIDE[name]), name)
    raise AttributeError(f"module 'geodiag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
