"""Rolling snapshots of model, optimizers, random states and data position, in memory or on disk.

A snapshot holds the state before a step: a tree of plain values, and one flat host buffer with all
tensors. `take` starts an asynchronous copy on a GPU; the forward and backward of the next step run
meanwhile, and a hook before each optimizer step orders the weight update after the copy. All
snapshots together stay within a budget of bytes: in memory the oldest is freed before the next one
is taken, on disk the last complete one stays until the next is complete. A snapshot is skipped
while the disk is still busy with the one before. `restore` writes all tensors back in place and
drops the later snapshots, which belong to a discarded past. What is restored is bitwise what was
taken. A snapshot that does not fit into the budget or on the disk raises an error, and training
goes on without it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geodiag.defaults import SNAPSHOT_EVERY
from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import Removable
from geodiag.hooks.distributed.sharded_weights import local
from geodiag.hooks.snapshots.disk_store import DiskSnapshots, folder_of
from geodiag.hooks.snapshots.host_buffer import HostBuffer, bytes_of
from geodiag.hooks.snapshots.host_memory import free_memory
from geodiag.hooks.snapshots.state_tree import (
    RandomState,
    Stateful,
    capture_state,
    join_tensors,
    restore_state,
    split_tensors,
)

Where = Literal["memory", "disk"]


@dataclass(frozen=True)
class _Snapshot:
    """A snapshot in memory."""

    step: int
    tree: Any
    """The state with a slot for each of the buffer's tensors."""
    buffer: HostBuffer
    extra: dict[str, Any]
    """The caller's own state, returned by `restore` unchanged."""


