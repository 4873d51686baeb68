"""A training's state as a tree: its tensors by reference, the rest copied; and put back where it
lives, in place.

In place, because compiled models, CUDA graphs and optimizers hold on to the tensors they have, and
because an optimizer's own `load_state_dict` would cast its state to the type of the weights.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class Stateful(Protocol):
    """Whatever can be saved: a scheduler, a scaler, a sampler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class RandomState:
    """The generators that a training draws from: Python's, numpy's, torch's, and those of the GPUs
    in use.
    """

    def __init__(self, devices: Sequence[int] = ()) -> None:
        self.devices = list(devices)

    def state_dict(self) -> dict[str, Any]:
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002 - the training's own generator
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(d) for d in self.devices],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        for device, saved in zip(self.devices, state["cuda"], strict=True):
            torch.cuda.set_rng_state(saved, device)


def capture_state(thing: Any) -> Any:
    """Everything that `thing` would need to be as it is now. Tensors of modules and optimizers are
    the live ones.
    """
    if isinstance(thing, nn.Module):
        return {
            "tensors": _tensors_of(thing),
            "extra": {n: m.get_extra_state() for n, m in _with_extra(thing)},
        }
    if isinstance(thing, Optimizer):
        return {
            "state": [dict(thing.state.get(p, {})) for p in _parameters(thing)],
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in thing.param_groups],
        }
    return thing.state_dict()


@torch.no_grad()
def restore_state(thing: Any, saved: Any) -> None:
    """Makes `thing` as it was when `capture_state` gave `saved`. ValueError where it is another model or
    optimizer.
    """
    if isinstance(thing, nn.Module):
        live = _tensors_of(thing)
        if live.keys() != saved["tensors"].keys():
            odd = min(live.keys() ^ saved["tensors"].keys())
            raise ValueError(f"the snapshot is of another model: {odd} is in only one of them")
        for name, tensor in live.items():
            if tensor.shape != saved["tensors"][name].shape:
                raise ValueError(f"the snapshot is of another model: {name} has another shape")
            tensor.copy_(saved["tensors"][name], non_blocking=True)
        for name, module in _with_extra(thing):
            module.set_extra_state(saved["extra"][name])
    elif isinstance(thing, Optimizer):
        parameters = _parameters(thing)
        if len(parameters) != len(saved["state"]) or len(thing.param_groups) != len(
            saved["groups"]
        ):
            raise ValueError("the snapshot is of another optimizer: it has other parameters")
        for parameter, state in zip(parameters, saved["state"], strict=True):
            _put_back_state(thing, parameter, state)
        for group, values in zip(thing.param_groups, saved["groups"], strict=True):
            for name, value in values.items():
                group[name] = _in_place(group.get(name), value)
    else:
        thing.load_state_dict(_owned(saved))


def _put_back_state(optimizer: Optimizer, parameter: Tensor, saved: dict[str, Any]) -> None:
    if not saved:
        optimizer.state.pop(parameter, None)
        return
    live = optimizer.state[parameter]
    for name in set(live) - set(saved):
        del live[name]
    for name, value in saved.items():
        # What has the shape of the weight lives where the weight lives; a step count may live on
        # the host.
        fresh = parameter.device if isinstance(value, Tensor) and value.dim() else None
        live[name] = _in_place(live.get(name), value, fresh, parameter)


def _in_place(
    live: Any, saved: Any, device: torch.device | None = None, like: Tensor | None = None
) -> Any:
    """`saved`, in the tensor that is there already where that fits."""
    if not isinstance(saved, Tensor):
        return copy.deepcopy(saved)
    if isinstance(live, Tensor) and local(live).shape == saved.shape and live.dtype == saved.dtype:
        local(live).copy_(saved, non_blocking=True)
        return live
    if like is not None and hasattr(like, "to_local") and local(like).shape == saved.shape:
        live = torch.empty_like(
            like, dtype=saved.dtype
        )  # this rank's part of a sharded weight's state
        local(live).copy_(saved, non_blocking=True)
        return live
    return saved.to(device, copy=True) if device is not None else saved.clone()


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's part of one that is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name; also buffers that a state_dict would leave out."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: local(tensor.detach()) for name, tensor in named}


def _with_extra(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (n, m)
        for n, m in module.named_modules()
        if type(m).get_extra_state is not nn.Module.get_extra_state
    ]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# -- trees -----------------------------------------------------------------------------------


class TreeSlot:
    """Stands in a tree where tensor number `index` was."""

    def __init__(self, index: int) -> None:
        self.index = index


def split_tensors(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The tree with a `TreeSlot` for every tensor, everything else copied; and the tensors by their
    path.
    """
    tensors: dict[str, Tensor] = {}
    return _apart(tree, "", tensors), tensors


def _apart(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        while path in tensors:  # {"a": {"b": …}, "a.b": …}
            path += "'"
        tensors[path] = local(node.detach())
        return TreeSlot(len(tensors) - 1)
    if isinstance(node, dict):
        return {k: _apart(v, f"{path}.{k}" if path else str(k), tensors) for k, v in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_apart(v, f"{path}.{i}", tensors) for i, v in enumerate(node))
    return copy.deepcopy(node)


def _owned(node: Any) -> Any:
    """A copy that shares nothing. `deepcopy` would copy all the memory that a tensor is a view of."""
    if isinstance(node, Tensor):
        return node.clone()
    if isinstance(node, dict):
        return {k: _owned(v) for k, v in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_owned(v) for v in node)
    return copy.deepcopy(node)


def join_tensors(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """`split_tensors` undone."""
    if isinstance(tree, TreeSlot):
        return tensors[tree.index]
    if isinstance(tree, dict):
        return {k: join_tensors(v, tensors) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(join_tensors(v, tensors) for v in tree)
    return tree
