"""The shelf: snapshots on disk, each a torch.distributed.checkpoint of its own, written beside the
training.
"""

import re
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from geodiag.hooks.record.serial_worker import Worker
from geodiag.hooks.snapshots.host_buffer import HostBuffer
from geodiag.store.files import first_line

_REST = "geodiag"
_NO_DIST = "torch.distributed is disabled, unavailable or uninitialized"
"""A warning of torch's about just what is wanted: one process reads and writes its own snapshots.
"""
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Rest:
    """What is kept beside the tensors, whose `names` are in their order."""

    tree: Any
    aside: dict[str, Any]
    names: list[str]


def snapshots_in(run: Path, rank: int = 0) -> list[int]:
    """The steps of which a run holds whole snapshots."""
    return _steps_in(folder_of(run, rank))


def folder_of(run: Path, rank: int) -> Path:
    return run / "snapshots" / f"rank-{rank}"


def _steps_in(folder: Path) -> list[int]:
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for n in names if (m := _NAME.fullmatch(n)))


def _refusal(error: BaseException) -> BaseException:
    """What went wrong below torch's own exception, which is no `Exception` and would end a
    training.
    """
    if not isinstance(error, CheckpointException):
        return error
    causes = [c for c, _trace in error.failures.values()]
    return next(
        (c for c in causes if isinstance(c, OSError)),
        OSError(first_line(causes[0] if causes else error)),
    )


class DiskSnapshots:
    """One rank's folder of snapshots: `step-00000250/`, whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        warnings.filterwarnings("ignore", _NO_DIST)
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.glob(".step-*"):
            shutil.rmtree(half)  # a process was killed while it wrote
        self._there = set(_steps_in(folder))
        self._writer = Worker("geodiag-snapshots")
        self._under_way: Future[None] | None = None
        self._last: int | None = None

    def steps(self) -> list[int]:
        """What lies there, whole, and what is being written. Does not look at the disk: it is asked
        every step.
        """
        return sorted(
            self._there | ({self._last} if self._busy and self._last is not None else set())
        )

    def free(self) -> bool:
        """Whether the last write is through. OSError, once, where the disk refused it."""
        if self._busy:
            return False
        self._raise_refusal()
        return True

    @property
    def _busy(self) -> bool:
        return self._under_way is not None and not self._under_way.done()

    def put(
        self,
        step: int,
        tree: Any,
        aside: dict[str, Any],
        tensors: dict[str, Tensor],
        arena: HostBuffer,
        most: int,
    ) -> None:
        """Writes in a thread, and then keeps at most so many. The tensors' arena is left alone
        until it is `free`.
        """

        def write() -> None:
            arena.wait()
            half = self.folder / f".step-{step:08d}"
            shutil.rmtree(half, ignore_errors=True)
            try:
                writer = FileSystemWriter(half, thread_count=4)
                state = {**tensors, _REST: Rest(tree, aside, list(tensors))}
                dcp.save(state, storage_writer=writer, no_dist=True)
                # What torch's other writing threads fail at is raised nowhere, and torch 2.11
                # returns nothing of it.
                written = FileSystemReader(half).read_metadata().storage_data
                lost = state.keys() - {entry.fqn for entry in written or ()}
                if lost:
                    raise OSError(
                        f"{len(lost)} of the snapshot's {len(state)} pieces were not written; free some disk"
                    )
                half.rename(self.folder / f"step-{step:08d}")
                self._there.add(step)
                for old in sorted(self._there)[:-most]:
                    self._remove(old)
            except BaseException as e:
                shutil.rmtree(
                    half, ignore_errors=True
                )  # half a snapshot would hold the space that is missing
                raise _refusal(e) from None

        self._last, self._under_way = step, self._writer.submit(write)

    def take(self, step: int) -> tuple[Rest, list[Tensor]]:
        """What was put there, tensors in host memory. OSError where it cannot be read."""
        self.wait()
        folder = self.folder / f"step-{step:08d}"
        reader = FileSystemReader(folder)
        try:
            entries = reader.read_metadata().state_dict_metadata
            state: dict[str, Any] = {
                name: torch.empty(m.size, dtype=m.properties.dtype)
                if isinstance(m, TensorStorageMetadata)
                else None
                for name, m in entries.items()
            }
            dcp.load(state, storage_reader=reader, no_dist=True)
            rest = state.pop(_REST)
        except (
            Exception,
            CheckpointException,
        ) as e:  # whatever a file that was cut or overwritten makes torch raise
            raise OSError(
                f"{folder} is unreadable ({_refusal(e)}); remove it to use an earlier one"
            ) from None
        return rest, [state[name] for name in rest.names]

    def room_for(self, left: int) -> None:
        """Only the newest `left` stay."""
        steps = self.steps()
        for step in steps[: max(len(steps) - left, 0)]:
            self._remove(step)

    def drop_after(self, step: int) -> None:
        """Snapshots of a past that is given up."""
        self.wait()
        for later in [s for s in self.steps() if s > step]:
            self._remove(later)

    def _remove(self, step: int) -> None:
        self._there.discard(step)
        shutil.rmtree(self.folder / f"step-{step:08d}", ignore_errors=True)

    def wait(self) -> None:
        """Until the writing thread is through; what it was refused is not raised here."""
        if self._under_way is not None:
            self._under_way.exception()

    def _raise_refusal(self) -> None:
        done, self._under_way = self._under_way, None
        if done is not None:
            done.result()

    def close(self) -> None:
        """Ends the thread, after what is under way. OSError where the disk refused that."""
        self._writer.stop()
        self._raise_refusal()
