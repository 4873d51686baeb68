"""Forwards that leave no trace, and the expert ids they show."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from geodiag.hooks.adapters.base import Choice, RouterSite


@contextmanager
def traceless(model: nn.Module, evaluate: bool) -> Iterator[None]:
    """Inside, `model` can run without gradient; outside, nothing of it can be told.

    Random states (Python's, torch's, every GPU's), buffers and train/eval modes are as before. With `evaluate`
    the model runs in eval mode; without, in the mode it is in, so that dropout draws what the training step will.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b._version, b.clone()) for b in model.buffers()]
    python = random.getstate()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            if evaluate:
                model.eval()
            yield
        finally:
            random.setstate(python)
            for module, training in modes:
                module.training = training
            for buffer, version, saved in buffers:
                if buffer._version != version:
                    buffer.copy_(saved)


@contextmanager
def capturing(routers: Sequence[RouterSite]) -> Iterator[list[Choice]]:
    """Inside, every forward fills the yielded list with each router's choice, in router order."""
    seen: list[Choice] = [Choice(torch.empty(0), torch.empty(0))] * len(routers)

    def keep(place: int, site: RouterSite) -> Callable[..., None]:
        return lambda _m, _a, out: seen.__setitem__(place, site.chosen(out))

    handles = [r.module.register_forward_hook(keep(i, r)) for i, r in enumerate(routers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
