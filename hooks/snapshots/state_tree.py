"""A training's state as a tree: tensors by reference, everything else copied; and its restoration.

Tensors are restored in place, because compiled models, CUDA graphs and optimizers hold on to the
tensors that they have, and because an optimizer's own `load_state_dict` would cast its state to the
dtype of the weights.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geodiag.hooks.distributed.sharded_weights import is_dtensor, local


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be saved: a scheduler, a scaler, a sampler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class RandomState:
    """The generators that a training draws from: Python's, numpy's, torch's, and those of GPUs."""

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


def capture_state(part: Any) -> Any:
    """Return everything needed to restore `part`, a model, an optimizer or a Stateful.

    Tensors of models and optimizers are the live ones, not copies.
    """
    if isinstance(part, nn.Module):
        return {
            "tensors": _tensors_of(part),
            "extra": {n: m.get_extra_state() for n, m in _with_extra_state(part)},
        }
    if isinstance(part, Optimizer):
        return {
            "state": [dict(part.state.get(p, {})) for p in _parameters(part)],
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in part.param_groups],
        }
    return part.state_dict()


@torch.no_grad()
def restore_state(part: Any, saved: Any) -> None:
    """Restore `part` from the result of `capture_state`.

    ValueError if the state is of another model or optimizer.
    """
    if isinstance(part, nn.Module):
        _restore_module(part, saved)
    elif isinstance(part, Optimizer):
        _restore_optimizer(part, saved)
    else:
        part.load_state_dict(_private_copy(saved))


def _restore_module(module: nn.Module, saved: dict[str, Any]) -> None:
    live = _tensors_of(module)
    if live.keys() != saved["tensors"].keys():
        name = min(live.keys() ^ saved["tensors"].keys())
        raise ValueError(f"the snapshot is of another model: {name} is in only one of them")
    for name, tensor in live.items():
        if tensor.shape != saved["tensors"][name].shape:
            raise ValueError(f"the snapshot is of another model: {name} has another shape")
        tensor.copy_(saved["tensors"][name], non_blocking=True)
    for name, child in _with_extra_state(module):
        child.set_extra_state(saved["extra"][name])


def _restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    parameters = _parameters(optimizer)
    same_parameters = len(parameters) == len(saved["state"])
    same_groups = len(optimizer.param_groups) == len(saved["groups"])
    if not (same_parameters and same_groups):
        raise ValueError("the snapshot is of another optimizer: it has other parameters")
    for parameter, state in zip(parameters, saved["state"], strict=True):
        _restore_parameter_state(optimizer, parameter, state)
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        for name, value in values.items():
            group[name] = _restored(group.get(name), value)


def _restore_parameter_state(optimizer: Optimizer, parameter: Tensor, saved: dict) -> None:
    if not saved:
        optimizer.state.pop(parameter, None)
        return
    live = optimizer.state[parameter]
    for name in set(live) - set(saved):
        del live[name]
    for name, value in saved.items():
        # A tensor with dimensions (a momentum) belongs on the weight's device; a 0-d one (a step
        # count) may belong on the host.
        has_dims = isinstance(value, Tensor) and value.dim() > 0
        device = parameter.device if has_dims else None
        live[name] = _restored(live.get(name), value, device, parameter)


def _restored(
    live: Any, saved: Any, device: torch.device | None = None, like: Tensor | None = None
) -> Any:
    """Return `saved` in the existing tensor `live` if it fits, else in a new one.

    device: where a new tensor is created. like: the weight that the state belongs to.
    """
    if not isinstance(saved, Tensor):
        return copy.deepcopy(saved)
    if isinstance(live, Tensor) and local(live).shape == saved.shape and live.dtype == saved.dtype:
        local(live).copy_(saved, non_blocking=True)
        return live
    if like is not None and is_dtensor(like) and local(like).shape == saved.shape:
        live = torch.empty_like(like, dtype=saved.dtype)  # a sharded weight has sharded state
        local(live).copy_(saved, non_blocking=True)
        return live
    return saved.to(device, copy=True) if device is not None else saved.clone()


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers by name, also buffers that a state_dict leaves out."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: local(tensor.detach()) for name, tensor in named}


def _with_extra_state(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, m)
        for name, m in module.named_modules()
        if type(m).get_extra_state is not nn.Module.get_extra_state
    ]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# -- trees -----------------------------------------------------------------------------------


class TreeSlot:
    """Replaces tensor number `index` in a tree."""

    def __init__(self, index: int) -> None:
        self.index = index


def split_tensors(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a copy of the tree with a `TreeSlot` per tensor, and the tensors by their path."""
    tensors: dict[str, Tensor] = {}
    return _split(tree, "", tensors), tensors


def _split(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        while path in tensors:  # {"a": {"b": …}, "a.b": …} has the path a.b twice
            path += "'"
        tensors[path] = local(node.detach())
        return TreeSlot(len(tensors) - 1)
    if isinstance(node, dict):
        return {k: _split(v, f"{path}.{k}" if path else str(k), tensors) for k, v in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_split(v, f"{path}.{i}", tensors) for i, v in enumerate(node))
    return copy.deepcopy(node)


def join_tensors(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the tree of `split_tensors` with its tensors."""
    if isinstance(tree, TreeSlot):
        return tensors[tree.index]
    if isinstance(tree, dict):
        return {k: join_tensors(v, tensors) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(join_tensors(v, tensors) for v in tree)
    return tree


def _private_copy(node: Any) -> Any:
    """Return a copy that shares nothing with `node`.

    `deepcopy` would copy the whole buffer that a tensor is a view of, once per tensor.
    """
    if isinstance(node, Tensor):
        return node.clone()
    if isinstance(node, dict):
        return {k: _private_copy(v) for k, v in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_private_copy(v) for v in node)
    return copy.deepcopy(node)
