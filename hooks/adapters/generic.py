"""Adapter for any stack of blocks: without knowledge of the model, the stream between blocks."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from geodiag.hooks.adapters.base import Layout, MixView, Site, Watch
from geodiag.hooks.adapters.module_hooks import on_input, on_output, output_scaling


def find(model: nn.Module) -> Layout | None:
    """Return the layout of the longest list of alike blocks, None if the model has no such list."""
    blocks = max(_stacks(model), key=len, default=None)
    if blocks is None:
        return None
    return Layout(
        family=type(model).__name__,
        layers=blocks,
        sites=[
            Site(
                layer=i,
                site="block",
                watch_mix=_stream(b),
                watch_branch=None,
                scale_branch=output_scaling(b, _scaled),
            )
            for i, b in enumerate(blocks)
        ],
        watch_input=_embedding(model),
        watch_end=on_output(blocks[-1], lambda _a, _k, out: _first(out)),
        has_stream_axis=False,
        missing=[
            "no hyper-connections found: streams and their transport are recorded, "
            "H_res gains are not",
            "no router found: flips, loads and margins are not recorded",
            "no gated experts found: clamp hits and expert norms are not recorded",
        ],
    )


def _stacks(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield each list of at least two modules of one type that have submodules."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            blocks = list(module)
            if len({type(b) for b in blocks}) == 1 and any(True for _ in blocks[0].children()):
                yield blocks


def _embedding(model: nn.Module) -> Watch | None:
    """Return a watch of the first embedding, which is assumed to be the tokens'."""
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return None if first is None else on_output(first, lambda _a, _k, out: out)


def _stream(block: nn.Module) -> Watch:
    return on_input(block, lambda args, kwargs: MixView(_first((*args, *kwargs.values()))))


def _first(values: Any) -> Tensor:
    """Return the first floating-point tensor of a block's arguments or output: its hidden state."""
    if isinstance(values, Tensor):
        return values
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError(
        "a block takes or returns no floating-point tensor, so it has no stream to watch"
    )


def _scaled(output: Any, factor: float) -> Any:
    return output * factor if isinstance(output, Tensor) else (output[0] * factor, *output[1:])
