"""Forwards without side effects on the training, and the routers' choices made in them."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geodiag.hooks import torch_internals
from geodiag.hooks.adapters.base import Choice, Removable, RouterSite, Watch
from geodiag.hooks.distributed.sharded_weights import is_sharded, reshard


@contextmanager
def isolated(model: nn.Module, evaluate: bool) -> Iterator[None]:
    """Context in which `model` runs without gradients and without side effects.

    On exit, random states (Python, numpy, torch, every GPU), buffers and train/eval modes are
    restored. evaluate: run the model in eval mode; otherwise its modes are kept, so that dropout
    draws the same masks as the training step will.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = _SavedBuffers(model)
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the training's own generator
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})

    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            if evaluate:
                model.eval()
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, training in modes:
                module.training = training
            buffers.restore()
            reshard(model)


class _SavedBuffers:
    """Copies of a model's buffers. A buffer is written back only if its version has changed."""

    def __init__(self, model: nn.Module) -> None:
        self._saved: list[tuple[nn.Module, str, Tensor, int, Tensor]] = [
            (module, name, buffer, torch_internals.version(buffer), buffer.clone())
            for module in model.modules()
            for name, buffer in torch_internals.own_buffers(module).items()
            if buffer is not None
        ]

    def restore(self) -> None:
        for module, name, buffer, version, saved in self._saved:
            torch_internals.own_buffers(module)[name] = (
                buffer  # some modules replace the tensor itself
            )
            if torch_internals.version(buffer) != version:
                buffer.copy_(saved)


class _AllChosen(BaseException):
    """Ends a forward in which every router has chosen.

    A BaseException, because an `except Exception` in the model's forward must not catch it.
    """


class RouterChoices:
    """Records every router's choice in the forwards inside `recording`.

    The hooks are installed once and stay, because a compiled model ignores hooks that are added
    later. With `model`, a forward inside `recording` ends as soon as every router has chosen, or at
    `end`, the place after its last block: the last experts, the head and the loss are skipped. A
    forward that must run to its end (sharded weights) passes only one token per sequence to `tail`,
    the module after the last block.
    """

    def __init__(
        self,
        routers: Sequence[RouterSite],
        model: nn.Module | None = None,
        end: Watch | None = None,
        tail: nn.Module | None = None,
    ) -> None:
        self._model = model
        self._recording = False
        self._may_stop = False
        self._choices: list[Choice | None] = [None] * len(routers)
        self._handles: list[Removable] = [
            r.module.register_forward_hook(self._record_hook(i, r)) for i, r in enumerate(routers)
        ]
        if end is not None:
            # For blocks that are compiled one by one: a hook inside compiled code cannot leave it.
            self._handles += end(lambda _view: self._stop_if_complete())
        if tail is not None:
            self._handles.append(tail.register_forward_pre_hook(self._shorten))

    @contextmanager
    def recording(self) -> Iterator[list[Choice]]:
        """Yield a list that holds one choice per router, of its last forward, after the context.

        ValueError if a router made no choice.
        """
        result: list[Choice] = []
        self._recording = True
        # On sharded weights the other ranks wait in the forward's collectives: it must not stop.
        self._may_stop = self._model is not None and not is_sharded(self._model)
        try:
            with suppress(_AllChosen):
                yield result
            missing = sum(choice is None for choice in self._choices)
            if missing:
                raise ValueError(
                    f"{missing} of {len(self._choices)} routers chose nothing in this forward"
                )
            result += [choice for choice in self._choices if choice is not None]
        finally:
            self._recording = False
            self._choices = [None] * len(self._choices)

    def _record_hook(self, index: int, site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if self._recording:
                self._choices[index] = site.chosen(output)
                self._stop_if_complete()

        return hook

    def _shorten(self, _module: nn.Module, args: tuple) -> tuple | None:
        if not self._recording or self._model is None:
            return None
        return args[0][:, :1].contiguous(), *args[1:]

    def _stop_if_complete(self) -> None:
        if torch.compiler.is_compiling():  # compiled code cannot be left before its end
            return
        if self._recording and self._may_stop and all(c is not None for c in self._choices):
            raise _AllChosen

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
