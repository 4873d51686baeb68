"""Forwards that leave no trace, and the expert ids they show."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from geodiag.hooks.adapters.base import Choice, Removable, RouterSite, Watch
from geodiag.hooks.distributed.sharded_weights import is_sharded, reshard


@contextmanager
def isolated(model: nn.Module, evaluate: bool) -> Iterator[None]:
    """Inside, `model` can run without gradient; outside, nothing of it can be told.

    Random states (Python's, numpy's, torch's, every GPU's), buffers and train/eval modes are as
    before. With
    `evaluate` the model runs in eval mode; without, in the mode it is in, so that dropout draws
    what the training step will.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [
        (m, name, b, b._version, b.clone())
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None
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
            reshard(model)


class _AllChosen(BaseException):
    """Every router has chosen. Not an Exception: a forward's own `except Exception` must not
    swallow it.
    """


class RouterChoices:
    """Every router's choice in the forwards inside `kept`.

    The hooks go on once and stay: a compiled model never notices a hook that comes later. With
    `model`, a forward of it inside `kept` ends as soon as every router has chosen, or at `end`, the
    place behind its last block: the last experts, the head and the loss are not run. Where it may
    not be left halfway, `tail`, the module behind the last block, is given one token a sequence
    instead.
    """

    def __init__(
        self,
        routers: Sequence[RouterSite],
        model: nn.Module | None = None,
        end: Watch | None = None,
        tail: nn.Module | None = None,
    ) -> None:
        self._on = self._stops = False
        self._model = model
        self._seen: list[Choice | None] = [None] * len(routers)
        self._handles: list[Removable] = [
            r.module.register_forward_hook(self._keep(i, r)) for i, r in enumerate(routers)
        ]
        if end is not None:
            # Behind blocks that are compiled one by one, whose own hooks cannot leave them.
            self._handles += end(lambda _view: self._stop_if_done())
        if tail is not None:
            self._handles.append(tail.register_forward_pre_hook(self._shorten))

    @contextmanager
    def recording(self) -> Iterator[list[Choice]]:
        """The yielded list is filled when the block ends: one choice a router, of its last forward."""
        out: list[Choice] = []
        self._on, self._stops = True, self._model is not None and not is_sharded(self._model)
        try:
            with suppress(_AllChosen):
                yield out
            missing = sum(c is None for c in self._seen)
            if missing:
                raise ValueError(
                    f"{missing} of {len(self._seen)} routers chose nothing in this forward"
                )
            out += [c for c in self._seen if c is not None]
        finally:
            self._on = False
            self._seen = [None] * len(self._seen)

    def _keep(self, place: int, site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if self._on:
                self._seen[place] = site.chosen(output)
                self._stop_if_done()

        return hook

    def _shorten(self, _module: nn.Module, args: tuple) -> tuple | None:
        return (
            (args[0][:, :1].contiguous(), *args[1:])
            if self._on and self._model is not None
            else None
        )

    def _stop_if_done(self) -> None:
        if torch.compiler.is_compiling():  # compiled code cannot be left halfway
            return
        if self._on and self._stops and all(c is not None for c in self._seen):
            raise _AllChosen

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
