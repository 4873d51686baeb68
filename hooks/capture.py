"""Forwards that leave no trace, and the expert ids they show."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from geodiag.hooks.adapters.base import Choice, Removable, RouterSite


@contextmanager
def traceless(model: nn.Module, evaluate: bool) -> Iterator[None]:
    """Inside, `model` can run without gradient; outside, nothing of it can be told.

    Random states (Python's, numpy's, torch's, every GPU's), buffers and train/eval modes are as before. With
    `evaluate` the model runs in eval mode; without, in the mode it is in, so that dropout draws what the training
    step will.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [
        (m, name, b, b._version, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the training's own generator
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            if evaluate:
                model.eval()
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for module, training in modes:
                module.training = training
            for module, name, buffer, version, saved in buffers:
                module._buffers[name] = buffer  # some modules put a new tensor in its place
                if buffer._version != version:
                    buffer.copy_(saved)


class Choices:
    """Every router's choice in the forwards inside `kept`.

    The hooks go on once and stay: a compiled model never notices a hook that comes later.
    """

    def __init__(self, routers: Sequence[RouterSite]) -> None:
        self._on = False
        self._seen = [Choice(torch.empty(0), torch.empty(0))] * len(routers)
        self._handles: list[Removable] = [
            r.module.register_forward_hook(self._keep(i, r)) for i, r in enumerate(routers)
        ]

    @contextmanager
    def kept(self) -> Iterator[list[Choice]]:
        """The yielded list is filled when the block ends: one choice a router, of its last forward."""
        out: list[Choice] = []
        self._on = True
        try:
            yield out
            out += self._seen
        finally:
            self._on = False
            self._seen = [Choice(torch.empty(0), torch.empty(0))] * len(self._seen)

    def _keep(self, place: int, site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if self._on:
                self._seen[place] = site.chosen(output)

        return hook

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
