"""Snapshots: what a training was, every so many steps, in host memory or on disk, and how to be
that again.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from geodiag.defaults import SNAPSHOT_EVERY
from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import Removable
from geodiag.hooks.snapshots.disk_store import DiskSnapshots, folder_of
from geodiag.hooks.snapshots.host_buffer import HostBuffer, bytes_of
from geodiag.hooks.snapshots.host_memory import free_memory
from geodiag.hooks.snapshots.state_tree import (
    RandomState,
    Stateful,
    capture_state,
    join_tensors,
    local,
    restore_state,
    split_tensors,
)

Where = Literal["memory", "disk"]


@dataclass(frozen=True)
class _Snapshot:
    """One moment: `tree` has a place for each of the arena's tensors; `aside` comes back as it was
    given.
    """

    step: int
    tree: Any
    arena: HostBuffer
    aside: dict[str, Any]


class Snapshots:
    """Rolling snapshots of everything that a rollback or a resume needs.

        snapshots = geodiag.Snapshots(model, optimizer, scheduler, every=50)
        run = geodiag.attach(model, optimizer, "runs/my-run", snapshots=snapshots, …)
        for batch in run.batches(loader): ...

    Give it whatever changes while training: models, optimizers, and anything with `state_dict` and
    `load_state_dict` (a scheduler, a scaler, a counter). Random states come along by themselves.
    Between steps only the optimizers may change weights while a copy is under way; whoever else
    does calls `settle` first.

    every: steps between snapshots. where: `memory` (page-locked beside a GPU) or `disk`
    (`RUN/snapshots`, as torch.distributed.checkpoint, one folder a rank). max_bytes: budget of all
    of them, by default half of the memory or disk that is free. keep: at most so many. ValueError
    for what cannot be saved.
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
        self.every, self.where, self.keep = every, where, keep
        self.resume_only: dict[str, Stateful] = {}
        """What a rollback leaves as it is and a resume brings back: the detector, the controller,
        faults.
        """
        self._max_bytes = max_bytes
        flat = [
            t for thing in things for t in (thing if isinstance(thing, list | tuple) else [thing])
        ]
        odd = [t for t in flat if not isinstance(t, nn.Module | Optimizer | Stateful)]
        if odd or not flat:
            what = type(odd[0]).__name__ if odd else "nothing"
            raise ValueError(
                f"cannot save {what}; pass a model, an optimizer, or something with state_dict"
            )
        self.device = next(
            (p.device for t in flat if isinstance(t, nn.Module) for p in t.parameters()), _CPU
        )
        gpus = [self.device.index or 0] if self.device.type == "cuda" else []
        self._things: dict[str, Any] = {f"{i}-{type(t).__name__}": t for i, t in enumerate(flat)}
        self._things["random"] = RandomState(gpus)
        self._taken: list[_Snapshot] = []
        self._spare: list[HostBuffer] = []
        self._shelf: DiskSnapshots | None = None
        self._handles: list[Removable] = [
            t.register_step_pre_hook(lambda *_: self.settle())
            for t in flat
            if isinstance(t, Optimizer)
        ]
        self._check_budget(
            bytes_of(local(t) for m in flat if isinstance(m, nn.Module) for t in m.parameters())
        )

    def keep_in(self, run: Path, rank: int) -> None:
        """Where a training's snapshots go if they go to disk."""
        if self.where == "disk":
            self._shelf = DiskSnapshots(folder_of(run, rank))

    # -- taking ------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """The steps that training can go back to: each as it was before that step."""
        return self._shelf.steps() if self._shelf else [s.step for s in self._taken]

    def due(self, step: int) -> bool:
        """Whether the training, which stands before `step`, should be kept now."""
        return step > 0 and step % self.every == 0 and step not in self.steps

    def take(self, step: int, aside: dict[str, Any]) -> bool:
        """Keeps everything as it is now, before `step`, and `aside` with it. False where the disk
        is still busy.

        GeodiagError where not even one fits into the budget.
        """
        if self._shelf is not None and not self._shelf.free():
            return False
        tree, tensors = split_tensors(
            {name: capture_state(thing) for name, thing in self._things.items()}
        )
        size = bytes_of(tensors.values())
        budget = self._check_budget(size)
        most = min(self.keep, max(budget // size, 1))
        if self._shelf is not None:
            self._shelf.room_for(max(most - 1, 1))  # the last one stays until the next is whole
            self._recycle(0)
        else:
            # The oldest makes room first: the budget holds at every moment.
            self._recycle(most - 1)
        arena = self._arena(size)
        # Buffers may change in the next forward, weights and optimizer state only when the
        # optimizer steps.
        names, buffers = list(tensors), self._buffers()
        passing = frozenset(i for i, n in enumerate(names) if n in buffers)
        arena.fill(list(tensors.values()), passing)
        taken = _Snapshot(step, tree, arena, aside)
        self._taken.append(taken)
        if self._shelf is not None:
            self._shelf.put(
                step, tree, aside, dict(zip(names, arena.tensors, strict=True)), arena, most
            )
        return True

    def _buffers(self) -> set[str]:
        modules = {n: t for n, t in self._things.items() if isinstance(t, nn.Module)}
        return {f"{n}.tensors.{b}" for n, m in modules.items() for b, _ in m.named_buffers()}

    def _arena(self, size: int) -> HostBuffer:
        fitting = next((a for a in self._spare if a.size >= size), None)
        self._spare = []
        return fitting or HostBuffer(size, self.device)

    def _recycle(self, left: int) -> None:
        """Only the newest `left` stay; an arena that this frees is used again."""
        gone = self._taken[: max(len(self._taken) - left, 0)]
        self._taken = self._taken[len(gone) :]
        self._spare = [s.arena for s in gone[-1:]]

    def _check_budget(self, size: int) -> int:
        """The budget. GeodiagError where `size` is more."""
        budget = self._max_bytes if self._max_bytes is not None else self._half(size)
        if size > budget:
            where = "on disk" if self.where == "disk" else "in memory"
            fix = (
                "take fewer bytes elsewhere or keep them on disk"
                if self.where == "memory"
                else "free some disk"
            )
            raise GeodiagError(
                f"a snapshot takes {_gb(size)} and the budget {where} is {_gb(budget)}; raise the budget, or {fix}"
            )
        return budget

    def _half(self, size: int) -> int:
        mine = sum(s.arena.size for s in self._taken) + sum(a.size for a in self._spare)
        if self.where == "memory":
            return (free_memory() + mine) // 2
        free = shutil.disk_usage(self._shelf.folder if self._shelf else Path.cwd()).free
        return (free + size * len(self.steps if self._shelf else [])) // 2

    # -- going back --------------------------------------------------------------------------

    def restore(self, step: int) -> dict[str, Any]:
        """Everything as it was before `step`; later snapshots, of a past that is given up, are
        dropped.

        Returns what was put aside with it. KeyError where there is no such snapshot.
        """
        taken = next((s for s in self._taken if s.step == step), None)
        if taken is not None:
            taken.arena.wait()
            tree, tensors, aside = taken.tree, taken.arena.tensors, taken.aside
        elif self._shelf is not None and step in self._shelf.steps():
            kept, tensors = self._shelf.take(step)
            tree, aside = kept.tree, kept.aside
        else:
            raise KeyError(
                f"no snapshot of step {step}; there are {', '.join(map(str, self.steps)) or 'none'}"
            )
        saved = join_tensors(tree, tensors)
        if saved.keys() != self._things.keys():
            raise ValueError(
                f"the snapshot holds {', '.join(saved)}, not {', '.join(self._things)}"
            )
        for name, thing in self._things.items():
            restore_state(thing, saved[name])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the arena may be filled again from here on
        self._taken = [s for s in self._taken if s.step <= step]
        if self._shelf is not None:
            self._shelf.drop_after(step)
        return aside

    def settle(self) -> None:
        """To be called before anything but an optimizer changes weights: the copy under way comes
        first.
        """
        if self._taken:
            self._taken[-1].arena.settle()

    def wait(self) -> None:
        """Until the disk is through with what it was given."""
        if self._shelf is not None:
            self._shelf.wait()

    def close(self) -> None:
        """Waits for the disk, gives the memory back, and takes the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._shelf is not None:
            self._shelf.close()
        self._taken, self._spare = [], []


_CPU = torch.device("cpu")


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