class Snapshots:
    """Rolling snapshots of everything that a rollback or a resume needs.

        snapshots = geodiag.Snapshots(model, optimizer, scheduler, every=50)
        run = geodiag.attach(model, optimizer, "runs/my-run", snapshots=snapshots, …)
        for batch in run.batches(loader): ...

    things: everything that changes during training: models, optimizers, and objects with
    `state_dict` and `load_state_dict` (a scheduler, a scaler, a counter). Random states are
    included automatically. Code other than the optimizers that changes weights calls `settle`
    first, because a copy may still be running.

    every: steps between snapshots. where: `memory` (page-locked for a GPU) or `disk`
    (`RUN/snapshots`, as torch.distributed.checkpoint, one folder per rank). max_bytes: budget of
    all snapshots together; by default half of the free memory or disk. keep: maximal number of
    snapshots. ValueError for objects that cannot be saved.
    """

    def __init__(
        self,
        *things: Any,
        every: int = SNAPSHOT_EVERY,
        where: Where = "memory",
        max_bytes: int | None = None,
        keep: int = 4,
    ) -> None:
        if every < 1 or keep < 1 or (max_bytes is not None and max_bytes < 1):
            raise ValueError("every, keep and max_bytes are at least 1")
        if where not in ("memory", "disk"):
            raise ValueError(f"snapshots are kept in memory or on disk, not in {where!r}")
        self.every = every
        self.where = where
        self.keep = keep
        self.resume_only: dict[str, Stateful] = {}
        """State that a resume restores and a rollback leaves: the detector, the controller, faults.
        """

        parts = _flat(things)
        modules = [p for p in parts if isinstance(p, nn.Module)]
        self.device = next((p.device for m in modules for p in m.parameters()), _CPU)
        gpus = [self.device.index or 0] if self.device.type == "cuda" else []
        self._parts: dict[str, Any] = {f"{i}-{type(p).__name__}": p for i, p in enumerate(parts)}
        self._parts["random"] = RandomState(gpus)

        self._max_bytes = max_bytes
        self._in_memory: list[_Snapshot] = []
        self._free_buffers: list[HostBuffer] = []
        self._disk: DiskSnapshots | None = None
        self._handles: list[Removable] = [
            p.register_step_pre_hook(lambda *_: self.settle())
            for p in parts
            if isinstance(p, Optimizer)
        ]
        self._check_budget(bytes_of(local(t) for m in modules for t in m.parameters()))

    def keep_in(self, run: Path, rank: int) -> None:
        """Set the run directory in which snapshots on disk are kept."""
        if self.where == "disk":
            self._disk = DiskSnapshots(folder_of(run, rank))

    # -- taking ------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """Steps to which training can return; each snapshot holds the state before its step."""
        return self._disk.steps() if self._disk else [s.step for s in self._in_memory]

    def due(self, step: int) -> bool:
        """Return whether a snapshot should be taken now, before `step`."""
        return step > 0 and step % self.every == 0 and step not in self.steps

    def take(self, step: int, extra: dict[str, Any]) -> bool:
        """Take a snapshot of the state before `step`, with `extra`, which `restore` returns.

        Returns False while the disk is busy with the last snapshot. GeodiagError if not even one
        snapshot fits into the budget.
        """
        if self._disk is not None and not self._disk.ready():
            return False
        state = {name: capture_state(part) for name, part in self._parts.items()}
        tree, tensors = split_tensors(state)
        size = bytes_of(tensors.values())
        budget = self._check_budget(size)
        keep = min(self.keep, max(budget // size, 1))
        self._make_room(keep)

        buffer = self._buffer(size)
        # Module buffers may change in the next forward; weights and optimizer state change only in
        # the optimizer step, which `settle` orders after the copy.
        volatile_names = self._module_buffers()
        volatile = frozenset(i for i, name in enumerate(tensors) if name in volatile_names)
        buffer.fill(list(tensors.values()), volatile)
        self._in_memory.append(_Snapshot(step, tree, buffer, extra))
        if self._disk is not None:
            copies = dict(zip(tensors, buffer.tensors, strict=True))
            self._disk.write(step, tree, extra, copies, buffer, keep)
        return True

    def _make_room(self, keep: int) -> None:
        """Remove old snapshots, so that `keep` fit with the next one."""
        if self._disk is not None:
            # The last complete snapshot stays until the next one is complete.
            self._disk.keep_newest(max(keep - 1, 1))
            self._free_oldest(0)
        else:
            # The oldest is freed first, so that the budget holds at every moment.
            self._free_oldest(keep - 1)

    def _module_buffers(self) -> set[str]:
        modules = {n: p for n, p in self._parts.items() if isinstance(p, nn.Module)}
        return {f"{n}.tensors.{b}" for n, m in modules.items() for b, _ in m.named_buffers()}

    def _buffer(self, size: int) -> HostBuffer:
        """Return a free buffer that is large enough, or a new one."""
        fitting = next((b for b in self._free_buffers if b.size >= size), None)
        self._free_buffers = []
        return fitting or HostBuffer(size, self.device)

    def _free_oldest(self, count_left: int) -> None:
        """Keep the newest snapshots in memory; one freed buffer is kept for the next snapshot."""
        removed = self._in_memory[: max(len(self._in_memory) - count_left, 0)]
        self._in_memory = self._in_memory[len(removed) :]
        self._free_buffers = [s.buffer for s in removed[-1:]]

    def _check_budget(self, size: int) -> int:
        """Return the budget in bytes. GeodiagError if a snapshot of `size` exceeds it."""
        budget = self._max_bytes if self._max_bytes is not None else self._default_budget(size)
        if size > budget:
            where = "on disk" if self.where == "disk" else "in memory"
            fix = "free some disk"
            if self.where == "memory":
                fix = "use less memory elsewhere, or keep snapshots on disk"
            raise GeodiagError(
                f"a snapshot takes {_gb(size)} and the budget {where} is {_gb(budget)}; "
                f"raise the budget, or {fix}"
            )
        return budget

    def _default_budget(self, size: int) -> int:
        """Return half of what would be free without snapshots."""
        if self.where == "memory":
            own = sum(s.buffer.size for s in self._in_memory)
            own += sum(b.size for b in self._free_buffers)
            return (free_memory() + own) // 2
        free = shutil.disk_usage(self._disk.folder if self._disk else Path.cwd()).free
        own = size * len(self.steps) if self._disk else 0
        return (free + own) // 2

    # -- going back --------------------------------------------------------------------------

    def restore(self, step: int) -> dict[str, Any]:
        """Restore the state before `step`, drop later snapshots, and return the snapshot's `extra`.

        KeyError if there is no such snapshot.
        """
        tree, tensors, extra = self._find(step)
        saved = join_tensors(tree, tensors)
        if saved.keys() != self._parts.keys():
            raise ValueError(f"the snapshot holds {', '.join(saved)}, not {', '.join(self._parts)}")
        for name, part in self._parts.items():
            restore_state(part, saved[name])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the buffer may be filled again after this

        self._in_memory = [s for s in self._in_memory if s.step <= step]
        if self._disk is not None:
            self._disk.drop_after(step)
        return extra

    def _find(self, step: int) -> tuple[Any, list[Tensor], dict[str, Any]]:
        """Return a snapshot's tree, tensors and extra state, from memory or else from disk."""
        snapshot = next((s for s in self._in_memory if s.step == step), None)
        if snapshot is not None:
            snapshot.buffer.wait()
            return snapshot.tree, snapshot.buffer.tensors, snapshot.extra
        if self._disk is not None and step in self._disk.steps():
            structure, tensors = self._disk.read(step)
            return structure.tree, tensors, structure.extra
        available = ", ".join(map(str, self.steps)) or "none"
        raise KeyError(f"no snapshot of step {step}; there are {available}")

    def settle(self) -> None:
        """Order later changes of weights after a running copy.

        Call it before anything but an optimizer changes weights.
        """
        if self._in_memory:
            self._in_memory[-1].buffer.order_after_copy()

    def wait(self) -> None:
        """Wait until the disk has written the last snapshot."""
        if self._disk is not None:
            self._disk.wait()

    def close(self) -> None:
        """Wait for the disk, free the memory, and remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._disk is not None:
            self._disk.close()
        self._in_memory = []
        self._free_buffers = []


_CPU = torch.device("cpu")


def _flat(things: tuple[Any, ...]) -> list[Any]:
    """Return the objects to save, those in lists included. ValueError if one cannot be saved."""
    parts: list[Any] = []
    for thing in things:
        parts += thing if isinstance(thing, list | tuple) else [thing]
    unknown = [p for p in parts if not isinstance(p, nn.Module | Optimizer | Stateful)]
    if unknown or not parts:
        what = type(unknown[0]).__name__ if unknown else "nothing"
        raise ValueError(
            f"cannot save {what}; pass a model, an optimizer, or something with state_dict"
        )
    return parts


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
