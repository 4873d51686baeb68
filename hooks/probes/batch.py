"""The probe batch: the same tokens at every probe, whole, or a piece of them many times over."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks import torch_internals
from geodiag.hooks.distributed.sharded_weights import complete_on_all_ranks, is_sharded
from geodiag.hooks.routing.isolated_forward import isolated

PROBE_TOKENS = 2048

Arguments = tuple[tuple, dict[str, Any]]


class StopForward(BaseException):
    """Ends a probe's forward where nothing more is wanted of it. No Exception: a model may catch
    those.
    """


class ProbeBatch:
    """What the model is called with; given by the user, or taken from the first batch that is
    trained on.
    """

    def __init__(self, model: nn.Module, given: tuple | Mapping[str, Any] | None) -> None:
        self.model = model
        self._whole = is_sharded(model)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._args: tuple = () if isinstance(given, Mapping) else tuple(given or ())
        self._kwargs: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
        self._autocast: tuple[str, bool, torch.dtype] | None = None
        self._given = self.ready

    @property
    def ready(self) -> bool:
        """Whether there is a batch to probe with."""
        return len(self._args) + len(self._kwargs) > 0

    def state_dict(self) -> dict[str, Any]:
        """The batch, where it is not the user's own: a resumed training probes with the same.

        A batch of more than tensors and plain values (a mask that is a function, a cache) may be
        what no disk can keep: a training resumed without it takes the first that it meets.
        """
        plain = all(
            isinstance(v, Tensor | bool | int | float | str | None)
            for v in _values(self._args, self._kwargs)
        )
        return {"args": self._args, "kwargs": self._kwargs} if plain and not self._given else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and not self._given:
            self._args, self._kwargs = _changed(
                state["args"], state["kwargs"], lambda t: t.to(self._device)
            )

    def adopt_batch(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward of the training: its autocast is the probe's too, and without a batch this one
        is taken, at most `PROBE_TOKENS` tokens of it.
        """
        device = self._device.type
        self._autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if self.ready:
            return
        shape = _shape(args, kwargs)
        rows = None if shape is None else max(1, PROBE_TOKENS // shape[1])
        self._args, self._kwargs = _changed(
            args, kwargs, lambda t: _rows(t, shape, rows).detach().clone()
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and positions. ValueError where no argument shows them."""
        shape = _shape(self._args, self._kwargs)
        if shape is None:
            raise ValueError(
                "the probe's arguments hold no batch of sequences; pass attach(..., probe=(token_ids,))"
            )
        return shape

    @property
    def token_ids(self) -> Tensor | None:
        """The vocabulary ids, one a token, where the model takes them."""
        ids = _leading(self._args, self._kwargs)
        return (
            ids.flatten()
            if ids is not None and not ids.is_floating_point() and ids.dim() == 2
            else None
        )

    def forward(self) -> None:
        """Runs the model on the batch and leaves no trace; whoever watches may end it by `enough`."""
        with self._as_in_training():
            self.model(*self._args, **self._kwargs)

    def run_copies(self, copies: int, positions: int) -> None:
        """The same with the first sequence's first `positions` tokens, `copies` times over."""
        shape = self.shape

        def copied(value: Tensor) -> Tensor:
            if value.shape[:1] == shape[:1]:
                value = value[:1].expand(copies, *value.shape[1:])
            for dim in range(1, value.dim()):
                if value.shape[dim] == shape[1]:
                    value = value.narrow(dim, 0, min(positions, shape[1]))
            return value

        args, kwargs = _changed(self._args, self._kwargs, copied)
        with self._as_in_training():
            self.model(*args, **kwargs)

    def stop_forward(self) -> None:
        """Ends the forward under way, where it may be ended: a sharded model runs to its end."""
        if not self._whole:
            raise StopForward

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
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
    """Compiled parts run as they are written: a probe is not worth graphs of its own, and its hooks
    do what no graph can hold.
    """
    compiled = any(torch_internals.is_compiled(m) for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _changed(args: tuple, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Arguments:
    def one(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    return tuple(one(a) for a in args), {k: one(v) for k, v in kwargs.items()}


def _values(args: tuple, kwargs: dict[str, Any]) -> tuple:
    return *args, *kwargs.values()


def _leading(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The argument that shows how many sequences and positions there are: the token ids, or else
    the first batch.
    """
    tensors = [v for v in _values(args, kwargs) if isinstance(v, Tensor) and v.dim() > 1]
    return next(
        (t for t in tensors if t.dim() == 2 and not t.is_floating_point()),
        next(iter(tensors), None),
    )


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    leading = _leading(args, kwargs)
    return None if leading is None else (leading.shape[0], leading.shape[1])


def _rows(value: Tensor, shape: tuple[int, int] | None, rows: int | None) -> Tensor:
    same_batch = shape is not None and value.shape[:1] == shape[:1]
    return value[:rows] if same_batch else value
