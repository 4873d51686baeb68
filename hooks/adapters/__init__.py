"""One module per model family; `find_layout` tries them in order."""

from torch import nn

from geodiag.errors import GeodiagError
from geodiag.hooks import torch_internals
from geodiag.hooks.adapters import deepseek_v4, generic, reference
from geodiag.hooks.adapters.base import Layout

__all__ = ["Layout", "find_layout"]


def find_layout(model: nn.Module, fresh: bool = False) -> Layout:
    """Return what geodiag can observe in `model`.

    fresh: compiled parts of the model have not run yet, so hooks added now take effect.
    GeodiagError if the model has no blocks, or if it is compiled already.
    """
    if not fresh and any(torch_internals.is_compiled(m) for m in model.modules()):
        raise GeodiagError(
            f"{type(model).__name__} is compiled already, and compiled code ignores hooks that are "
            "added later; attach geodiag first, then call torch.compile"
        )
    for family in (reference, deepseek_v4, generic):
        layout = family.find(model)
        if layout is not None:
            return layout
    raise GeodiagError(
        f"{type(model).__name__} has no list of alike blocks to watch; "
        "attach to the module that holds the decoder's layers"
    )
