"""The probe batch: the same tokens at every probe, in one forward without side effects."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks import torch_internals
from geodiag.hooks.distributed.sharded_weights import complete_on_all_ranks, is_sharded
from geodiag.hooks.routing.isolated_forward import isolated

PROBE_TOKENS = 2048
"""Maximal number of tokens that are taken from a training batch."""

Arguments = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments of the model."""


class StopForward(BaseException):
    """Ends a probe's forward early.

    A BaseException, because an `except Exception` in the model's forward must not catch it.
    """


class ProbeBatch:
    """The model's arguments in a probe.

    given: arguments from the user, a tuple or a mapping of keyword arguments. Without it, the first
    training batch is adopted.
    """

    def __init__(self, model: nn.Module, given: tuple | Mapping[str, Any] | None) -> None:
        self.model = model
        self._must_complete = is_sharded(model)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._args: tuple = () if isinstance(given, Mapping) else tuple(given or ())
        self._kwargs: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
        self._autocast: tuple[str, bool, torch.dtype] | None = None
        """Autocast state of the training's forward."""
        self._given = self.ready

    @property
    def ready(self) -> bool:
        """Whether there is a batch."""
        return len(self._args) + len(self._kwargs) > 0

    def state_dict(self) -> dict[str, Any]:
        """Return an adopted batch, so that a resumed training probes with the same one.

        A batch with other arguments than tensors and plain values (a mask function, a cache) may
        not be storable: it is left out, and a resumed training adopts its first batch.
        """
        plain = all(
            isinstance(v, Tensor | bool | int | float | str | None)
            for v in _values(self._args, self._kwargs)
        )
        return {"args": self._args, "kwargs": self._kwargs} if plain and not self._given else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and not self._given:
            self._args, self._kwargs = _mapped(
                state["args"], state["kwargs"], lambda t: t.to(self._device)
            )

    def adopt_batch(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note a training forward's autocast, and copy its batch if there is none yet.

        At most `PROBE_TOKENS` tokens are copied, in whole sequences.
        """
        device = self._device.type
        self._autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if self.ready:
            return
        shape = _shape(args, kwargs)
        rows = None if shape is None else max(1, PROBE_TOKENS // shape[1])
        # A copy, because the training may reuse the batch's memory for later batches.
        self._args, self._kwargs = _mapped(
            args, kwargs, lambda t: _rows(t, shape, rows).detach().clone()
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sequences and positions. ValueError if no argument shows them."""
        shape = _shape(self._args, self._kwargs)
        if shape is None:
            raise ValueError(
                "the probe's arguments hold no batch of sequences; "
                "pass attach(..., probe=(token_ids,))"
            )
        return shape

    @property
    def token_ids(self) -> Tensor | None:
        """Vocabulary id of each token, if the model takes ids."""
        ids = _leading(self._args, self._kwargs)
        if ids is None or ids.is_floating_point() or ids.dim() != 2:
            return None
        return ids.flatten()

    def forward(self) -> None:
        """Run the model on the batch without side effects.

        A hook may end the forward early by calling `stop_forward`.
        """
        with self._isolated():
            self.model(*self._args, **self._kwargs)

    def run_copies(self, copies: int, positions: int) -> None:
        """Run the model on `copies` of the first sequence's first `positions` tokens."""
        shape = self.shape

        def copied(value: Tensor) -> Tensor:
            if value.shape[:1] == shape[:1]:
                value = value[:1].expand(copies, *value.shape[1:])
            for dim in range(1, value.dim()):
                if value.shape[dim] == shape[1]:
                    value = value.narrow(dim, 0, min(positions, shape[1]))
            return value

        args, kwargs = _mapped(self._args, self._kwargs, copied)
        with self._isolated():
            self.model(*args, **kwargs)

    def stop_forward(self) -> None:
        """End the current forward, unless the model is sharded: its forward is collective."""
        if not self._must_complete:
            raise StopForward

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Context of a probe's forward: eval mode, no gradients, the training's autocast."""
        with (
            complete_on_all_ranks(self.model),
            _eager(self.model),
            isolated(self.model, evaluate=True),
            suppress(StopForward),
        ):
            if self._autocast is None:
                yield
                return
            device, enabled, dtype = self._autocast
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                yield


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run eagerly.

    A probe is too rare for compiled graphs of its own, and graphs cannot contain its hooks.
    """
    compiled = any(torch_internals.is_compiled(m) for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _mapped(args: tuple, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Arguments:
    """Return the arguments with `change` applied to each tensor."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    return tuple(one(a) for a in args), {k: one(v) for k, v in kwargs.items()}


def _values(args: tuple, kwargs: dict[str, Any]) -> tuple:
    return *args, *kwargs.values()


def _leading(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the argument that shows the number of sequences and positions.

    The token ids (2 dimensions, integers) if there are any, else the first tensor with at least 2
    dimensions.
    """
    tensors = [v for v in _values(args, kwargs) if isinstance(v, Tensor) and v.dim() > 1]
    for t in tensors:
        if t.dim() == 2 and not t.is_floating_point():
            return t
    return tensors[0] if tensors else None


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    leading = _leading(args, kwargs)
    return None if leading is None else (leading.shape[0], leading.shape[1])


def _rows(value: Tensor, shape: tuple[int, int] | None, rows: int | None) -> Tensor:
    """Return the first `rows` sequences of a tensor that has one row per sequence."""
    has_sequences = shape is not None and value.shape[:1] == shape[:1]
    return value[:rows] if has_sequences else value
