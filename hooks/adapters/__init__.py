"""One file a model family; `find_layout` asks them in turn."""

from torch import nn

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import deepseek_v4, generic, reference
from geodiag.hooks.adapters.base import Layout

__all__ = ["Layout", "find_layout"]


def find_layout(model: nn.Module, fresh: bool = False) -> Layout:
    """What geodiag may look at in `model`. GeodiagError where it finds no blocks at all, or could
    not watch them.

    fresh: what of it is compiled has not run yet, and will see hooks that come now.
    """
    if not fresh and any(_compiled(m) for m in model.modules()):
        raise GeodiagError(
            f"{type(model).__name__} is compiled already, and compiled code does not see hooks that come later; "
            "attach geodiag first, then call torch.compile"
        )
    for family in (reference, deepseek_v4, generic):
        layout = family.find(model)
        if layout is not None:
            return layout
    raise GeodiagError(
        f"{type(model).__name__} has no list of alike blocks to watch; "
        "attach to the module that holds the decoder's layers"
    )


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
