"""One file a model family; `find_layout` asks them in turn."""

from torch import nn

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import deepseek_v4, generic, reference
from geodiag.hooks.adapters.base import Layout

__all__ = ["Layout", "find_layout"]


def find_layout(model: nn.Module) -> Layout:
    """What geodiag may look at in `model`. GeodiagError where it finds no blocks at all."""
    for family in (reference, deepseek_v4, generic):
        layout = family.find(model)
        if layout is not None:
            return layout
    raise GeodiagError(
        f"{type(model).__name__} has no list of alike blocks to watch; "
        "attach to the module that holds the decoder's layers"
    )
